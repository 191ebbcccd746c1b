"""Two runs side by side: noise is no difference, a slowdown is one, and what cannot be compared is refused."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from hf_qlora.bench import compare, runs
from hf_qlora.bench.quantization.result import Found, QuantizationResult
from hf_qlora.bench.quantization.rows import Row
from hf_qlora.bench.results import write_whole
from hf_qlora.cli import app


COMMITTED = Path(__file__).parents[2] / "results"
WITH = {"device": "CPU", "capability": "AVX512", "threads": 2, "date": "2026-01-01", "torch": "2.6", "code": "a"}
SETTINGS = {"rounds": 10, "seed": 0, "dtype": "bfloat16"}
MODEL = {"name": "m", "files": "1"}


def result(
    rows: list[Row], case: str = "latency", with_: dict[str, Any] = WITH, **settings: Any
) -> QuantizationResult:
    return QuantizationResult(MODEL, SETTINGS | settings, {case: Found(tuple(rows), 1.0, with_)})


def run_of(rows: list[Row], **more: Any) -> runs.Run:
    return runs.of_suite(result(rows, **more))


def noisy(seed: int, timings: int, rounds: int = 10, spread: float = 0.03, slower: float = 1.0) -> list[Row]:
    """Timings around a second, with the tail of real ones; the first is slower by a factor."""
    seconds = np.exp(np.random.default_rng(seed).gamma(1.0, spread, (timings, rounds)))
    seconds[0] *= slower
    return [Row(f"arm {i}", "seconds", tuple(values), "decode") for i, values in enumerate(seconds.tolist())]


def words(before: list[Row], after: list[Row]) -> dict[str, str]:
    found = compare.compare(run_of(before), run_of(after))
    return {verdict.key[2]: verdict.word for verdict in found.verdicts}


def test_noise_is_a_difference_in_one_comparison_of_a_hundred_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "RESAMPLES", 2)  # intervals have no say in a verdict, and take their time
    count = 120
    alarms = sum(set(words(noisy(2 * i, 12), noisy(2 * i + 1, 12)).values()) != {compare.SAME} for i in range(count))
    # Binomial(120, 0.01) is above 5 with probability 0.1 %.
    assert alarms <= 5


def test_planted_slowdowns_are_found_among_others_and_only_they(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "RESAMPLES", 2)
    found = [words(noisy(2 * i, 30), noisy(2 * i + 1, 30, slower=1.1)) for i in range(40)]
    # Rounds of 3 % noise: 35 of these 40 are found, the others are within noise as strict as 30 timings ask for.
    assert sum(each["arm 0"] == "slower" for each in found) >= 30
    assert sum(word != compare.SAME for each in found for name, word in each.items() if name != "arm 0") <= 2
    back = words(noisy(1, 30, slower=1.3), noisy(0, 30))
    assert back["arm 0"] == "faster"


def test_a_difference_below_two_percent_is_none_however_sure() -> None:
    before = [Row("a", "seconds", tuple(1 + 1e-6 * i for i in range(20)))]
    for factor, word in ((1.015, compare.SAME), (1.025, "slower"), (1 / 1.025, "faster")):
        after = [Row("a", "seconds", tuple(value * factor for value in before[0].values))]
        assert words(before, after) == {"a": word}


@pytest.mark.parametrize(("rounds", "timings", "few"), [(3, 1, True), (5, 1, False), (5, 2, True), (8, 40, False)])
def test_too_few_rounds_are_no_verdict(rounds: int, timings: int, few: bool) -> None:
    before, after = noisy(0, timings, rounds, 1e-3), noisy(1, timings, rounds, 1e-3, slower=2.0)
    assert words(before, after)["arm 0"] == (compare.FEW if few else "slower")


def test_p_values_are_those_of_all_permutations() -> None:
    generator = np.random.default_rng(3)
    a, b = generator.normal(size=4).tolist(), (generator.normal(size=5) + 1).tolist()

    def u(one: Any, other: Any) -> int:
        return sum(x > y for x in one for y in other)

    whole = a + b
    splits = [set(chosen) for chosen in itertools.combinations(range(9), 4)]
    us = [u([whole[i] for i in split], [whole[i] for i in range(9) if i not in split]) for split in splits]
    expected = sum(abs(each - 10) >= abs(u(a, b) - 10) for each in us) / len(us)  # 10: half of 4 · 5
    row = compare.compare(run_of([Row("a", "seconds", tuple(a))]), run_of([Row("a", "seconds", tuple(b))]))
    assert row.verdicts[0].p == pytest.approx(expected, rel=1e-9)
    assert compare.least_p(4, 5) == pytest.approx(2 / len(splits), rel=1e-12)


def test_holm_is_the_step_down_of_bonferroni() -> None:
    # by hand: 0.01 · 4, 0.02 · 3, then no less than before: max(0.06, 0.03 · 2), max(0.06, 0.04 · 1)
    assert compare.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert compare.holm([0.6, 0.9]) == [1.0, 1.0]
    assert compare.holm([]) == []


def test_intervals_cover_the_true_ratio() -> None:
    covered = 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        low, high = compare.ratio_interval(generator.normal(1, 0.03, 15), 1.1 * generator.normal(1, 0.03, 15))
        covered += low <= 1.1 <= high
    # Of a percentile bootstrap of medians, a little more than 95 %; Binomial(200, 0.95) is below 180 in 0.1 %.
    assert covered >= 180


@pytest.mark.parametrize(
    ("metric", "before", "after", "word"),
    [
        ("weight_bytes", 1000, 1000, "equal"),
        ("weight_bytes", 1000, 1001, "larger"),
        ("weight_bytes", 1000, 999, "smaller"),
        ("peak_bytes", 1000, 1020, "equal"),
        ("peak_bytes", 1000, 1050, "larger"),
        ("perplexity", 10.0, 10.05, "equal"),
        ("perplexity", 10.0, 9.0, "smaller"),
        ("kl", 0.0, 0.0, "equal"),
        ("kl", 0.0, 1e-9, "larger"),
    ],
)
def test_numbers_are_equal_or_not(metric: str, before: float, after: float, word: str) -> None:
    [verdict] = compare.compare(
        run_of([Row("NF4", metric, (before,))], case="precision"),
        run_of([Row("NF4", metric, (after,))], case="precision"),
    ).verdicts
    assert (verdict.word, verdict.interval, verdict.p) == (word, None, None)
    expected = after / before if before else 1.0 if not after else math.inf
    assert verdict.ratio == expected


def test_relative_to_the_reference_a_busy_machine_is_no_slowdown() -> None:
    load = np.linspace(1, 3, 12)
    quiet = {"dense": np.full(12, 0.1), "NF4": np.full(12, 0.2)}
    jitter = np.random.default_rng(0).normal(1, 0.01, (4, 12))
    before = [Row(arm, "seconds", tuple(s * jitter[i])) for i, (arm, s) in enumerate(quiet.items())]
    after = [Row(arm, "seconds", tuple(s * jitter[2 + i] * load)) for i, (arm, s) in enumerate(quiet.items())]
    assert words(before, after) == {"dense": "slower", "NF4": "slower"}
    found = compare.compare(run_of(before), run_of(after), relative=True)
    assert [(verdict.key[2], verdict.word) for verdict in found.verdicts] == [("NF4", compare.SAME)]
    assert found.verdicts[0].before == pytest.approx(2.0, rel=0.02)


def test_what_differs_beside_the_numbers_is_said() -> None:
    rows, more = noisy(0, 2), [Row("new", "kl", (1.0,))]
    other = WITH | {"threads": 4, "torch": "2.7", "date": "2026-02-02", "code": "b"}
    found = compare.compare(run_of(rows), run_of(rows + more, with_=other, dtype="float32"))
    assert found.warnings == (
        "dtype is 'bfloat16' in the first and 'float32' in the second.",
        "threads is 2 in the first and 4 in the second.",
        "torch is '2.6' in the first and '2.7' in the second.",
        "1 numbers are in the second alone, of ['latency'].",
    )
    assert compare.compare(run_of(rows), run_of(rows)).warnings == ()


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["bench", "compare", *map(str, arguments)])


def saved(folder: Path, name: str, rows: list[Row]) -> Path:
    result(rows).keep(folder / name)
    return folder / name / "results.json"


def test_the_command_says_what_is_slower_and_fails_on_it_where_asked(tmp_path: Path) -> None:
    a, b = saved(tmp_path, "a", noisy(0, 3)), saved(tmp_path, "b", noisy(1, 3, slower=1.5))
    done = invoke(a, b)
    assert done.exit_code == 0
    assert "arm 0" in done.output
    assert "arm 1" not in done.output  # without a difference, and not asked for
    assert "3 numbers compared: 2 no difference seen, 1 slower." in done.output
    assert "arm 1" in invoke(a.parent, b.parent, "--all").output
    assert invoke(a, b, "--fail-on", "slower").exit_code == 1
    assert invoke(a, b, "--fail-on", "larger").exit_code == 0
    assert invoke(b, a, "--fail-on", "slower").exit_code == 0
    assert invoke(a, b, "--fail-on", "doom").exit_code == 2
    fewer = saved(tmp_path, "fewer", noisy(1, 3)[:-1])
    assert invoke(a, fewer).exit_code == 0
    assert invoke(a, fewer, "--fail-on", "larger").exit_code == 1  # a number that has gone is no success
    assert invoke(fewer, a, "--fail-on", "larger").exit_code == 0


def test_too_few_rounds_to_fail_are_no_success(tmp_path: Path) -> None:
    a, b = (saved(tmp_path, name, noisy(0, 2, 3, slower=slower)) for name, slower in (("a", 1.0), ("b", 10.0)))
    done = invoke(a, b, "--fail-on", "slower")
    assert done.exit_code == 1
    # 6 rounds: 2 timings · 2 / (12 over 6) = 0.0043; of 5 it is 2 · 2 / 252 = 0.016, above 0.01
    said = "2 of 2 timings have too few rounds to tell whether they are slower, of ['latency']; both runs need 6"
    assert said in " ".join(done.output.split())
    assert invoke(a, b, "--fail-on", "larger").exit_code == 0
    assert invoke(a, b).exit_code == 0
    enough = [saved(tmp_path, name, noisy(seed, 2, 6)) for name, seed in (("c", 0), ("d", 1))]
    assert invoke(*enough, "--fail-on", "slower").exit_code == 0


def test_names_are_no_markup(tmp_path: Path) -> None:
    rows = [Row("[red]a[/red]", "kl", (1.0,), "[/]")]
    a, b = saved(tmp_path, "a", rows), saved(tmp_path, "b", [Row("[red]a[/red]", "kl", (2.0,), "[/]")])
    done = invoke(a, b)
    assert done.exit_code == 0
    assert "[red]a[/red]" in done.output
    assert "[/]" in done.output


@pytest.mark.parametrize("name", ["train_step_cpu.json", "generation_cpu.json"])
def test_results_of_other_benches_can_be_compared(tmp_path: Path, name: str) -> None:
    same = invoke(COMMITTED / name, COMMITTED / name)
    assert same.exit_code == 0
    assert "slower" not in same.output
    assert "Warning" not in same.output
    values = json.loads((COMMITTED / name).read_text())
    slow = next(iter(values["arms"]))
    timing = "step_s" if "step_s" in values["arms"][slow] else "generation_s"
    values["arms"][slow][timing] = [2 * seconds for seconds in values["arms"][slow][timing]]
    write_whole(tmp_path / "b.json", values)
    [verdict] = [
        verdict
        for verdict in compare.compare(runs.read(COMMITTED / name), runs.read(tmp_path / "b.json")).verdicts
        if verdict.word == "slower"
    ]
    assert (verdict.key[2], verdict.ratio) == (slow, pytest.approx(2.0))
    relative = compare.compare(runs.read(COMMITTED / name), runs.read(tmp_path / "b.json"), relative=True)
    assert all(verdict.key[2] != runs.FLOOR for verdict in relative.verdicts if verdict.p is not None)


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ("{a}", "{committed}/train_step_cpu.json", "One is of bench quantization and one of bench train-step"),
        ("{a}", "{committed}/generation_cpu.json", "One is of bench quantization and one of bench generation"),
        ("{a}", "{committed}/skip_list.json", "cannot be compared; give results of bench quantization"),
        ("{a}", "{folder}/none.json", "none.json is not there"),
        ("{a}", "{folder}/broken.json", "is not JSON"),
        ("{a}", "{folder}/changed.json", "was changed after it was measured"),
        ("{a}", "{folder}/disjoint/results.json", "have nothing in common"),
        ("{a}", "{folder}/newer.json", "in format 1"),
        ("{a}", "{folder}/half.json", "is not whole"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(tmp_path: Path, first: str, second: str, said: str) -> None:
    a = saved(tmp_path, "a", noisy(0, 2))
    saved(tmp_path, "disjoint", [Row("other", "seconds", (1.0, 2.0))])
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "changed.json").write_text(a.read_text().replace('"decode"', '"prefill"', 1))
    write_whole(tmp_path / "newer.json", {"kind": "quantization", "format": 2})
    write_whole(tmp_path / "half.json", {"kind": "quantization", "format": 1, "model": {}, "settings": {}})
    places = {"a": a, "folder": tmp_path, "committed": COMMITTED}
    done = invoke(first.format(**places), second.format(**places))
    assert done.exit_code == 2, done.output
    assert said in " ".join(done.output.split())


def test_what_is_no_number_fails_whatever_failing_was_asked_for(tmp_path: Path) -> None:
    rows = noisy(0, 1)
    a = saved(tmp_path, "a", [*rows, Row("arm", "kl", (0.1,))])
    b = saved(tmp_path, "b", [*rows, Row("arm", "kl", (math.nan,))])
    assert "not a number" in invoke(a, b).output
    for on in compare.WORSE:
        done = invoke(a, b, "--fail-on", on)
        assert done.exit_code == 1
        assert "Failed: of the numbers 1 not a number." in done.output


def test_timings_that_cannot_be_relative_are_counted(tmp_path: Path) -> None:
    """The references themselves are not: they are what the others are divided by."""
    timings = noisy(0, 2)
    rows = [*timings, Row("dense", "seconds", timings[0].values, "decode"), Row("arm", "seconds", (1.0,), "prefill")]
    a, b = (saved(tmp_path, name, rows) for name in ("a", "b"))
    said = "1 timings have no arm to be divided by and are left out, of ['latency']"
    assert said in " ".join(invoke(a, b, "--relative").output.split())
    assert "left out" not in invoke(a, b).output

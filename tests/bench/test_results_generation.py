"""The results of text generation: which runs there are, which rates are taken, and what the tables say of rows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import llama
from byte_tokenizer import byte_tokenizer
from typer.testing import CliRunner

from hf_qlora.bench.examples import generation, generation_cost, generation_report, pages, runs
from hf_qlora.bench.examples.runs import RUNS, Origin, Run
from hf_qlora.bench.measure import environment
from hf_qlora.bench.results import append_line, read_lines
from hf_qlora.cli import app


ROOT = Path(__file__).parents[2]
PLAN = generation.Plan(seeds=(1, 2, 3))
OURS = Origin("abc", environment("cpu")["device"])
ANSWERS = 40
TOKENS = [2 + i % 5 for i in range(ANSWERS)]
NATS = {"full": 2.0, "lora": 2.02, "qlora": 2.1}  # a token

Change = Callable[[Run, dict[str, Any]], None]


def found_of(run: Run) -> dict[str, Any]:
    """What a run might find: an answer has its own likelihood, each seed and method shift all of them."""
    draws = np.random.default_rng([ANSWERS, 0]).normal(size=ANSWERS), np.random.default_rng(run.seed).normal(size=1)
    own = np.random.default_rng([run.seed, *map(ord, run.arm)]).normal(size=ANSWERS) / 10
    each = NATS.get(run.arm, 3.0) + draws[0] / 2 + draws[1] / 20 + own
    logs = [-float(nats) * count for nats, count in zip(each, TOKENS, strict=True)]
    exact = "".join("1" if i % 3 else "0" for i in range(ANSWERS))
    stage: dict[str, Any] = {"perplexity": math.exp(-sum(logs) / sum(TOKENS)), "log_likelihoods": logs}
    answered = stage | {"bleu": 20.0, "bleu_signature": "s", "exact": exact, "exact_match": 65.0}
    found: dict[str, Any] = {"trained": answered, "merged": stage, "base": answered, "nf4": stage}
    found |= {"answer_tokens": TOKENS, "versions": {"accelerate": "1", "sacrebleu": "2"}, "settings": {"steps": 64}}
    found |= {"trained_parameters": 4_884_480, "base_parameters": 134_515_008, "saved_bytes": 19_600_000}
    return found | {"base_bytes": 269_000_000, "training_bytes": 131_500_000, "trained_bytes": 19_500_000}


def keep(file: Path, run: Run, found: dict[str, Any], script: str = OURS.script) -> None:
    row = {"part": run.part, "arm": run.arm, "seed": run.seed, "arguments": list(run.arguments), "script": script}
    append_line(file, {**row, "found": found, "card": f"# {run.arm} {run.seed}\n", "with": environment("cpu")})


def fill(file: Path, plan: generation.Plan = PLAN, change: Change = lambda run, found: None) -> Path:
    """The third rate is the best of each method."""
    for run in plan.sweep.runs():
        keep(file, run, {"trained": {"perplexity": 9.0 - (plan.rates[run.arm][-1] in run.arguments)}})
    for run in (plan.base, *plan.study(file, OURS).runs()):
        found = found_of(run)
        change(run, found)
        keep(file, run, found)
    return file


def rows_in(file: Path) -> generation_report.Rows:
    of_seeds = runs.rows_of(PLAN.study(file, OURS), file, OURS).values()
    return [{arm: row["found"] for arm, row in of_seed.items()} for of_seed in of_seeds]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return fill(tmp_path / "results.jsonl")


def test_each_method_takes_its_best_rate(results: Path) -> None:
    assert PLAN.sweep.chosen(results, OURS) == {name: rates[2] for name, rates in PLAN.rates.items()}
    study = list(PLAN.study(results, OURS).runs())
    assert [(run.seed, run.arm) for run in study[:4]] == [(1, "full"), (1, "lora"), (1, "qlora"), (2, "full")]
    assert {run.part for run in study} == {RUNS}
    assert all("validation" not in run.arguments for run in (*study, PLAN.base))
    assert all("validation" in run.arguments for run in PLAN.sweep.runs())
    diverged = [PLAN.sweep.score({"trained": {"perplexity": value}}) for value in (None, math.nan, math.inf, 9.5)]
    assert diverged == [math.inf] * 3 + [9.5]
    assert {run.part for run in PLAN.sweep.runs()}.isdisjoint({RUNS, PLAN.base.part})


def test_a_ratio_is_that_of_the_perplexities(results: Path) -> None:
    """Geometric means over the seeds, as the runs say them."""
    rows = rows_in(results)
    said = [
        math.log(of_seed["qlora"]["trained"]["perplexity"] / of_seed["lora"]["trained"]["perplexity"])
        for of_seed in rows
    ]
    assert generation_report.ratio(rows, "qlora", "lora").mean == pytest.approx(math.exp(sum(said) / 3), rel=1e-12)
    values = generation_report.log_perplexities(rows, "qlora").mean(axis=1)
    perplexities = [of_seed["qlora"]["trained"]["perplexity"] for of_seed in rows]
    assert np.exp(values) == pytest.approx(perplexities, rel=1e-12)


@pytest.mark.parametrize("reference", ["full", None])
def test_drawing_answers_anew_moves_log_perplexity_as_much(reference: str | None, results: Path) -> None:
    """The linearized values against perplexities computed again for each draw of answers."""
    rows, random, tokens = rows_in(results), np.random.default_rng(0), np.array(TOKENS)
    sums = {arm: np.array([of_seed[arm]["trained"]["log_likelihoods"] for of_seed in rows]).mean(0) for arm in rows[0]}
    linear, nats = generation_report.log_perplexities(rows, "qlora").mean(0), -sums["qlora"]
    if reference is not None:
        linear, nats = linear - generation_report.log_perplexities(rows, reference).mean(0), nats + sums[reference]
    drawn = random.integers(0, ANSWERS, (4000, ANSWERS))
    direct = nats[drawn].sum(1) / tokens[drawn].sum(1)
    # the same draws; what is left is of second order, 1/40 of the deviation
    assert np.std(linear[drawn].mean(1)) == pytest.approx(np.std(direct), rel=0.025)


def test_the_price_of_nf4_is_said_with_its_interval(results: Path) -> None:
    rows, text = rows_in(results), generation_report.markdown(results, PLAN, OURS)
    found = generation_report.ratio(rows, "qlora", "lora")
    assert f"**The price of NF4**: QLoRA's perplexity is {found.mean:.3f} times that of LoRA" in text
    assert f"| {found.mean:.3f} | {found.low:.3f} to {found.high:.3f} |" in text
    assert found.low < math.exp(0.08) < found.high  # what `NATS` says
    assert "no difference is shown" not in generation_report.price(rows)


def test_no_difference_is_said_to_be_none(tmp_path: Path) -> None:
    def same(run: Run, found: dict[str, Any]) -> None:
        if run.arm != "base":
            found["trained"]["log_likelihoods"] = found_of(Run("lora", run.seed, ()))["trained"]["log_likelihoods"]
            if run.arm == "qlora":
                found["trained"]["log_likelihoods"][::2] = [
                    log + 0.3 for log in found["trained"]["log_likelihoods"][::2]
                ]
                found["trained"]["log_likelihoods"][1::2] = [
                    log - 0.3 for log in found["trained"]["log_likelihoods"][1::2]
                ]

    rows = rows_in(fill(tmp_path / "results.jsonl", change=same))
    assert generation_report.price(rows).count("it holds 1: no difference is shown") == 2


@pytest.mark.parametrize(
    ("wrong", "said"), [(0, "**Shown**"), (1, "cannot be decided with 40 answers and 3 seeds"), (20, "worse")]
)
def test_exact_match_is_by_the_interval(wrong: int, said: str, tmp_path: Path) -> None:
    """QLoRA has that many fewer answers right, the same ones with each seed."""

    def change(run: Run, found: dict[str, Any]) -> None:
        if run.arm == "qlora":
            right = found["trained"]["exact"].count("1") - wrong
            found["trained"]["exact"] = found["trained"]["exact"].replace("1", "0", wrong)
            found["trained"]["exact_match"] = 100 * right / ANSWERS

    rows = rows_in(fill(tmp_path / "results.jsonl", change=change))
    assert said in generation_report.exactness(rows)
    assert generation_report.exact_difference(rows, "qlora", "full").mean == pytest.approx(-100 * wrong / ANSWERS)


def test_one_seed_has_no_interval_and_no_nan(tmp_path: Path) -> None:
    plan = generation.Plan(seeds=(1,))
    text = generation_report.markdown(fill(tmp_path / "results.jsonl", plan), plan, OURS)
    assert "nan" not in text
    assert "one seed has no interval" in text
    assert "| QLoRA |" in text


def test_a_seed_that_is_not_whole_is_left_out(results: Path) -> None:
    assert "3 seeds; 40 answers" in generation_report.markdown(results, PLAN, OURS)
    lines = results.read_text().splitlines(keepends=True)
    results.write_text("".join(lines[:-1]))
    assert "2 of 3 planned seeds; 40 answers" in generation_report.markdown(results, PLAN, OURS)


def test_rows_of_another_script_are_not_mixed_in(results: Path) -> None:
    before = generation_report.markdown(results, PLAN, OURS)
    for run in PLAN.study(results, OURS).runs():
        keep(results, run, found_of(run) | {"trained_parameters": 1}, script="other")
    assert generation_report.markdown(results, PLAN, OURS) == before


def test_the_versions_that_made_the_rows_are_said(results: Path, tmp_path: Path) -> None:
    made = f"hf-qlora {environment('cpu')['hf-qlora']}, code"
    ours = f"{made} {environment('cpu')['code']}"
    assert generation_report.markdown(results, PLAN, OURS).endswith(f"\n\nRows were made with {ours}.")
    mixed = tmp_path / "mixed.jsonl"
    for row in read_lines(results):
        if row["part"] == RUNS and row["seed"] == 2:
            row["with"]["code"] = "another"
        append_line(mixed, row)
    each = f"{ours} (sweep, base, runs); {made} another (runs)."
    assert f"\n\nRows were made with 2 versions of this package: {each}" in generation_report.card(mixed, PLAN, OURS)


def test_bytes_and_parameters(results: Path) -> None:
    text = generation_report.markdown(results, PLAN, OURS)
    assert "| QLoRA | 4,884,480 | 3.63 % | 131.5 | 19.6 |" in text
    assert "2.40 times less" in text


def test_the_card_is_the_last_seeds_with_the_tables(results: Path) -> None:
    card = generation_report.card(results, PLAN, OURS)
    assert card.startswith("# qlora 3\n")
    assert generation_report.markdown(results, PLAN, OURS) in card


def test_without_runs_there_is_nothing(tmp_path: Path) -> None:
    assert generation_report.markdown(tmp_path / "none.jsonl") == ""
    assert generation_report.card(tmp_path / "none.jsonl") == ""


def test_reporting_needs_no_example(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "checkout", lambda: Path("nowhere"))
    command = ["bench", "results-generation", "--results", str(results), "--seeds", "3"]
    ended = CliRunner().invoke(app, [*command, "--report"])
    assert (ended.exit_code, ended.output.strip()) == (0, generation_report.markdown(results, PLAN, OURS))
    ended = CliRunner().invoke(app, command)
    assert ended.exit_code == 2
    assert "checkout" in ended.output


def test_a_changed_file_and_no_gpu_are_one_sentence(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results.write_text(results.read_text().replace("269000000", "169000000"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    nothing = ("--results", str(results.with_name("none.jsonl")), "--device", "cuda")
    for options, said in ((("--report", "--results", str(results)), "was changed"), (nothing, "no GPU")):
        ended = CliRunner().invoke(app, ["bench", "results-generation", *options])
        assert ended.exit_code == 2
        assert said in ended.output


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_cost_is_measured_to_its_end(tmp_path: Path) -> None:
    """All parts of it, on a tiny model; again there is nothing left to do."""
    torch.manual_seed(0)
    llama(vocab_size=257).save_pretrained(tmp_path / "model")
    byte_tokenizer(chat=True).save_pretrained(tmp_path / "model")
    said = [("user", "{n} + 1 ="), ("assistant", "{n}")]
    chats = [[{"role": role, "content": text.format(n=n)} for role, text in said] for n in range(60)]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    given = ("--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "data.jsonl"))
    arguments = (*given, "--held-out", "8", "--batch-size", "4")
    file, script = tmp_path / "results.jsonl", runs.example(generation.SCRIPT)
    for _ in range(2):
        rates = {"full": "1e-4", "qlora": "1e-3"}
        generation_cost.perform(script, arguments, file, 1, rates, "cpu")
    rows = {row["what"]: row["found"] for row in read_lines(file)}
    assert len(read_lines(file)) == len(rows) == 3
    assert all(rows["memory"][method]["peak"] > 0 for method in rates)
    assert all(len(rows["time"][method]["step_s"]) == 1 for method in rates)
    assert rows["time"]["full"]["losses"][-1] < rows["time"]["full"]["losses"][0]
    assert rows["generating"]["case"]["sequence_length"] > 10
    text = generation_cost.markdown(file, runs.origin(script, "cpu"))
    assert "| qlora |" in text
    assert "Generating" in text


def test_what_is_committed_is_what_was_measured() -> None:
    """The card, the table in the docs and the example's rates, over five seeds."""
    file, plan = ROOT / "results" / "text_generation.jsonl", generation.Plan()
    ours = runs.last_origin(file)
    assert ours is not None
    assert len(runs.rows_of(plan.study(file, ours), file, ours)) == len(plan.seeds) == 5
    card = (ROOT / "model_cards" / "text_generation.md").read_text(encoding="utf-8")
    assert card == generation_report.card(file, ours=ours)
    page = (ROOT / "docs" / "text_generation.md").read_text(encoding="utf-8")
    assert pages.document(page, generation_report.markdown(file, ours=ours)) == page
    rates = {name: float(rate) for name, rate in plan.sweep.chosen(file, ours).items()}
    assert generation_rates() == pytest.approx(rates)


def generation_rates() -> dict[str, float]:
    import text_generation

    return dict(text_generation.LEARNING_RATES)

"""The experiment on depth: paired, resumable, and with statistics that hold against others' definitions."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from architectures import VOCAB, llama
from peft import get_peft_model
from torch import Tensor, nn
from typer.testing import CliRunner

from hf_qlora.bench.depth import report, run, tasks
from hf_qlora.bench.depth.arms import ARMS, REFERENCE
from hf_qlora.bench.depth.run import Plan, Run
from hf_qlora.bench.measure import environment
from hf_qlora.bench.results import append_line
from hf_qlora.cli import app


WITH = {**environment("cpu"), "code": "a"}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Toy(tasks.Task):
    """A tiny model, so that the machinery can be run through."""

    name, metric, better, batch_size, steps = "toy", "loss", -1, 2, 2
    rates = (1e-3, 1e-2)
    shared: ClassVar[dict[str, Any]] = {
        "r": 2,
        "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
        "quantization": None,
    }

    def base(self) -> nn.Module:
        torch.manual_seed(0)
        return llama()

    def batches(self, seed: int, steps: int) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        ids = [torch.randint(1, VOCAB, (2, 8), generator=generator) for _ in range(steps)]
        return [{"input_ids": part, "labels": part} for part in ids]

    def evaluate(self, model: nn.Module, split: str, limit: int | None = None) -> float:
        ids = torch.randint(1, VOCAB, (2, 8), generator=torch.Generator().manual_seed(99))
        with torch.no_grad():
            return float(model(input_ids=ids, labels=ids).loss)


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setattr(tasks, "TASKS", {"toy": Toy})
    monkeypatch.setattr(run, "TASKS", {"toy": Toy})
    monkeypatch.setattr(report, "TASKS", {"toy": Toy})
    return Plan(tasks=("toy",), seeds=(1, 2))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_arm_is_swept_and_then_run_on_fresh_seeds(plan: Plan, tmp_path: Path) -> None:
    results = tmp_path / "deep" / "results.jsonl"
    run.perform(plan, results)
    rows = lines(results)
    assert len(rows) == len(ARMS) * (2 * 2 + 2)
    sweep = [row for row in rows if row["run"]["seed"] in run.SWEEP_SEEDS]
    assert len(sweep) == len(ARMS) * 4
    assert {row["found"]["split"] for row in sweep} == {"validation"}
    for arm in ARMS:
        own = [row for row in sweep if row["run"]["arm"] == arm]
        scores = {lr: sum(r["found"]["score"] for r in own if r["run"]["lr"] == lr) for lr in Toy.rates}
        chosen = {row["run"]["lr"] for row in rows if row["run"]["arm"] == arm and row["found"]["split"] == "test"}
        assert chosen == {min(scores, key=scores.__getitem__)}
    for row in rows:
        assert len(row["found"]["losses"]) == len(row["found"]["gradient_norms"]) == 2
        assert all(norm > 0 for norm in row["found"]["gradient_norms"])
        assert row["with"]["torch"] == torch.__version__.partition("+")[0] or row["with"]["torch"] == torch.__version__


def test_an_interrupted_experiment_goes_on(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    run.perform(plan, whole)
    original, done = run.do, []

    def interrupted(*args: Any) -> dict[str, Any]:
        if len(done) == 7:
            raise KeyboardInterrupt
        done.append(args)
        return original(*args)

    monkeypatch.setattr(run, "do", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.perform(plan, parts)
    assert len(lines(parts)) == 7
    monkeypatch.setattr(run, "do", original)
    run.perform(plan, parts)
    scores = [[(row["run"], row["found"]["score"]) for row in lines(path)] for path in (whole, parts)]
    assert scores[0] == scores[1]
    monkeypatch.setattr(run, "do", lambda *args: pytest.fail("done already"))
    run.perform(plan, parts)


def test_a_half_written_line_is_done_again(plan: Plan, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    run.perform(plan, results)
    whole = results.read_text()
    results.write_text(whole[:-40])
    assert len(run.read(results)) == len(whole.splitlines()) - 1
    run.perform(plan, results)
    assert [row["run"] for row in lines(results)] == [json.loads(line)["run"] for line in whole.splitlines()]


def test_a_diverged_rate_is_not_chosen() -> None:
    done = [
        (Run("toy", "gain", lr, 0, 2), {"score": score}) for lr, score in ((1e-3, math.nan), (1e-2, 5.0), (7.0, 0.1))
    ]
    assert run.best_rate(done, Toy, "gain", 2) == 1e-2


def test_one_lucky_seed_does_not_choose_the_rate() -> None:
    scores = {1e-3: (2.0, 2.0), 1e-2: (1.0, 9.0)}
    done = [
        (Run("toy", "gain", lr, seed, 2), {"score": score})
        for lr, both in scores.items()
        for seed, score in zip(run.SWEEP_SEEDS, both, strict=True)
    ]
    assert run.best_rate(done, Toy, "gain", 2) == 1e-3


def test_arms_start_from_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `do` makes them: one `lora_A` for all arms of a seed, another for another seed."""
    made: list[nn.Module] = []
    original = run.get_peft_model

    def get(*args: Any, **kwargs: Any) -> Any:
        made.append(original(*args, **kwargs))
        starts.append(next(p.detach().clone() for n, p in made[-1].named_parameters() if "lora_A" in n))
        return made[-1]

    monkeypatch.setattr(run, "get_peft_model", get)
    starts: list[Tensor] = []
    for name, seed in ((REFERENCE, 1), ("DoRA", 1), ("gain", 1), (REFERENCE, 2)):
        run.do(Run("toy", name, 1e-3, seed, 1), Toy(), ARMS[name])
    assert torch.equal(starts[0], starts[1])
    assert torch.equal(starts[0], starts[2])
    assert not torch.equal(starts[0], starts[3])


def test_arms_of_a_seed_start_alike_and_train_the_same_number_of_weights() -> None:
    models = {}
    for name, arm in ARMS.items():
        base = Toy().base()
        run.set_seed(3)
        models[name] = get_peft_model(base, arm.config(**Toy.shared))
    reference = {n: p for n, p in models[REFERENCE].named_parameters() if p.requires_grad}
    for name, model in models.items():
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        for key, parameter in reference.items():
            assert torch.equal(trained[key], parameter), name
        extra = sum(p.numel() for p in trained.values()) - sum(p.numel() for p in reference.values())
        assert extra == (256 if name == "DoRA" else 2 if name.startswith("gain") else 0), name


def test_the_arm_of_layer_rates_is_the_fixed_profile() -> None:
    """To Adam's ε, which sees gradients that the profile has multiplied."""
    found = {}
    for name in ("layer rates, linear", "fixed linear", REFERENCE):
        found[name] = run.do(Run("toy", name, 1e-1, 1, 6), Toy(), ARMS[name])["losses"]
    assert found["layer rates, linear"] == pytest.approx(found["fixed linear"], abs=2e-4)
    assert found["layer rates, linear"] != pytest.approx(found[REFERENCE], abs=1e-3)


def test_rates_warm_up_and_fall() -> None:
    factors = [run._schedule(step, 20) for step in range(20)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[2:] == sorted(factors[2:], reverse=True)
    assert 0 < factors[-1] < 0.1


# --- statistics ------------------------------------------------------------------------------------------------------


def test_the_p_value_is_a_paired_t_tests() -> None:
    """The textbook's t for 5 differences, 4 degrees of freedom: the table has 2.776 at 0.05 and 4.604 at 0.01."""
    centred = [d / statistics.stdev([-2, -1, 0, 1, 2]) * 5**0.5 for d in (-2, -1, 0, 1, 2)]  # standard error 1
    assert report.paired_p([d + 2.776 for d in centred]) == pytest.approx(0.05, abs=1e-4)
    assert report.paired_p([d - 4.604 for d in centred]) == pytest.approx(0.01, abs=1e-4)
    for too_little in ([0.0, 0.0], [0.3], [0.1] * 5, [0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.1, 0.2, math.nan]):
        assert math.isnan(report.paired_p(too_little))


def test_the_interval_covers_what_it_says() -> None:
    """Of the mean of eight normal numbers, in 400 trials: within three standard errors of 95 %."""
    trials = np.random.default_rng(1).normal(size=(400, 8))
    inside = sum(low <= 0 <= high for low, high in map(report.bootstrap_interval, trials))
    assert abs(inside / 400 - 0.95) <= 3 * (0.95 * 0.05 / 400) ** 0.5
    for too_little in ([0.5] * 5, [0.5, 0.6], [0.1, 0.2, 0.3, 0.4]):
        assert all(math.isnan(end) for end in report.bootstrap_interval(too_little))


def test_the_interval_is_not_made_of_rounding() -> None:
    """0.1 repeated has a standard deviation of 1e-17, which is no error to divide by."""
    for tied in ([0.1, 0.2, 0.3, 0.1, 0.1], [0.0015, -0.0035, 0.007, 0.0015, 0.0015]):
        low, high = report.bootstrap_interval(tied)
        assert max(tied) + 10 * np.ptp(tied) > high > low > min(tied) - 10 * np.ptp(tied)


def test_holm_multiplies_and_never_falls() -> None:
    rows = [report.Row(REFERENCE, 1, 1, 0, 0)] + [
        report.Row(name, 1, 1, 0, 0, p=p) for name, p in (("a", 0.04), ("b", 0.01), ("c", 0.03))
    ]
    corrected = {row.arm: row.p_corrected for row in report._corrected(rows)}
    assert math.isnan(corrected.pop(REFERENCE))
    assert corrected == {"b": pytest.approx(0.03), "c": pytest.approx(0.06), "a": pytest.approx(0.06)}


def test_only_seeds_in_common_are_compared(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    sweep = dict.fromkeys(run.SWEEP_SEEDS, 1.0)
    scores = {REFERENCE: {**sweep, 1: 2.0, 2: 4.0}, "gain": {**sweep, 1: 1.0, 2: 2.0, 3: 100.0}}
    for arm, seeds in scores.items():
        for seed, score in seeds.items():
            made = Run("toy", arm, 1e-3, seed, 2)
            append_line(path, {"run": dataclasses.asdict(made), "found": {"score": score}, "with": WITH})
    for other in (Run("toy", "gain", 1e-2, 1, 2), Run("toy", "gain", 1e-3, 1, 1)):  # another rate, fewer steps
        append_line(path, {"run": dataclasses.asdict(other), "found": {"score": 50.0}, "with": WITH})
    reference, gain = report.table(path, Toy)
    assert (reference.mean, gain.mean, gain.difference, gain.seeds) == (3.0, 1.5, -1.5, 2)
    assert "| gain | 0.001\\* | 2 | 1.5000 | 0.7071 | 2.0000 | -1.5000 |  |  |" in report.markdown(path)


@pytest.mark.parametrize(
    ("device", "seeds", "said"),
    [
        ("NVIDIA H200", (1,), "has rows of NVIDIA H200; those of CPU"),
        (WITH["device"], (1, 2, 1), "has 2 lines of Run"),
    ],
)
def test_rows_of_another_device_or_twice_the_same_are_refused(
    device: str, seeds: tuple[int, ...], said: str, plan: Plan, tmp_path: Path
) -> None:
    results = tmp_path / "results.jsonl"
    for seed in seeds:
        made = {"run": dataclasses.asdict(Run("toy", "gain", 1e-3, seed, 2)), "found": {"score": 1.0}}
        append_line(results, {**made, "with": {**WITH, "device": device}})
    with pytest.raises(ValueError, match=rf"results\.jsonl {said}"):
        run.perform(plan, results)
    found = CliRunner().invoke(app, ["bench", "adaptive-depth", "--results", str(results)])
    assert found.exit_code == 2
    assert said in found.output.replace("\n", " ")


def test_the_command_reports_and_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    empty = CliRunner().invoke(app, ["bench", "adaptive-depth", "--report"])
    assert (empty.exit_code, "is not there; leave out --report" in empty.output) == (2, True)
    wrong = CliRunner().invoke(app, ["bench", "adaptive-depth", "--task", "poems"])
    assert wrong.exit_code == 2
    assert "headlines" in wrong.output


@pytest.mark.slow
def test_the_real_tasks_run(tmp_path: Path) -> None:
    results = tmp_path / "quick.jsonl"
    run.perform(dataclasses.replace(run.QUICK, seeds=(1,)), results)
    assert {row["run"]["task"] for row in lines(results)} == {"headlines", "answers"}

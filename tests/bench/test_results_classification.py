"""The tables of the examples: resumable, sealed, of one script and device; a stub plays the example."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import text_classification as real
from scipy import stats
from typer.testing import CliRunner

from hf_qlora.bench.examples import classification, pages, runs
from hf_qlora.bench.examples import classification_report as report
from hf_qlora.bench.examples.runs import ExampleError, Origin, Run, origin, read, rows_of
from hf_qlora.bench.results import append_line, read_lines
from hf_qlora.cli import app


STUB = """
import argparse, json, os, pathlib, sys
parser = argparse.ArgumentParser()
for name in ("method", "seed", "output", "json", "fail", "device", "learning-rate"):
    parser.add_argument("--" + name)
options = parser.parse_args()
count = pathlib.Path(__file__).with_name("calls.txt")
with count.open("a") as file:
    file.write(f"{options.method} {options.seed} {options.learning_rate}\\n")
if options.fail == options.method and options.seed == "2":
    sys.exit("no luck today")
seed = int(options.seed)
of_method, of_seed = {"full": 90, "lora": 89, "qlora": 88, "adaptive-depth": 91}[options.method], seed % 3
right = of_method + of_seed
output = pathlib.Path(options.output)
output.mkdir()
(output / "README.md").write_text(f"# Card of {options.method} {seed}\\n")
found = {"test": {"accuracy": right / 100, "macro_f1": right / 100 - 0.01, "loss": 0.3},
         "correct": "1" * of_method + "0" * (97 - of_method) + "1" * of_seed + "0" * (3 - of_seed),
         "validation": {"accuracy": 0.8 + 10 * float(options.learning_rate)},
         "settings": {"steps": 3, "batch_size": 2}, "trained_parameters": 1234567, "saved_bytes": 3 * 2**20}
pathlib.Path(options.json).write_text(json.dumps(found))
"""
PLAN = replace(classification.Plan(), seeds=(1, 2, 3))


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    path = tmp_path / "stub.py"
    path.write_text(STUB)
    return path


def calls(stub: Path) -> list[str]:
    file = stub.with_name("calls.txt")
    return file.read_text().splitlines() if file.is_file() else []


def perform(stub: Path, results: Path, plan: classification.Plan = PLAN, workers: int = 1) -> Origin:
    """The sweep and the seeds, without the cost."""
    ours = origin(stub, "cpu")
    runs.perform(stub, plan.sweep.runs(), results, workers=workers)
    runs.perform(stub, plan.study(results, ours).runs(), results, workers=workers)
    return ours


def few(*arguments: str, seeds: tuple[int, ...] = (1,)) -> classification.Plan:
    """One rate for each method."""
    one = dict.fromkeys(classification.METHODS, ("1e-3",))
    return classification.Plan(seeds, classification.sweep_of(one, arguments))


def test_rates_first_then_seeds_and_nothing_twice(stub: Path, tmp_path: Path) -> None:
    results = tmp_path / "deep" / "results.jsonl"
    perform(stub, results, few(seeds=(1, 2)))
    assert calls(stub) == [f"{method} {seed} 1e-3" for seed in (100, 1, 2) for method in classification.METHODS]
    perform(stub, results, few(seeds=(1, 2)))
    assert len(calls(stub)) == 12
    perform(stub, results, few(seeds=(1, 2, 3)), workers=2)
    assert len(calls(stub)) == 16
    assert {row["with"]["code"] for row in read_lines(results)}


def test_each_method_is_swept_alike_and_takes_its_best(stub: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    ours = perform(stub, results, replace(PLAN, seeds=(1,)))
    assert {len(tried) for tried in classification.RATES.values()} == {3}
    best = {method: tried[-1] for method, tried in classification.RATES.items()}  # as the stub has it
    assert PLAN.sweep.chosen(results, ours) == best
    assert calls(stub)[12:] == [f"{method} 1 {rate}" for method, rate in best.items()]
    text = PLAN.sweep.markdown(results, ours, classification.NAMES)
    assert "* full fine-tuning: 1e-4: 80.1 %, 2e-4: 80.2 %, **4e-4: 80.4 %**; none was tried beyond" in text
    assert "* QLoRA: 1e-3: 81.0 %, 1.7e-3: 81.7 %, **3e-3: 83.0 %**; none was tried beyond" in text


def test_all_rates_that_were_tried_are_shown_and_count(stub: Path, tmp_path: Path) -> None:
    """As where a grid was extended: also those that the study no longer asks for, but none of other arguments."""
    results = tmp_path / "results.jsonl"
    ours = perform(stub, results, replace(PLAN, seeds=()))
    for rates, arguments in ((("5e-5", "8e-4"), ()), (("9e-4",), ("--fail", "no"))):
        runs.perform(stub, classification.sweep_of({"full": rates}, arguments).runs(), results)
    assert PLAN.sweep.chosen(results, ours)["full"] == "8e-4"
    text = PLAN.sweep.markdown(results, ours, classification.NAMES)
    assert "tuning: 5e-5: 80.0 %, 1e-4: 80.1 %, 2e-4: 80.2 %, 4e-4: 80.4 %, **8e-4: 80.8 %**; none was tried" in text


def test_no_rate_is_chosen_of_some_of_them(tmp_path: Path) -> None:
    results, sweep = tmp_path / "results.jsonl", PLAN.sweep
    for run in list(sweep.runs())[:2]:
        keep(results, run, Origin("a", "CPU, x86_64"))
    assert sweep.chosen(results, Origin("a", "CPU, x86_64")) == {}
    assert list(PLAN.study(results, Origin("a", "CPU, x86_64")).runs()) == []


def keep(results: Path, run: Run, ours: Origin) -> None:
    row = {"part": run.part, "arm": run.arm, "seed": run.seed, "arguments": list(run.arguments)}
    found = {"validation": {"accuracy": 0.5}}
    append_line(results, {**row, "found": found, "script": ours.script, "with": {"device": ours.device}})


@pytest.mark.parametrize("other", [Origin("b", "CPU, x86_64"), Origin("a", "NVIDIA H100")])
def test_rows_of_another_script_or_device_are_not_read(other: Origin, tmp_path: Path) -> None:
    results, ours = tmp_path / "results.jsonl", Origin("a", "CPU, x86_64")
    run = Run("full", 1, ())
    keep(results, run, ours)
    keep(results, run, other)
    assert [runs.of_row(row) for _, row in read(results, ours)] == [ours]
    assert [runs.of_row(row) for _, row in read(results, other)] == [other]
    study = runs.Study({"full": ()}, (1,))
    assert runs.of_row(rows_of(study, results, ours)[1]["full"]) == ours
    assert len(runs.lines_of(results, other, runs.RUNS)) == 1


def test_a_run_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    results, ours = tmp_path / "results.jsonl", Origin("a", runs.origin(Path(__file__), "cpu").device)
    run = Run("full", 1, ())
    for one in (run, Run("full", 2, ()), run):
        keep(results, one, ours)
    with pytest.raises(ValueError, match=r"results\.jsonl has 2 lines of .*arm='full', seed=1"):
        rows_of(runs.Study({"full": ()}, (1,)), results, ours)
    found = CliRunner().invoke(app, ["bench", "results-classification", "--report", "--results", str(results)])
    assert found.exit_code == 2
    assert "has 2 lines of" in found.output.replace("\n", " ")


def test_the_last_origin_of_a_kind_of_device(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    assert runs.last_origin(results) is None
    cpu = runs.origin(Path(__file__), "cpu").device
    for one in (Origin("a", cpu), Origin("b", cpu), Origin("a", "NVIDIA H100")):
        keep(results, Run("full", 1, ()), one)
    assert runs.last_origin(results, "cpu") == Origin("b", cpu)
    assert runs.last_origin(results, "cuda") == Origin("a", "NVIDIA H100")


def test_another_script_is_run_anew_but_not_for_other_default_rates(stub: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    stub.write_text(f"LEARNING_RATES = {{'full': 1}}\n{STUB}")
    perform(stub, results, few())
    stub.write_text(f"LEARNING_RATES = {{\n 'full': 2\n}}\n{STUB}")
    perform(stub, results, few())
    assert len(calls(stub)) == 8
    stub.write_text(f"LEARNING_RATES = {{'full': 2}}\n{STUB}# changed\n")
    ours = perform(stub, results, few())
    assert len(calls(stub)) == 16
    assert len(read(results, ours)) == 8


def test_a_run_that_fails_is_said_and_what_ended_before_is_kept(stub: Path, tmp_path: Path) -> None:
    results, plan = tmp_path / "results.jsonl", few("--fail", "qlora", seeds=(1, 2))
    with pytest.raises(ExampleError, match=r"--method qlora.*no luck today"):
        perform(stub, results, plan)
    ours = origin(stub, "cpu")
    assert len(read(results, ours)) >= 4 + 6
    assert set(rows_of(plan.study(results, ours), results, ours)) == {1}  # whole seeds only


def test_what_runs_beside_a_failing_run_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is begun after it."""
    has_failed, begun = threading.Event(), []

    def do(script: Path, run: Run, device: str, threads: int) -> tuple[dict[str, str], str]:
        begun.append(run.arm)
        if run.arm == "fails":
            has_failed.set()
            raise ExampleError("no luck today")
        has_failed.wait(10)
        time.sleep(0.2)  # the other is known to have failed before this ends
        return {}, ""

    monkeypatch.setattr(runs, "_do", do)
    results, script = tmp_path / "results.jsonl", Path(__file__)
    arms = ("runs beside", "fails", *(f"waits {number}" for number in range(8)))
    with pytest.raises(ExampleError, match="no luck today"):
        runs.perform(script, [Run(arm, 1, ()) for arm in arms], results, workers=2)
    kept = [run.arm for run, _ in read(results, origin(script, "cpu"))]
    assert sorted([*kept, "fails"]) == sorted(begun)
    assert "runs beside" in kept
    assert len(begun) <= 3  # the failing one's worker may have taken the next before it was called off


def test_a_changed_row_is_found(stub: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    ours = perform(stub, results, few())
    results.write_text(results.read_text().replace("0.91", "0.95", 1))
    with pytest.raises(ValueError, match="was changed"):
        read(results, ours)
    found = CliRunner().invoke(app, ["bench", "results-classification", "--report", "--results", str(results)])
    assert found.exit_code == 2
    assert "was changed" in found.output


def test_the_table_is_of_the_rows(stub: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    assert report.markdown(results, PLAN) == ""
    ours = perform(stub, results)
    text = report.markdown(results, PLAN, ours)
    assert report.markdown(results, PLAN) == text
    # Of 100 texts 2 are lost with every seed: no variance of the seeds; that of the texts is Bernoulli's.
    line = next(line for line in text.splitlines() if line.startswith("| QLoRA"))
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[6:8] == ["-2.00", "0.00"]
    reach = stats.t.ppf(0.975, 99) * 100 * np.sqrt(0.02 * 0.98 / 100)
    low, high = map(float, cells[8].split(" to "))
    assert (low, high) == pytest.approx((-2 - reach, -2 + reach), rel=0.03)  # 10,000 draws: 0.7 % of a deviation
    assert cells[9:11] == ["1,234,567", "3.0"]
    assert "**Not decided**" in text
    assert "3 seeds: 1, 2, 3; 100 test texts" in text
    more = report.markdown(results, replace(PLAN, seeds=(1, 2, 3, 4, 5)), ours)
    assert "3 of 5 planned seeds: 1, 2, 3; 100 test texts" in more
    assert "QLoRA minus LoRA is -1.00 points of accuracy (95 % interval -3.00 to +1.00; it holds 0" in text
    full = next(line for line in text.splitlines() if line.startswith("| full"))
    assert f"{(91 + 92 + 90) / 3:.2f}" in full
    assert {line.count("|") for line in (line, full)} == {11}


def test_card_and_page_have_what_the_report_prints(stub: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    assert report.card(results, PLAN) == ""
    perform(stub, results)
    text, card = report.markdown(results, PLAN), report.card(results, PLAN)
    assert card.startswith("# Card of qlora 3\n")
    assert text in card
    page = tmp_path / "docs" / "text.md"
    page.parent.mkdir()
    page.write_text("# Page\n\n<!-- results -->\nold\n<!-- /results -->\n\nafter\n")
    for _ in range(2):  # again changes nothing
        written = pages.write("text", card, text, tmp_path)
        assert [path.read_text() for path in written] == [
            card,
            f"# Page\n\n<!-- results -->\n\n{text}\n\n<!-- /results -->\n\nafter\n",
        ]
    with pytest.raises(ValueError, match="<!-- results -->"):
        pages.document("# Page", text)


def test_page_card_and_rates_in_the_repository_are_those_of_the_committed_results() -> None:
    repository = Path(__file__).parents[2]
    results, card = repository / "results/text_classification.jsonl", repository / "model_cards/text_classification.md"
    page = (repository / "docs/text_classification.md").read_text(encoding="utf-8")
    ours, plan = runs.last_origin(results), classification.Plan()
    assert ours is not None
    assert len(rows_of(plan.study(results, ours), results, ours)) == len(plan.seeds) == 5
    assert pages.document(page, report.markdown(results, plan, ours)) == page
    assert report.card(results, plan, ours) == card.read_text(encoding="utf-8")
    chosen = plan.sweep.chosen(results, ours)
    assert {method: float(rate) for method, rate in chosen.items()} == real.LEARNING_RATES


@pytest.mark.parametrize(("qlora", "said"), [("0111", "-25.00"), ("1111", "+0.00")])
def test_the_price_of_nf4_is_a_difference_where_its_interval_leaves_0_out(qlora: str, said: str) -> None:
    rows = {
        seed: {arm: {"found": {"correct": 50 * right}} for arm, right in (("qlora", qlora), ("lora", "1111"))}
        for seed in range(3)
    }
    text = report._price(rows)
    assert f"QLoRA minus LoRA is {said} points" in text
    assert ("no difference is shown" in text) is (qlora == "1111")


def test_costs_are_medians_and_ratios(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    methods = {
        name: {
            "step_s": [factor, factor, 50.0],
            "memory": {"imports": 0, "resting": 0, "peak": int(factor * 2**30)},
            "loss": [0.5],
            "gradient_norm": [1.5],
            "dense_bytes": 2**21,
            "base_bytes": 2**20,
            "trained_parameters": 3,
        }
        for name, factor in (("full", 2.0), ("lora", 1.0), ("qlora", 1.5))
    }
    runs.keep(results, "cost", {"rounds": 3, "methods": methods}, Path(__file__), "cpu")
    text = report.markdown(results)
    assert "| QLoRA | 1.500 | 0.75 | 1,536 | 0.75 | 1.0 | 0.500 | 0.5000 | 1.5000 |" in text


class FakeStep:
    """Says whose turn it was."""

    turns: ClassVar[list[str]] = []

    def __init__(self, script: Path, method: str, rate: str, device: str) -> None:
        self.method, self.sizes = method, {"base_bytes": 1, "head": {}}

    def __call__(self, number: int) -> tuple[float, float]:
        self.turns.append(self.method)
        return 0.0, 0.0


def test_each_method_is_first_as_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeStep, "turns", [])
    monkeypatch.setattr(classification, "Step", FakeStep)
    monkeypatch.setattr(classification, "apart", lambda *arguments: {"peak": 1})
    found = classification.cost(Path(), "cpu", 6, dict.fromkeys(classification.COSTED, "1e-3"))
    counted = FakeStep.turns[3 * classification.WARMUP :]
    for place in range(3):
        assert sorted(counted[place::3]) == sorted(2 * classification.COSTED)
    assert {len(one["step_s"]) for one in found["methods"].values()} == {6}


def test_cost_batches_are_shuffled_and_the_longest_are_known(tmp_path: Path) -> None:
    examples = [{"input_ids": [0] * length} for length in range(1, 1001)]
    step = object.__new__(classification.Step)
    step.take(examples, 10)
    assert [len(one["input_ids"]) for one in step.longest] == list(range(991, 1001))
    lengths = [len(one["input_ids"]) for one in step.examples]
    assert sorted(lengths) == list(range(1, 1001))
    # A batch of ten has a mean of 500 ± 91 (289 / √10, one deviation), not of 5.
    assert abs(np.mean(lengths[:10]) - 500) < 4 * 91


@pytest.mark.parametrize(
    ("options", "said"), [(("--device", "cuda"), "sees no GPU"), (("--device", "tpu"), "not known")]
)
def test_a_device_that_is_not_there_is_one_sentence(
    options: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    arguments = ["bench", "results-classification", "--results", str(tmp_path / "results.jsonl"), *options]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 2
    assert said in found.output


def test_without_a_checkout_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runs.hf_qlora, "__file__", str(tmp_path / "hf_qlora" / "__init__.py"))
    arguments = ["bench", "results-classification", "--results", str(tmp_path / "results.jsonl")]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 2
    assert "checkout" in found.output


def test_an_example_is_imported_by_its_path(stub: Path) -> None:
    stub.write_text(json.dumps({"a": 1}).join(("value = ", "\n")))
    assert runs.imported(stub).value == {"a": 1}


@pytest.mark.parametrize("command", ["results-classification", "results-generation"])
def test_a_quick_run_is_not_written_into_the_repository(command: str) -> None:
    done = CliRunner().invoke(app, ["bench", command, "--quick", "--write"])
    assert done.exit_code == 2
    assert "leave out --quick" in done.output

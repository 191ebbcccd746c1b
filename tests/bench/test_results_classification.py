"""The tables of the examples: resumable, sealed, paired; a stub plays the example."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from hf_qlora.bench.examples import classification, runs
from hf_qlora.bench.examples import classification_report as report
from hf_qlora.bench.examples.runs import ExampleError, Study, perform, read, rows_of
from hf_qlora.bench.examples.statistics import Mean, mean_of, non_inferior, paired
from hf_qlora.cli import app


STUB = """
import argparse, json, os, pathlib, sys
parser = argparse.ArgumentParser()
for name in ("method", "seed", "output", "json", "fail"):
    parser.add_argument("--" + name)
options = parser.parse_args()
count = pathlib.Path(__file__).with_name("calls.txt")
with count.open("a") as file:
    file.write(f"{options.method} {options.seed}\\n")
if options.fail == options.method and options.seed == "2":
    sys.exit("no luck today")
seed = int(options.seed)
accuracy = {"full": 0.9, "lora": 0.898, "qlora": 0.897, "adaptive-depth": 0.899}[options.method] + 0.001 * (seed % 3)
accuracy += 0.0004 * seed * (options.method == "qlora")
output = pathlib.Path(options.output)
output.mkdir()
(output / "README.md").write_text(f"# Card of {options.method}\\n")
found = {"test": {"accuracy": accuracy, "macro_f1": accuracy - 0.01, "loss": 0.3}, "correct": "01" * 50,
         "validation": {"accuracy": accuracy}, "settings": {"steps": 3}, "trained_parameters": 1234567,
         "saved_bytes": 3 * 2**20}
pathlib.Path(options.json).write_text(json.dumps(found))
"""


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    path = tmp_path / "stub.py"
    path.write_text(STUB)
    return path


def study(stub: Path, *arguments: str, seeds: tuple[int, ...] = (1, 2)) -> Study:
    arms = {method: ("--method", method) for method in classification.METHODS}
    return Study(stub, arms, seeds, arguments)


def calls(stub: Path) -> list[str]:
    file = stub.with_name("calls.txt")
    return file.read_text().splitlines() if file.is_file() else []


def test_seeds_are_outside_and_nothing_is_done_twice(stub: Path, tmp_path: Path) -> None:
    results = tmp_path / "deep" / "results.jsonl"
    perform(study(stub), results)
    assert calls(stub) == [f"{method} {seed}" for seed in (1, 2) for method in classification.METHODS]
    perform(study(stub), results)
    assert len(calls(stub)) == 8
    perform(study(stub, seeds=(1, 2, 3)), results, workers=2)
    assert len(calls(stub)) == 12
    assert {row["with"]["code"] for _, row in read(results)}


def test_a_run_that_fails_is_said_and_what_ended_before_is_kept(stub: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    with pytest.raises(ExampleError, match=r"--method qlora.*no luck today"):
        perform(study(stub, "--fail", "qlora"), results)
    assert len(read(results)) >= 6
    assert set(rows_of(study(stub, "--fail", "qlora"), results)) == {1}  # whole seeds only


def test_a_changed_row_is_found(stub: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    perform(study(stub, seeds=(1,)), results)
    results.write_text(results.read_text().replace("0.901", "0.951", 1))
    with pytest.raises(ValueError, match="was changed"):
        read(results)
    found = CliRunner().invoke(app, ["bench", "results-classification", "--report", "--results", str(results)])
    assert found.exit_code == 2
    assert "was changed" in found.output


def test_the_interval_is_scipys() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(0.9, 0.01, 7), rng.normal(0.9, 0.01, 7)
    found = paired(list(first), list(second))
    expected = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9)  # the same in fp64
    assert found.mean == pytest.approx(float(np.mean(first - second)), rel=1e-12)
    assert math.isnan(mean_of([0.5]).low)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(-0.4, 0.1, True), (-0.6, 0.1, False), (0.1, 0.2, True), (-2.0, -1.0, False), (math.nan, math.nan, None)],
)
def test_non_inferior_is_what_the_interval_says(low: float, high: float, expected: bool | None) -> None:
    assert non_inferior(Mean(5, (low + high) / 2, 1.0, low, high), 0.5) is expected


def test_the_table_is_of_the_rows(stub: Path, tmp_path: Path) -> None:
    results, ours = tmp_path / "results.jsonl", study(stub, seeds=(1, 2, 3))
    assert report.markdown(results, ours) == ""
    perform(ours, results)
    text = report.markdown(results, ours)
    differences = [100 * (-0.003 + 0.0004 * seed) for seed in (1, 2, 3)]
    low, high = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    line = next(line for line in text.splitlines() if line.startswith("| QLoRA"))
    assert f"| {np.mean(differences):+.2f} | {low:+.2f} to {high:+.2f} | 1,234,567 | 3.0 |" in line
    assert f"{100 * 0.901:.2f}" in text  # full fine-tuning's mean: 0.9 and, on average, 0.001
    assert ("**Shown**" in text) == (low > -0.5)
    full = next(line for line in text.splitlines() if line.startswith("| full"))
    assert {line.count("|") for line in (line, full)} == {10}


@pytest.mark.parametrize(("shift", "word"), [(0.0, "**Shown**"), (0.004, "**Not shown**"), (0.02, "worse by more")])
def test_the_verdict_hides_nothing(shift: float, word: str) -> None:
    def row(accuracy: float) -> dict[str, object]:
        return {"found": {"test": {"accuracy": accuracy}}}

    wobble = (-0.001, 0.0, 0.001, 0.002, -0.002)
    rows = {i: {"full": row(0.9), "qlora": row(0.9 - shift + w)} for i, w in enumerate(wobble)}
    assert word in report.verdict(rows)


def test_card_and_page_have_what_the_report_prints(stub: Path, tmp_path: Path) -> None:
    results, ours = tmp_path / "results.jsonl", study(stub)
    page = "# Page\n\n<!-- results -->\nold\n<!-- /results -->\n\nafter\n"
    assert report.card(results, ours) == ""
    assert report.document(results, page, ours) == page
    perform(ours, results)
    text = report.markdown(results, ours)
    assert report.card(results, ours).startswith("# Card of qlora\n")
    assert text in report.card(results, ours)
    made = report.document(results, page, ours)
    assert text in made
    assert "old" not in made
    assert made.endswith("\nafter\n")
    assert report.document(results, made, ours) == made
    with pytest.raises(ValueError, match="<!-- results -->"):
        report.document(results, "# Page", ours)


def test_page_and_card_in_the_repository_are_those_of_the_committed_results() -> None:
    repository = Path(__file__).parents[2]
    results, card = repository / "results/text_classification.jsonl", repository / "model_cards/text_classification.md"
    text = (repository / "docs/text_classification.md").read_text(encoding="utf-8")
    assert report.document(results, text) == text
    assert report.card(results) == (card.read_text(encoding="utf-8") if card.is_file() else "")


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
    runs.keep(results, "cost", {"rounds": 3, "methods": methods}, "cpu")
    text = report.markdown(results)
    assert "| QLoRA | 1.500 | 0.75 | 1,536 | 0.75 | 1.0 | 0.500 | 0.5000 | 1.5000 |" in text


def test_without_a_checkout_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runs.hf_qlora, "__file__", str(tmp_path / "hf_qlora" / "__init__.py"))
    arguments = ["bench", "results-classification", "--results", str(tmp_path / "results.jsonl")]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 2
    assert "checkout" in found.output


def test_an_example_is_imported_by_its_path(stub: Path) -> None:
    stub.write_text(json.dumps({"a": 1}).join(("value = ", "\n")))
    assert runs.imported(stub).value == {"a": 1}

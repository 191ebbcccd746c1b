"""The results of text generation: which runs there are, which rates are taken, and what the tables say of rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from scipy import stats
from typer.testing import CliRunner

from hf_qlora.bench.examples import generation
from hf_qlora.bench.examples.runs import RUNS, Run
from hf_qlora.bench.results import append_line
from hf_qlora.cli import app


ROOT = Path(__file__).parents[2]
PLAN = generation.Plan(seeds=(1, 2, 3))
WITH = {"device": "CPU, x86_64", "capability": "", "threads": 2, "torch": "2", "peft": "0", "bitsandbytes": "0"}
WITH |= {"date": "2026-01-01", "hf-qlora": "0.1.0", "transformers": "5", "code": "abc"}
PERPLEXITY = {"full": (7.0, 7.2, 7.1), "lora": (7.5, 7.6, 7.4), "qlora": (8.0, 8.3, 8.1)}


def keep(file: Path, run: Run, perplexity: float, exact: float = 30.0) -> None:
    stage = {"perplexity": perplexity, "bleu": 20.0, "exact_match": exact}
    found: dict[str, Any] = dict.fromkeys(("trained", "merged"), stage)
    found |= {"base": {"perplexity": 28.0, "bleu": 0.5, "exact_match": 0.0}, "nf4": {"perplexity": 45.0}}
    found |= {"trained_parameters": 4_884_480, "base_parameters": 134_515_008, "saved_bytes": 19_600_000}
    found |= {"weight_bytes": {"base": 269_000_000, "training": 131_500_000, "nf4": 112_000_000}}
    row = {"part": run.part, "arm": run.arm, "seed": run.seed, "arguments": list(run.arguments)}
    append_line(file, {**row, "found": found, "card": f"# {run.arm} {run.seed}\n", "with": WITH})


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Of a sweep in which the third rate is the best, and of three seeds."""
    file = tmp_path / "results.jsonl"
    for run in generation.sweep(PLAN):
        keep(file, run, 9.0 - (run.arguments[-4] == PLAN.rates[run.arm][2]))
    for run in generation.study(PLAN, file).runs():
        keep(file, run, PERPLEXITY[run.arm][run.seed - 1])
    return file


def test_each_method_takes_its_best_rate(results: Path) -> None:
    assert generation.chosen_rates(PLAN, results) == {name: rates[2] for name, rates in PLAN.rates.items()}
    runs = list(generation.study(PLAN, results).runs())
    assert [(run.seed, run.arm) for run in runs[:4]] == [(1, "full"), (1, "lora"), (1, "qlora"), (2, "full")]
    assert {run.part for run in runs} == {RUNS}
    assert all("validation" not in run.arguments for run in runs)
    assert all(run.arguments[-3:] == ("--split", "validation", "--brief") for run in generation.sweep(PLAN))


def test_differences_are_paired_by_seed(results: Path) -> None:
    differences = [one - other for one, other in zip(PERPLEXITY["qlora"], PERPLEXITY["full"], strict=True)]
    mean = sum(differences) / 3
    low, high = stats.t.interval(0.95, 2, mean, stats.sem(differences))
    assert f"{mean:+.3f} | {low:+.3f} to {high:+.3f}" in generation.markdown(results, PLAN)


def test_a_seed_that_is_not_whole_is_left_out(results: Path) -> None:
    lines = results.read_text().splitlines(keepends=True)
    results.write_text("".join(lines[:-1]))
    text = generation.markdown(results, PLAN)
    assert "| QLoRA | 2 |" in text
    assert "| full fine-tuning | 2 |" in text


@pytest.mark.parametrize(("qlora", "shown"), [((30.0, 30.1, 29.9), "is non"), ((30.0, 25.0, 28.0), "is not shown")])
def test_the_verdict_is_by_the_interval(qlora: tuple[float, ...], shown: str, tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    for run in generation.sweep(PLAN):
        keep(file, run, 9.0)
    for run in generation.study(PLAN, file).runs():
        keep(file, run, 8.0, qlora[run.seed - 1] if run.arm == "qlora" else 30.0)
    assert f"By exact match QLoRA {shown}" in generation.markdown(file, PLAN)


def test_bytes_and_parameters(results: Path) -> None:
    text = generation.markdown(results, PLAN)
    assert "| QLoRA | 4,884,480 | 3.63 % | 131.5 | 19.6 |" in text
    assert "2.40 times less" in text


def test_the_pages_have_the_first_seeds_card_and_the_tables(results: Path, tmp_path: Path) -> None:
    page = tmp_path / "docs.md"
    page.write_text(f"before {generation.BEGIN} old {generation.END} after", encoding="utf-8")
    for _ in range(2):  # again changes nothing
        generation.write_pages(results, tmp_path / "cards", page, PLAN)
        text = page.read_text(encoding="utf-8")
        assert text.startswith("before <")
        assert text.endswith("> after")
        assert "old" not in text
        assert text.count(generation.markdown(results, PLAN)) == 1
    card = (tmp_path / "cards" / "text_generation.md").read_text(encoding="utf-8")
    assert card.startswith("# qlora 1\n")
    assert generation.markdown(results, PLAN) in card


def test_without_runs_there_is_nothing(tmp_path: Path) -> None:
    assert generation.markdown(tmp_path / "none.jsonl") == ""
    assert generation.card(tmp_path / "none.jsonl") == ""


def test_a_changed_file_and_no_gpu_are_one_sentence(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results.write_text(results.read_text().replace("28.0", "27.0"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for options, said in ((("--report", "--results", str(results)), "was changed"), (("--device", "cuda"), "no GPU")):
        ended = CliRunner().invoke(app, ["bench", "results-generation", *options])
        assert ended.exit_code == 2
        assert said in ended.output


def test_what_is_committed_is_what_was_measured() -> None:
    """The card, the table in the docs and the example's rates, where there are results."""
    file = ROOT / "results" / "text_generation.jsonl"
    text = generation.markdown(file)
    if text:
        assert (ROOT / "model_cards" / "text_generation.md").read_text(encoding="utf-8") == generation.card(file)
        assert text in (ROOT / "docs" / "text_generation.md").read_text(encoding="utf-8")
        rates = {name: float(rate) for name, rate in generation.chosen_rates(generation.Plan(), file).items()}
        assert generation_rates() == pytest.approx(rates)
    assert not math.isnan(sum(generation_rates().values()))


def generation_rates() -> dict[str, float]:
    import text_generation

    return dict(text_generation.RATES)

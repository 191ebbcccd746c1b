"""Curves are of the same batches from the same start, kept run by run, and compared in pairs."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hf_qlora.bench.results import append_line, read_lines
from hf_qlora.bench.train_step import curves
from hf_qlora.bench.train_step.arms import CHUNKED, DOCUMENTED, TUNED, Case
from hf_qlora.cli import app


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights and tokens in the place of real ones."""
    torch.set_num_threads(1)
    tiny = functools.partial(Case, "tiny", 2, 8, 2, learning_rate=1e-2)
    monkeypatch.setattr(curves, "SmolLM2", tiny)
    monkeypatch.setattr(curves.FourAnswers, "batches", lambda self, seed, n: [batch(seed, i) for i in range(n)])


def batch(seed: int, number: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 512, (2, 8), generator=torch.Generator().manual_seed(1000 * seed + number))
    return {"input_ids": ids, "labels": ids}


def test_runs_are_resumed_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "new" / "curves.jsonl"
    curves.perform(results, 3, seeds=(1,))
    monkeypatch.setattr(curves, "SEEDS", (1,))
    rows = read_lines(results)
    assert [(row["arm"], row["seed"]) for row in rows] == [(arm, 1) for arm in (DOCUMENTED, TUNED, CHUNKED)]
    first, *others = (row["losses"] for row in rows)
    for losses in others:
        assert losses == pytest.approx(first, abs=0.05)  # bfloat16 at a loss of log 512
    assert len(set(first)) == 3
    assert all(norm > 0 for row in rows for norm in row["gradient_norms"])
    monkeypatch.setattr(curves, "_run", lambda *args: pytest.fail("done already"))
    curves.perform(results, 3, seeds=(1,))


def test_rows_of_another_device_are_refused(tmp_path: Path) -> None:
    results = tmp_path / "curves.jsonl"
    append_line(results, {"arm": TUNED, "seed": 1, "steps": 2, "losses": [], "with": {"device": "NVIDIA H200"}})
    with pytest.raises(ValueError, match="has rows of NVIDIA H200"):
        curves.perform(results, 2)
    found = CliRunner().invoke(app, ["bench", "learning-curve", "--results", str(results)])
    assert found.exit_code == 2
    assert "has rows of NVIDIA H200" in found.output.replace("\n", " ")


def test_a_run_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    results = tmp_path / "curves.jsonl"
    for losses in ([1.0, 1.0], [2.0, 2.0]):
        append_line(results, {"arm": TUNED, "seed": 1, "steps": 2, "losses": losses, "with": {"device": "cpu"}})
    with pytest.raises(ValueError, match="2 lines of"):
        curves.markdown(results)


def test_the_table_is_of_paired_differences(tmp_path: Path) -> None:
    results = tmp_path / "curves.jsonl"
    for seed in (1, 2, 3):
        for arm, shift in ((DOCUMENTED, 0.0), (TUNED, 0.1 * seed), (CHUNKED, -0.2)):
            losses = [seed + shift, seed + shift]
            append_line(results, {"arm": arm, "seed": seed, "steps": 2, "losses": losses})
    table = curves.markdown(results, last=1)
    # differences 0.1, 0.2, 0.3: t = 2√3 with 2 degrees of freedom, of which a table says p = 0.074
    assert f"| {TUNED} − {DOCUMENTED} | 3 | +0.2000 | +0.2000 | 0.07 | 0.2000 |" in table
    assert f"| {CHUNKED} − {DOCUMENTED} | 3 | -0.2000 | -0.2000 |" in table
    done = CliRunner().invoke(app, ["bench", "learning-curve", "--report", "--results", str(results)])
    assert "difference" in done.output
    empty = CliRunner().invoke(app, ["bench", "learning-curve", "--report", "--results", str(tmp_path / "none")])
    assert (empty.exit_code, empty.output) == (
        2,
        f"Error: {tmp_path / 'none'} is not there; leave out --report to measure.\n",
    )

"""The bench of calibrated NF4 does what it is asked, once, and its tables say what was found."""

from __future__ import annotations

import itertools
import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hf_qlora.bench.calibrated_nf4 import data, models, parts, report, run
from hf_qlora.bench.results import append_line
from hf_qlora.cli import app


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def _rows(tensor: torch.Tensor) -> set[tuple[int, ...]]:
    return {tuple(row.tolist()) for row in tensor}


def test_rows_to_train_calibrate_and_test_on_are_of_different_texts() -> None:
    calibration = data.calibration_rows("chats", 8)
    others = _rows(data.training_rows()) | _rows(data.test_rows("chats"))
    assert not _rows(calibration.inputs["input_ids"]) & others
    chats = data._chats("train")
    half = len(chats) // 2
    asked = [{chat[0]["content"] for chat in part} for part in (chats[:half], chats[half:], data._chats("test"))]
    # Some tasks have the same prompt twice in their training rows; none of the test rows is among them.
    assert not asked[2] & (asked[0] | asked[1])
    headlines = data.calibration_rows("headlines", 8, seed=1)
    assert not _rows(headlines.inputs["input_ids"]) & _rows(data.test_rows("headlines"))


def test_one_chat_of_those_calibrated_on_may_be_trained_on() -> None:
    """As the docstrings say: the data has some twice. Counted over the chats that the rows begin with."""
    chats = data._chats("train")
    half = len(chats) // 2
    trained = chats[:half][: _count(chats[:half], data.TRAINING_ROWS)]
    for seed in run.Plan().seeds:
        drawn = random.Random(seed).sample(chats[half:], half)
        drawn = drawn[: _count(drawn, run.Plan().rows + data.HELD_OUT)]
        assert 130 <= len(drawn) <= 140
        assert sum(chat in trained for chat in drawn) <= 1


def _count(chats: list[Any], rows: int) -> int:
    """How many chats so many rows are of."""
    lengths = itertools.accumulate(map(len, data._tokens(chats)))
    return next(number for number, length in enumerate(lengths, 1) if length >= rows * data.LENGTH)


class NoLoss(torch.nn.Module):
    pass


def test_what_could_not_be_measured_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "mean_loss", lambda *given: None)
    monkeypatch.setattr(data, "test_rows", lambda domain: torch.zeros(2, 2))
    with pytest.raises(RuntimeError, match="NoLoss gave no loss on the test rows of chats"):
        models.losses(NoLoss())
    with pytest.raises(RuntimeError, match="no report of its calibration"):
        parts._calibrated(NoLoss(), None)


@pytest.mark.slow
def test_runs_are_done_once_and_told(tmp_path: Path) -> None:
    results = tmp_path / "runs.jsonl"
    plan = replace(run.QUICK, amounts=(2,))
    parts = ("merge", "base", "loftq", "trained", "rows", "caps", "methods", "commands")
    run.perform(plan, results, parts)
    lines = results.read_text().splitlines()
    assert list(dict.fromkeys(json.loads(line)["part"] for line in lines)) == list(parts)
    run.perform(plan, results, parts)
    assert results.read_text().splitlines() == lines
    told = report.markdown(results)
    for text in (
        "PEFT's merge",
        "| calibrated |",
        "calibrated, headlines",
        "LoftQ",
        "the default",
        "rows of 256 tokens",
        "| merge | 2 |",
    ):
        assert text in told
    report.plot(results, tmp_path / "runs.png")
    assert (tmp_path / "runs.png").stat().st_size > 10_000


def _found(loss: float, **more: Any) -> dict[str, Any]:
    return {"loss": {"chats": loss, "headlines": 5.0}, **more}


def test_the_share_that_is_kept_and_the_share_that_is_closed(tmp_path: Path) -> None:
    arms = {
        name: _found(loss, exact=0.25, samples=[["said", "expected"]])
        for name, loss in {"unmerged": 2.0, "base": 3.0, "calibrated, chats": 2.1}.items()
    }
    bases = {"dense": _found(2.5), "nearest": _found(3.0), "calibrated, chats": _found(2.6)}
    for base in bases.values():
        base["loss"]["headlines"] = base["loss"]["chats"]
    rows = [
        {"part": "merge", "settings": {"seed": 0}, "found": {"arms": arms}},
        {"part": "base", "settings": {"seed": 0}, "found": bases},
        *(
            {
                "part": "trained",
                "settings": {"seed": seed, "base": base},
                "found": _found(loss + seed / 10, before={"chats": 3.0}),
            }
            for base, loss in (("calibrated", 1.75), ("dense", 1.5))
            for seed in (0, 1)
        ),
    ]
    both = {"unmerged": _found(2.0), "base": _found(3.0), "dense": _found(2.5)}
    for base in both.values():
        base["loss"]["headlines"] = base["loss"]["chats"]
    for cap, loss in ((None, 2.2), (3.0, 2.1)):
        for seed in (0, 1):
            calibrated = {"calibrated": bases["calibrated, chats"], "merged": _found(loss - seed / 10)}
            settings = {"seed": seed, "rows": 8, "cap": cap}
            rows.append({"part": "caps", "settings": settings, "found": both | calibrated})
    results = tmp_path / "runs.jsonl"
    for row in rows:
        append_line(results, row | {"with": MADE})
    told = report.markdown(results)
    closed = "2.600 (2.600 to 2.600) | 80% (80% to 80%)"
    assert f"| 8 | none | 85.0% (80.0% to 90.0%) | {closed} | {closed} |" in told
    assert f"| 8 | 3 | 95.0% (90.0% to 100.0%) | {closed} | {closed} |" in told
    assert "| calibrated, chats | 2.100 | 90.0% | 25.0% | 5.000 |" in told
    assert "| calibrated, chats | 2.600 | 80% | 2.600 | 80% |" in told
    ranges = "| 3.000 (3.000 to 3.000) | 1.800 (1.750 to 1.850) | +0.250 (+0.250 to +0.250) |"
    assert f"| calibrated {ranges} 5.000 (5.000 to 5.000) | +0.000 (+0.000 to +0.000) |" in told


MADE = dict.fromkeys(("device", "torch", "transformers", "peft", "bitsandbytes", "code", "date"), "x")


def test_a_run_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    results = tmp_path / "runs.jsonl"
    for seed in (0, 1, 0):
        append_line(results, {"part": "loftq", "settings": {"seed": seed}, "found": {}, "with": MADE})
    with pytest.raises(ValueError, match=r"runs\.jsonl has 2 lines of Run\(part='loftq', settings=\(\('seed', 0\)"):
        run.read(results)
    found = CliRunner().invoke(app, ["bench", "calibrated-nf4", "--report", "--results", str(results)])
    assert found.exit_code == 2
    assert "has 2 lines of" in found.output


def test_rows_are_not_added_to_those_of_another_device(tmp_path: Path) -> None:
    """Not even where there is nothing left to do."""
    results = tmp_path / "runs.jsonl"
    for one in run.planned(run.QUICK, ("loftq",)):
        row = {"part": one.part, "settings": dict(one.settings), "found": {}}
        append_line(results, {**row, "with": MADE | {"device": "NVIDIA H200"}})
    before = results.read_text()
    said = rf"runs\.jsonl has rows of NVIDIA H200; those of {run.made_with('cpu')['device']} .*--results OTHER"
    with pytest.raises(ValueError, match=said):
        run.perform(run.QUICK, results, ("loftq",))
    found = CliRunner().invoke(app, ["bench", "calibrated-nf4", "--part", "loftq", "--results", str(results)])
    assert found.exit_code == 2
    assert re.search(said, found.output.replace("\n", " "))
    assert results.read_text() == before


def test_an_unknown_part_is_named() -> None:
    result = CliRunner().invoke(app, ["bench", "calibrated-nf4", "--part", "merging"])
    assert result.exit_code == 2
    assert "merging" in result.output

"""The lines through costs are those of a formula, and each axis varies what it is called by, and nothing else."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hf_qlora.bench.train_step import growth
from hf_qlora.bench.train_step.arms import CHUNKED, FLOOR, Case
from hf_qlora.cli import app


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_a_line_is_that_of_the_normal_equations() -> None:
    values, costs = [1.0, 2.0, 4.0], [3.0, 4.0, 9.0]
    mean_x, mean_y = 7 / 3, 16 / 3
    xx = sum((x - mean_x) ** 2 for x in values)
    xy = sum((x - mean_x) * (y - mean_y) for x, y in zip(values, costs, strict=True))
    yy = sum((y - mean_y) ** 2 for y in costs)
    found = growth.line(values, costs)
    # three points in float64
    assert found.slope == pytest.approx(xy / xx, rel=1e-12)
    assert found.fixed == pytest.approx(mean_y - xy / xx * mean_x, rel=1e-12)
    assert found.r_squared == pytest.approx(xy**2 / (xx * yy), rel=1e-12)


@pytest.mark.parametrize("name", growth.AXES)
def test_an_axis_varies_one_thing(name: str) -> None:
    case = Case(shape="tiny", batch_size=2, sequence_length=8, rank=4)
    for value in growth.AXES[name].values["tiny"]:
        there = growth._at(case, name, value)
        changed = {key for key, was in asdict(case).items() if asdict(there)[key] != was}
        assert changed <= {growth.AXES[name].field, *(["batch_size"] if name == "tokens" else [])}
        assert value in (there.tokens, there.rank, there.layers, there.adapters)
        if name == "tokens":
            assert there.tokens == value


def test_the_command_writes_what_it_prints(tmp_path: Path) -> None:
    results = tmp_path / "growth.json"
    options = [
        "--shape",
        "tiny",
        "--rounds",
        "1",
        "--axis",
        "adapters",
        "--sequence-length",
        "8",
        "--rank",
        "2",
        "--dtype",
        "float32",
    ]
    done = CliRunner().invoke(app, ["bench", "growth", *options, "--results", str(results)])
    assert done.exit_code == 0, done.output
    found = json.loads(results.read_text())
    assert [point["value"] for point in found["axes"]["adapters"]] == [1, 2]
    for point in found["axes"]["adapters"]:
        assert point["arms"].keys() == {CHUNKED, FLOOR}
        assert all(arm["peak"] > 0 and arm["gradient_norm"] > 0 for arm in point["arms"].values())
    assert results.with_suffix(".png").stat().st_size > 1000
    assert growth.markdown(found) in done.output
    assert "tiny in float32, " in done.output
    again = CliRunner().invoke(app, ["bench", "growth", "--report", "--results", str(results)])
    assert again.output.strip() == growth.markdown(found)


def test_what_was_interrupted_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(shape="tiny", batch_size=1, sequence_length=8, rank=2)
    kept: list[str] = []

    def keep(result: dict[str, Any]) -> None:
        kept.append(json.dumps(result))
        if len(kept) == 1:
            raise KeyboardInterrupt

    measured: list[Case] = []
    point = {"step_s": [1.0], "peak": 1, "loss": 1.0, "gradient_norm": 1.0}
    monkeypatch.setattr(growth, "_point", lambda at, *_: measured.append(at) or dict.fromkeys(growth.ARMS, point))
    with pytest.raises(KeyboardInterrupt):
        growth.measure(case, 1, ("rank",), keep=keep)
    whole = growth.measure(case, 1, ("rank",), json.loads(kept[-1]), keep)
    assert [at.rank for at in measured] == [2, 4]
    assert [one["value"] for one in whole["axes"]["rank"]] == [2, 4]
    growth.measure(case, 2, ("rank",), whole)  # other rounds: measured anew
    assert [at.rank for at in measured] == [2, 4, 2, 4]


@pytest.mark.parametrize(
    ("options", "said"), [(["--shape", "huge"], "choose from"), (["--axis", "time"], "choose from")]
)
def test_misuse_is_explained(options: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["bench", "growth", *options])
    assert done.exit_code == 2
    assert said in done.output

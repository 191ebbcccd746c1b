"""All modes compute the same, and the command writes what it prints."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hf_qlora.bench.train_step import checkpointing
from hf_qlora.cli import app


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_the_command_writes_what_it_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpointing, "apart", lambda function, *args: function(*args))  # seconds for each process
    results = tmp_path / "checkpointing.json"
    done = CliRunner().invoke(app, ["bench", "checkpointing", "--quick", "--results", str(results)])
    assert done.exit_code == 0, done.output
    found = json.loads(results.read_text())
    losses = {arm["loss"] for arm in found["arms"].values()}
    norms = [arm["gradient_norm"] for arm in found["arms"].values()]
    assert len(found["arms"]) == 7
    # float32 sums over the tokens of chunks, in bfloat16 products
    assert max(losses) - min(losses) < 1e-3
    assert min(norms) > 0
    assert max(norms) - min(norms) < 1e-2 * max(norms)
    assert len({arm["loss"] for name, arm in found["arms"].items() if "chunks" not in name}) == 1
    assert results.with_suffix(".png").stat().st_size > 1000
    assert checkpointing.markdown(found) in done.output
    again = CliRunner().invoke(app, ["bench", "checkpointing", "--report", "--results", str(results)])
    assert again.output.strip() == checkpointing.markdown(found)


def test_less_is_kept_by_each_mode() -> None:
    """By what autograd holds of layers, in a tiny model with eight layers; the peaks of so small a model are noise."""
    case = replace(checkpointing.CASES["cpu"], shape="tiny", layers=8, batch_size=2, sequence_length=64)
    step = checkpointing._start(case)
    kept = checkpointing._kept_bytes(step)
    held = {}
    for name, settings in checkpointing._arms(kept, 16).items():
        sizes: dict[int, int] = {}
        alive = []

        def pack(
            tensor: torch.Tensor, sizes: dict[int, int] = sizes, alive: list[torch.Tensor] = alive
        ) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor.detach())
            return tensor.detach()

        checkpointing.enable_checkpointing(step.model, **settings)
        step(case.batch(0))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            step.model(**case.batch(0)).loss.backward()  # within hooks layers are measured anew
            sizes.clear()
            step.model(**case.batch(0))
        held[name] = sum(sizes.values())
    assert held["none"] > held["budget, 50 %"] > held["budget, 25 %"] > held["full"]
    assert held["none"] > held["chunks of 16 alone"] > held["full"]


def test_misuse_is_explained() -> None:
    done = CliRunner().invoke(app, ["bench", "checkpointing", "--device", "tpu"])
    assert done.exit_code == 2
    assert "choose from" in done.output

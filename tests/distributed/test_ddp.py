"""Two processes under DistributedDataParallel train as one does with the batches of both, and one of them saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.runs import CONFIGS, adapters, base, in_processes, plain_loop, trained
from peft import PeftModel


# Under the last two DDP clones all outputs, with a node of its own, on whose backward a static graph relies.
DDP: dict[str, dict[str, bool]] = {
    "plain": {},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
}
LOOPS = {
    **{f"loop-{kind}": (kind, {}) for kind in CONFIGS},
    "loop-depth-unused": ("depth", DDP["unused"]),
    **{f"loop-nf4-{name}-own": ("nf4", {"own_loss": True, **DDP[name]}) for name in DDP},
}
RUNS = [*LOOPS, *(f"trainer-{kind}" for kind in CONFIGS)]


def all_runs(folder: Path) -> dict[str, dict[str, Any]]:
    loops = {name: plain_loop(kind, **options) for name, (kind, options) in LOOPS.items()}
    return loops | {f"trainer-{kind}": trained(kind, folder) for kind in CONFIGS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ddp")


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, dict[str, Any]]]:
    return in_processes(all_runs, folder)


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, dict[str, Any]]:
    return all_runs(folder)


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_equal_one_with_twice_the_batch(run: str, one: Any, two: Any) -> None:
    expected = one[run]
    for found in (process[run] for process in two):
        assert found["started"].keys() == expected["started"].keys()
        for name, tensor in expected["adapters"].items():
            moved = (tensor - expected["started"][name]).abs().max().item()
            assert moved > 0, name
            # the sum over the rows in another order, and each step's rounding of the parameter; the mean of the two
            # processes' means, or one of them alone, would be off by a tenth of it and more
            rounding = len(expected["losses"]) * 2**-24 * tensor.abs().max().item()
            torch.testing.assert_close(found["adapters"][name], tensor, rtol=0, atol=1e-4 * moved + rounding)
        # sums of a few thousand float32 terms in another order
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)


@pytest.mark.parametrize("run", [run for run in RUNS if "depth" in run])
def test_processes_observe_the_attention_that_one_observes(run: str, one: Any, two: Any) -> None:
    expected = one[run]["averages"]
    assert expected
    assert all(observed[2] == 3 for observed in expected.values())
    for found in (process[run]["averages"] for process in two):
        for name, observed in expected.items():
            # entropies of weights that moved by less than 1e-4 of their way, and float32 sums
            torch.testing.assert_close(found[name], observed, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_first_process_alone_saves_what_both_have(kind: str, two: Any) -> None:
    first, second = (process[f"trainer-{kind}"] for process in two)
    assert not list(second["folder"].rglob("*.safetensors"))
    assert not list(second["folder"].rglob("adapter_config.json"))
    for place in ("adapter", "checkpoint-3"):
        loaded = PeftModel.from_pretrained(base(), str(first["folder"] / place), is_trainable=True)
        for process in (first, second):
            for name, tensor in adapters(loaded).items():
                # folded on saving and divided on loading, each a rounding of float32
                torch.testing.assert_close(tensor, process["adapters"][name], rtol=3 * 2**-24, atol=0)

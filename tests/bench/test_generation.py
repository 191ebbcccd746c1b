"""The arms are what they are called and generate the same; the table says what the file has."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from peft.tuners.lora import LoraLayer
from typer.testing import CliRunner

from hf_qlora.bench.generation import report, run
from hf_qlora.bench.generation.arms import (
    ARMS,
    DENSE,
    FAST,
    FAST_LORA,
    LORA,
    MERGED,
    NF4,
    STOCK,
    STOCK_LORA,
    Bases,
    Generation,
    possible,
)
from hf_qlora.cli import app
from hf_qlora.quant import generation
from hf_qlora.quant.linear4bit import Linear4bit


TINY = Generation(shape="tiny", rank=4, sequence_length=5, new_tokens=6)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_arms_are_what_they_are_called() -> None:
    bases = Bases(TINY)
    kinds = {}
    for name, arm in ARMS.items():
        modules = list(arm.build(bases).modules())
        packed = {type(module) for module in modules if isinstance(module, bnb.nn.Linear4bit)}
        kinds[name] = packed, any(isinstance(module, LoraLayer) for module in modules)
    assert kinds == {
        DENSE: (set(), False),
        MERGED: (set(), False),
        NF4: ({Linear4bit}, False),
        LORA: ({Linear4bit}, True),
        FAST: ({Linear4bit}, False),
        FAST_LORA: ({Linear4bit}, True),
        STOCK: ({bnb.nn.Linear4bit}, False),
        STOCK_LORA: ({bnb.nn.Linear4bit}, True),
    }
    assert {name for name, arm in ARMS.items() if arm.fast} == {FAST, FAST_LORA}


def test_arms_have_one_adapter_and_it_matters() -> None:
    bases = Bases(TINY)
    ours, stock, nf4 = (ARMS[name].build(bases) for name in (LORA, STOCK_LORA, NF4))
    expected = {name: t for name, t in stock.state_dict().items() if "lora_" in name}
    found = {name: t for name, t in ours.state_dict().items() if "lora_" in name}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with torch.no_grad():
        logits = [model(input_ids=TINY.prompt()).logits for model in (ours, stock, nf4)]
    # stock rounds scales to bfloat16 where the processor can
    assert float((logits[0] - logits[1]).norm() / logits[0].norm()) < 0.03
    assert float((logits[0] - logits[2]).norm() / logits[0].norm()) > 0.1


def test_every_token_is_generated_whatever_it_is() -> None:
    model = TINY.base()
    assert len(run.generate(model, TINY, 30)) == 30
    assert run.generate(model, TINY, 6) == run.generate(model, TINY, 30)[:6]


@pytest.mark.parametrize(("found", "same"), [([1, 2, 3], 3), ([1, 2, 4], 2), ([0, 2, 3], 0)])
def test_tokens_count_up_to_the_first_that_differs(found: list[int], same: int) -> None:
    assert run.leading(found, [1, 2, 3]) == same


def test_the_measurement_leaves_no_layer_repacked() -> None:
    found = run.measure(TINY, 3, [NF4, LORA])
    assert [len(arm["generation_s"]) for arm in found["arms"].values()] == [3, 3]
    assert found["arms"][LORA]["base"] == NF4
    assert found["case"]["new_tokens"] == found["arms"][LORA]["same_tokens"] == 6


def test_arms_without_a_kernel_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (set(ARMS) == set(possible())) == bool(has_avx512bf16())
    monkeypatch.setattr("hf_qlora.bench.generation.arms.obstacle_here", lambda block_size: "none here")
    assert set(possible()) == set(ARMS) - {FAST, FAST_LORA}


def test_the_command_writes_what_it_prints(tmp_path: Path) -> None:
    results = tmp_path / "new" / "generation.json"
    options = ["--shape", "tiny", "--new-tokens", "4", "--rank", "2", "--rounds", "2"]
    arms = [part for name in (DENSE, MERGED, LORA) for part in ("--arm", name)]
    done = CliRunner().invoke(app, ["bench", "generation", *options, *arms, "--results", str(results)])
    assert done.exit_code == 0, done.output
    found = json.loads(results.read_text())
    assert list(found["arms"]) == [DENSE, MERGED, LORA]
    assert results.with_suffix(".png").stat().st_size > 1000
    table = report.markdown(found)
    assert table in done.output
    seconds = {name: arm["generation_s"] for name, arm in found["arms"].items()}
    ratio = statistics.median(seconds[MERGED]) / statistics.median(seconds[DENSE])
    assert f"| {MERGED} | {statistics.median(seconds[MERGED]) / 4 * 1e3:.1f} |" in table
    assert f"| {ratio:.2f} |" in table
    again = CliRunner().invoke(app, ["bench", "generation", "--report", "--results", str(results)])
    assert again.output.strip() == table
    assert sorted(path.name for path in results.parent.iterdir()) == ["generation.json", "generation.png"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--shape", "huge"], "choose from"),
        (["--arm", "mine"], "choose from"),
        (["--report", "--results", "nowhere.json"], "nowhere.json"),
    ],
)
def test_misuse_is_explained(options: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["bench", "generation", *options])
    assert done.exit_code == 2
    assert said in done.output


def test_an_arm_that_the_processor_cannot_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "obstacle_here", lambda block_size: "no kernel")
    done = CliRunner().invoke(app, ["bench", "generation", "--shape", "tiny", "--arm", FAST])
    assert done.exit_code == 2
    assert "no kernel" in done.output

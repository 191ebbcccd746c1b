"""The arms are what they are called, train the same function, and are measured by what independent counters say."""

from __future__ import annotations

import json
import mmap
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import bitsandbytes as bnb
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama
from typer.testing import CliRunner

from hf_qlora import NF4Config, disable_chunked_loss
from hf_qlora.bench import measure
from hf_qlora.bench.processes import apart
from hf_qlora.bench.train_step import report, run
from hf_qlora.bench.train_step.arms import ARMS, CHUNKED, DOCUMENTED, FLOOR, OURS, TUNED, Case, arms_for, stock_base
from hf_qlora.cli import app
from hf_qlora.kernels.emulated import is_emulated


TINY = Case(shape="tiny", batch_size=2, sequence_length=16, rank=4)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_the_stock_base_is_what_from_pretrained_gives(tmp_path: Path) -> None:
    TINY.dense().save_pretrained(tmp_path)
    config = NF4Config().to_bitsandbytes()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=config)
    made = stock_base(TINY)
    expected = {name: type(module) for name, module in loaded.named_modules()}
    assert {name: type(module) for name, module in made.named_modules()} == expected
    assert bnb.nn.Linear4bit in expected.values()
    packed = dict(loaded.named_parameters())
    for name, parameter in made.named_parameters():
        assert torch.equal(parameter, packed[name]), name


def test_ligers_kernels_are_in_their_arm_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class TheirNorm(torch.nn.Module):
        pass

    def apply(model: object, **options: object) -> None:
        modeling_llama.LlamaRMSNorm = TheirNorm  # as Liger does, beside changing the model's own modules

    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    stub = ModuleType("liger_kernel.transformers")
    stub.apply_liger_kernel_to_llama = apply  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", stub)
    ARMS["ours, Liger's kernels"].start(TINY)
    assert modeling_llama.LlamaRMSNorm is not TheirNorm
    assert not any(isinstance(module, TheirNorm) for module in ARMS[CHUNKED].start(TINY).model.modules())


def test_all_arms_learn_the_same_function() -> None:
    steps = {name: ARMS[name].start(TINY) for name in arms_for("cpu")}
    for number in range(3):
        for step in steps.values():
            step(TINY.batch(number))
    losses = {name: step.loss for name, step in steps.items()}
    # bfloat16 has 8 bits; random weights make a loss of about log 512 = 6.2
    assert max(losses.values()) - min(losses.values()) < 0.02, losses
    norms = [step.gradient_norm for name, step in steps.items() if name in (DOCUMENTED, TUNED, OURS)]
    assert max(norms) / min(norms) < 1.05
    assert all(step.gradient_norm > 0 for step in steps.values())
    assert not steps[FLOOR].trained
    counts = {name: sum(p.numel() for p in step.trained) for name, step in steps.items()}
    assert counts[DOCUMENTED] == counts[TUNED] == counts[OURS]


def test_arms_hold_the_dtypes_they_are_called_by() -> None:
    dtypes = {name: {p.dtype for p in ARMS[name].start(TINY).trained} for name in (DOCUMENTED, TUNED, OURS)}
    assert dtypes == {DOCUMENTED: {torch.float32}, TUNED: {torch.bfloat16}, OURS: {torch.float32}}
    embeddings = {name: ARMS[name].start(TINY).model.get_input_embeddings().weight.dtype for name in dtypes}
    assert embeddings == {DOCUMENTED: torch.float32, TUNED: torch.bfloat16, OURS: torch.bfloat16}


def test_under_autocast_the_same_float32_head_multiplies_in_bfloat16() -> None:
    seen: dict[str, tuple[torch.dtype, torch.dtype]] = {}
    for name in (DOCUMENTED, "stock, autocast"):
        step = ARMS[name].start(TINY)
        head = step.model.get_output_embeddings()
        head.register_forward_hook(
            lambda head, _, logits, name=name: seen.update({name: (head.weight.dtype, logits.dtype)})
        )
        step(TINY.batch(0))
    assert seen == {
        DOCUMENTED: (torch.float32, torch.float32),
        "stock, autocast": (torch.float32, torch.bfloat16),
    }


def test_the_arithmetic_is_what_torch_counts() -> None:
    """torch's counter sees the products of the frozen base, forward and backward to its input."""
    step = ARMS[FLOOR].start(TINY)
    step.model.config._attn_implementation = "eager"  # counted as two products of every token with every other
    disable_chunked_loss(step.model)  # the counter hooks logits, and all rows are counted
    with FlopCounterMode(display=False) as counter:
        step(TINY.batch(0))
    hidden, layers = 64, 2
    masked = layers * 3 * (2 * 2 * TINY.tokens * TINY.sequence_length * hidden) / 2
    assert run.flops(TINY)["base"] == pytest.approx(counter.get_total_flops() - masked, rel=1e-6)


def test_adapters_arithmetic_is_three_times_their_forward() -> None:
    hidden, keys, between, layers = 64, 32, 128, 2
    widths = layers * (2 * (hidden + hidden) + 2 * (hidden + keys) + 3 * (hidden + between))
    assert run.flops(TINY)["adapters"] == 3 * 2 * TINY.tokens * TINY.rank * widths


def test_saved_bytes_count_each_storage_once() -> None:
    """Ours keeps three inputs of a layer in bfloat16, and a skinny product for each of its seven modules.

    The fourth, the MLP's product of two tensors that autograd keeps, is made again. The skinny ones are in float32
    where the processor does not multiply in bfloat16.
    """
    T, r, layers = TINY.tokens, TINY.rank, 2
    inputs, product, skinny = 2 * T * 3 * 64, 2 * T * 128, 2 * T * r * 7
    own = skinny * (2 if is_emulated(torch.empty(0, dtype=torch.bfloat16)) else 1)
    assert run.saved_bytes(ARMS[CHUNKED].start(TINY)) == layers * (inputs + own)
    assert run.saved_bytes(ARMS[FLOOR].start(TINY)) == 0
    stock = layers * (inputs + product + skinny)
    assert run.saved_bytes(ARMS[TUNED].start(TINY)) == stock
    assert run.saved_bytes(ARMS[DOCUMENTED].start(TINY)) == 2 * stock  # float32 throughout


def test_saved_bytes_of_checkpointed_layers_are_not_looked_at() -> None:
    assert run.saved_bytes(ARMS[CHUNKED].start(replace(TINY, checkpointing=True))) == 0


def test_the_peak_is_seen_and_reset() -> None:
    measure.reset_peak("cpu")
    before = measure.memory("cpu")
    with mmap.mmap(-1, 64 * 2**20) as block:  # past all allocators, which may keep what is freed for a while
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
    after = measure.memory("cpu")
    assert after.peak - before.peak > 60 * 2**20
    assert after.now - before.now < 10 * 2**20
    measure.reset_peak("cpu")
    assert measure.memory("cpu").peak < after.peak - 50 * 2**20


def test_memory_is_measured_in_another_process() -> None:
    found = apart(run.peak_memory, OURS, TINY)
    assert found["imports"] > 100 * 2**20
    assert 0 <= found["resting"] <= found["peak"] < 500 * 2**20


def test_the_command_writes_what_it_prints(tmp_path: Path) -> None:
    results = tmp_path / "new" / "step.json"
    arms = [part for name in (OURS, FLOOR) for part in ("--arm", name)]
    options = ["--shape", "tiny", "--batch-size", "2", "--sequence-length", "8", "--rank", "2", "--rounds", "2"]
    done = CliRunner().invoke(app, ["bench", "train-step", *options, *arms, "--results", str(results)])
    assert done.exit_code == 0, done.output
    found = json.loads(results.read_text())
    assert list(found["arms"]) == [OURS, FLOOR]
    assert all(len(arm["step_s"]) == 2 for arm in found["arms"].values())
    assert results.with_suffix(".png").stat().st_size > 1000
    assert report.markdown(found) in done.output
    again = CliRunner().invoke(app, ["bench", "train-step", "--report", "--results", str(results)])
    assert again.output.strip() == report.markdown(found)
    assert sorted(path.name for path in results.parent.iterdir()) == ["step.json", "step.png"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--shape", "huge"], "choose from"),
        (["--arm", "mine"], "choose from"),
        (["--report", "--results", "nowhere.json"], "nowhere.json"),
    ],
)
def test_misuse_is_explained(options: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["bench", "train-step", *options])
    assert done.exit_code == 2
    assert said in done.output


@pytest.mark.gpu
def test_a_gpu_is_measured_too() -> None:
    case = Case(shape="tiny", batch_size=2, sequence_length=16, rank=4, device="cuda")
    found = run.measure(case, 2, [DOCUMENTED, OURS, FLOOR])
    assert found["with"]["device"] == torch.cuda.get_device_name()
    assert all(arm["memory"]["peak"] > 0 and arm["memory"]["reserved"] > 0 for arm in found["arms"].values())
    assert isinstance(report.markdown(found), str)

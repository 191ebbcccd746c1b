"""A quantized base sharded by FSDP2 over two processes trains as one process does, and saves a whole adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed.runs import CONFIGS, adapted, adapters, averages, base, in_processes, plain_loop, steps_of_sgd
from peft import PeftModel, get_peft_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM

from hf_qlora import NF4Config, quantize_model
from hf_qlora.quant.checks import BaseModelError


def shard(model: Any, **options: Any) -> Any:
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    transformer = model.get_base_model() if isinstance(model, PeftModel) else model
    for layer in transformer.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def sharded_loop(kind: str, folder: Path) -> dict[str, Any]:
    rank = dist.get_rank()
    model = shard(adapted(kind).train())
    packed = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    assert isinstance(packed, DTensor)
    assert packed.dtype == torch.uint8
    losses = steps_of_sgd(model, [p for p in model.parameters() if p.requires_grad])
    model.save_pretrained(folder / f"{kind}-gathered-{rank}")
    full = {name: p.full_tensor() for name, p in model.named_parameters() if p.requires_grad}
    assert all(isinstance(p, DTensor) for p in model.parameters() if p.requires_grad)
    if rank == 0:  # as Trainer does
        model.save_pretrained(folder / f"{kind}-given", state_dict=model.state_dict() | full)
        with pytest.raises(ValueError, match=r"state_dict has .* for base_model.*get_state_dict"):
            model.save_pretrained(folder / f"{kind}-refused", state_dict=model.state_dict())
    again = steps_of_sgd(model, [p for p in model.parameters() if p.requires_grad])  # after saving it trains on
    return {"adapters": full, "averages": averages(model), "losses": losses, "again": again}


def quantized_too_late() -> str:
    with pytest.raises(BaseModelError) as refused:
        quantize_model(shard(base()))
    return str(refused.value)


def all_runs(folder: Path) -> dict[str, Any]:
    late = {"too late": quantized_too_late()}
    return late | {kind: sharded_loop(kind, folder) for kind in CONFIGS} | {"stored": stored_loops(folder)}


def stored_loops(folder: Path) -> dict[str, list[float]]:
    """accelerate shards a 4-bit base only if it is stored in a dtype of floating point."""
    losses = {}
    for storage in (torch.uint8, torch.bfloat16):
        how = NF4Config().to_bitsandbytes()
        how.bnb_4bit_quant_storage = storage
        quantized = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32, quantization_config=how)
        model = adapted("nf4", quantized).train()
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        shard(model, mp_policy=policy)
        losses[str(storage)] = steps_of_sgd(model, [p for p in model.parameters() if p.requires_grad])
    return losses


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fsdp")
    base().save_pretrained(path / "base")
    return path


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    return in_processes(all_runs, folder)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_sharded_model_trains_as_one_process_does(kind: str, two: Any) -> None:
    expected = plain_loop(kind)
    for found in (process[kind] for process in two):
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)  # float32 sums in another order
        assert found["again"][-1] != found["losses"][-1]
        for name, tensor in expected["adapters"].items():
            moved = (tensor - expected["started"][name]).abs().max().item()
            # as under DDP
            rounding = len(expected["losses"]) * 2**-24 * tensor.abs().max().item()
            torch.testing.assert_close(found["adapters"][name], tensor, rtol=0, atol=1e-4 * moved + rounding)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_saved_adapter_is_whole(kind: str, folder: Path, two: Any) -> None:
    """By gathering in all processes, of which the first writes, or from a full state dict in one."""
    assert not list((folder / f"{kind}-gathered-1").glob("*.safetensors"))
    loaded = [
        PeftModel.from_pretrained(base(), str(folder / name), is_trainable=True)
        for name in (f"{kind}-gathered-0", f"{kind}-given")
    ]
    for model in loaded:
        for name, tensor in adapters(model).items():
            # folded on saving and divided on loading, each a rounding of float32
            torch.testing.assert_close(tensor, two[0][kind]["adapters"][name], rtol=3 * 2**-24, atol=0)
        for name, observed in averages(model).items():
            assert torch.equal(observed[2:], torch.tensor([3.0])), name
    first, second = map(get_peft_model_state_dict, loaded)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_storage_as_bfloat16_changes_nothing(two: Any) -> None:
    """The codes' bytes are the same, and FSDP gathers them without a cast."""
    stored = two[0]["stored"]
    assert stored["torch.bfloat16"] == stored["torch.uint8"]
    # all dense weights and activations in bfloat16, of 2**-9
    assert stored["torch.bfloat16"] == pytest.approx(plain_loop("nf4")["losses"], rel=2**-9)


def test_a_model_that_is_sharded_already_is_not_quantized(two: Any) -> None:
    for process in two:
        assert process["too late"].startswith(
            "model.layers.0.self_attn.q_proj.weight is sharded over processes by FSDP"
        )

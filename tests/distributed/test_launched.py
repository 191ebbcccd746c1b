"""Trainer in processes that launchers start on GPUs: under FSDP2 by accelerate, under DeepSpeed's ZeRO-2."""

from __future__ import annotations

import json
import os
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.launched import launch
from distributed.runs import STEPS, adapted, adapters, base
from peft import PeftModel
from torch import Tensor


pytestmark = pytest.mark.timeout(1200)

DEVICES = [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
FSDP2 = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "FSDP",
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_state_dict_type": "FULL_STATE_DICT",
        "fsdp_reshard_after_forward": True,
        "fsdp_cpu_ram_efficient_loading": False,
        "fsdp_offload_params": False,
    },
    "machine_rank": 0,
    "num_machines": 1,
    "mixed_precision": "no",  # TrainingArguments say it
}
IN_FLOAT32 = {"dtype": "float32", "storage": "uint8"}
IN_BFLOAT16 = {"dtype": "bfloat16", "storage": "uint8", "bf16": True}


def settings(device: str, **changes: Any) -> dict[str, Any]:
    return {"dtype": "float32", "storage": "uint8", "use_cpu": device == "cpu", **changes}


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("launched")
    base().save_pretrained(path / "base")
    return path


@pytest.fixture(scope="module")
def alone(device: str, folder: Path) -> Any:
    return in_one(folder, f"alone-{device}", settings(device))


@pytest.fixture(scope="module")
def sharded(device: str, folder: Path) -> Any:
    return in_shards(folder, f"sharded-{device}", settings(device, storage="bfloat16"))


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def in_one(folder: Path, name: str, given: dict[str, Any]) -> Any:
    """One process on one GPU: with more in sight, Trainer would use them all."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return launch([sys.executable], folder, name, given, CUDA_VISIBLE_DEVICES=first)


def in_shards(folder: Path, name: str, given: dict[str, Any]) -> Any:
    """Two processes, or as many as there are GPUs, by `accelerate launch`."""
    count = 2 if given["use_cpu"] else min(2, torch.cuda.device_count())
    file = folder / "fsdp2.yaml"
    file.write_text(json.dumps(FSDP2 | {"num_processes": count}))  # JSON is YAML
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    return launch([*command, "--main_process_port", free_port()], folder, name, given)


def saved(folder: Path) -> dict[str, Tensor]:
    """An adapter's tensors, loaded in this process, on the CPU."""
    return adapters(PeftModel.from_pretrained(base(), str(folder), is_trainable=True, torch_device="cpu"))


def movement(folder: Path) -> Tensor:
    """What training has added to all tensors of an adapter, as one vector."""
    start = adapters(adapted("nf4"))
    return torch.cat([(tensor - start[name]).flatten() for name, tensor in saved(folder).items()])


def test_fsdp2_through_accelerate_trains_as_one_process_does(
    folder: Path, device: str, alone: Any, sharded: Any
) -> None:
    assert alone["packed"] == {"sharded": False, "dtype": "torch.uint8", "share": 1.0}
    assert sharded["packed"] == {"sharded": True, "dtype": "torch.bfloat16", "share": 1 / sharded["processes"]}
    assert sharded["losses"] == pytest.approx(alone["losses"], rel=1e-5)  # float32 sums in another order
    expected, start = saved(folder / f"alone-{device}" / "adapter"), adapters(adapted("nf4"))
    for name, tensor in saved(folder / f"sharded-{device}" / "adapter").items():
        moved = (expected[name] - start[name]).abs().max().item()
        assert moved > 0, name
        # as under DDP, for the order of sums and the rounding of each step
        rounding = STEPS * 2**-24 * tensor.abs().max().item()
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-4 * moved + rounding)


def test_a_sharded_checkpoint_has_the_whole_adapter(folder: Path, device: str, sharded: Any) -> None:
    """Saved by the first process, from the state dict that accelerate puts together."""
    run = folder / f"sharded-{device}"
    at_the_end, checkpoint = (saved(run / place) for place in ("adapter", f"checkpoint-{STEPS}"))
    assert at_the_end.keys() == checkpoint.keys() == adapters(adapted("nf4")).keys()
    assert all(torch.equal(tensor, checkpoint[name]) for name, tensor in at_the_end.items())


def test_sharded_training_goes_on_from_a_checkpoint(folder: Path, device: str, sharded: Any) -> None:
    """With the optimizer's momentum, without which the last step would be another."""
    first = str(folder / f"sharded-{device}" / "checkpoint-2")
    given = settings(device, storage="bfloat16", resume=first)
    resumed = in_shards(folder, f"resumed-{device}", given)
    assert resumed["losses"] == sharded["losses"]
    found, expected = (saved(folder / f"{name}-{device}" / "adapter") for name in ("resumed", "sharded"))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_fsdp2_in_mixed_precision_learns_what_one_process_does(folder: Path, device: str) -> None:
    changes = {"dtype": "bfloat16", "bf16": True}
    expected = in_one(folder, f"one-bf16-{device}", settings(device, **changes))
    found = in_shards(folder, f"two-bf16-{device}", settings(device, **changes, storage="bfloat16"))
    # activations in bfloat16, of 2**-9, in products of another shape; gradients are reduced in bfloat16, too
    assert found["losses"] == pytest.approx(expected["losses"], rel=2**-6)
    moved, other = (movement(folder / f"{name}-bf16-{device}" / "adapter") for name in ("one", "two"))
    assert torch.cosine_similarity(moved, other, dim=0) > 0.99


@pytest.mark.gpu
def test_zero_2_trains_as_one_process_without_does_and_goes_on_from_a_checkpoint(folder: Path) -> None:
    """With torch's AdamW as the client's optimizer, so that DeepSpeed compiles nothing."""
    assert find_spec("deepspeed"), "this test is of DeepSpeed; install it"
    given = settings("cuda", optim="adamw_torch", optim_args=None, learning_rate=1e-2)
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": 2},
    }
    expected = in_one(folder, "adamw", given)
    count = min(2, torch.cuda.device_count())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count), "--master_port"]
    found = launch([*command, free_port()], folder, "zero-2", {**given, "deepspeed": config})
    # AdamW's first step is of the rate's size whatever the gradient: near 0 its sign is that of a rounding
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    moved, other = (movement(folder / name / "adapter") for name in ("zero-2", "adamw"))
    assert torch.cosine_similarity(moved, other, dim=0) > 0.999
    resumed = {**given, "deepspeed": config, "resume": str(folder / "zero-2" / "checkpoint-2")}
    assert launch([*command, free_port()], folder, "zero-2-resumed", resumed)["losses"] == found["losses"]
    tensors = saved(folder / "zero-2" / "adapter")
    for name, tensor in saved(folder / "zero-2-resumed" / "adapter").items():
        assert torch.equal(tensor, tensors[name]), name

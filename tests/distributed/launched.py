"""What processes run that a launcher starts: Trainer on a tiny NF4 llama, as `launch` asks for it.

    python launched.py FOLDER NAME SETTINGS

FOLDER/base has the dense base; into FOLDER/NAME go checkpoints, the adapter and, from the first process,
result.json. A process that takes too long says where it stands, and ends.

accelerate shards on GPUs alone. On the CPU, where torch can too, it is made to take gloo for a GPU's backend, so that
all of what it and Trainer do then is run here: all but NCCL and the device.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from distributed.runs import ROWS, STEPS, adapted, rows
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from hf_qlora import NF4Config


SECONDS = 240  # for a process; it takes some 30, most of them for imports


def launch(command: list[str], folder: Path, name: str, settings: dict[str, Any], **environment: str) -> Any:
    """Run this file by a launcher's command, and give its result."""
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [*command, __file__, str(folder), name, json.dumps(settings)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=SECONDS + 60)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # which torch's launcher hands on
        output, _ = process.communicate(timeout=60)
        raise AssertionError(f"{name} did not come to its end:\n{output[-8000:]}") from None
    assert process.returncode == 0, f"{name} failed:\n{output[-8000:]}"
    return json.loads((folder / name / "result.json").read_text())


def main(folder: Path, name: str, settings: dict[str, Any]) -> None:
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    dtype, storage = (getattr(torch, settings.pop(key)) for key in ("dtype", "storage"))
    resumed = settings.pop("resume", None)
    if settings.get("use_cpu"):
        shard_on_cpus()
    defaults = {
        "max_steps": STEPS,
        "per_device_train_batch_size": ROWS // int(os.environ.get("WORLD_SIZE", "1")),
        "optim": "sgd",
        "optim_args": "momentum=0.9",  # a state that is sharded and saved
        "learning_rate": 0.2,
        "logging_steps": 1,
        "save_steps": 1,
        "ddp_timeout": 60,
        "report_to": "none",
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(str(folder / name), **{**defaults, **settings})  # before the model, for DeepSpeed
    trainer = Trainer(quantized(folder, dtype, storage, arguments.device), arguments, train_dataset=rows())
    trainer.train(resume_from_checkpoint=resumed)
    trainer.save_model(str(folder / name / "adapter"))
    if arguments.process_index == 0:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        result = {"losses": losses, "packed": described(trainer.model), "processes": arguments.world_size}
        (folder / name / "result.json").write_text(json.dumps(result))


def shard_on_cpus() -> None:
    """Let accelerate's state be FSDP's where it is asked for, as it is on GPUs."""
    original = AcceleratorState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if plugin is not None:
            PartialState._shared_state["distributed_type"] = self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = plugin
            if self.mixed_precision != "no":
                plugin.set_mixed_precision(self.mixed_precision)

    AcceleratorState.__init__ = init


def quantized(folder: Path, dtype: torch.dtype, storage: torch.dtype, device: torch.device) -> nn.Module:
    """With eager attention, whose backward sums in one order on GPUs too."""
    how = NF4Config().to_bitsandbytes()
    how.bnb_4bit_quant_storage = storage
    base = LlamaForCausalLM.from_pretrained(
        folder / "base", dtype=dtype, quantization_config=how, device_map={"": device}, attn_implementation="eager"
    )
    return adapted("nf4", base).train()


def described(model: Any) -> dict[str, Any]:
    """How the codes of a layer are held."""
    weight = next(p for name, p in model.named_parameters() if name.endswith("q_proj.base_layer.weight"))
    sharded = isinstance(weight, DTensor)
    here = weight.to_local() if isinstance(weight, DTensor) else weight
    return {"sharded": sharded, "dtype": str(weight.dtype), "share": here.numel() / weight.numel()}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))

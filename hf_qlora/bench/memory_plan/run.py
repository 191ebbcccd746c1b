"""Each setting planned, and measured in a process of its own.

On CUDA what is measured is what torch's allocator gave, on the CPU the resident memory beyond that of a process which
has trained a tiny model. The CPU is measured twice: with large blocks mapped (`measure.map_large_blocks`), which is
what a plan counts, and without, which is what a user sees.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import bitsandbytes as bnb
import torch
from peft import get_peft_model
from torch import Tensor, nn
from tqdm import tqdm

from hf_qlora.bench.measure import environment, map_large_blocks, memory, reset_peak
from hf_qlora.bench.memory_plan.settings import QUICK, Setting
from hf_qlora.bench.processes import apart
from hf_qlora.train.plan import plan_memory
from hf_qlora.train.plan.optimizers import OPTIMIZERS


AT_A_TIME = {"cpu": 2, "cuda": 4}  # processes; memory is counted for each
STEPS = 2  # whose peak is taken, after a first one


def measure(settings: Sequence[Setting]) -> dict[str, Any]:
    """All of it, as JSON types."""
    device = settings[0].device
    with tqdm(total=len(settings), desc="memory-plan", unit="setting") as bar:

        def one(setting: Setting) -> dict[str, Any]:
            found = {"setting": asdict(setting), "measured": apart(peaks, setting, device == "cpu")}
            if device == "cpu":
                found["heap"] = apart(peaks, setting, False)
            bar.update()
            return found

        with ThreadPoolExecutor(AT_A_TIME[device]) as pool:
            rows = list(pool.map(one, settings))
    for row, setting in zip(rows, settings, strict=True):
        row["plan"] = planned(setting)
    return {"with": environment(device), "settings": rows}


def planned(setting: Setting) -> dict[str, Any]:
    return plan_memory(
        setting.architecture(),
        setting.lora(),
        setting.batch_size,
        setting.seq_len,
        optimizer=setting.optimizer,
        checkpointing="full" if setting.checkpointing else None,
        dtype=setting.dtype,
        device=setting.device,
    ).to_dict()


def peaks(setting: Setting, mapped: bool) -> dict[str, int]:
    """Bytes at the peaks of converting and of training, in this process.

    Args:
        mapped: whether every large block is to be a mapping of its own; Linux alone.
    """
    if mapped:
        map_large_blocks()
    before = 0
    if setting.device == "cpu":  # so that what libraries load at their first use is there before
        _train(replace(QUICK[0], dtype=setting.dtype, family=setting.family, optimizer=setting.optimizer))
        reset_peak("cpu")
        before = memory("cpu").now
    found = _train(setting)
    return {name: value - before for name, value in found.items()}


def _train(setting: Setting) -> dict[str, int]:
    torch.manual_seed(0)
    dense = setting.dense()
    reset_peak(setting.device)
    model: Any = get_peft_model(dense, setting.lora()).train()
    converting = memory(setting.device).peak
    if setting.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = _optimizer(setting, [p for p in model.parameters() if p.requires_grad])
    batch = setting.batch()
    _step(model, optimizer, batch)
    gc.collect()
    reset_peak(setting.device)
    for _ in range(STEPS):
        _step(model, optimizer, batch)
    return {"conversion": converting, "step": memory(setting.device).peak}


def _step(model: Any, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> None:
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _optimizer(setting: Setting, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    make = OPTIMIZERS[setting.optimizer].make
    if make is not None:
        return make(trained, setting.device == "cuda")
    made: torch.optim.Optimizer = bnb.optim.AdamW8bit(trained)
    return made

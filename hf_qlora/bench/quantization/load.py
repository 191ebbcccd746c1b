"""`load`: seconds until a model is there to be called.

    dense             from_pretrained in the dtype
    NF4, in place     the same, and quantized in place
    NF4, checkpoint   from_pretrained of a checkpoint that was saved in NF4
    stock             from_pretrained with a BitsAndBytesConfig, which quantizes while it loads

The arms take turns, another first in each round, after a turn that is not counted: files are then in the system's
cache, and what is measured is the work on them, not the disk.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, BitsAndBytesConfig

from hf_qlora.bench.measure import clock, in_turn
from hf_qlora.bench.quantization.case import Case
from hf_qlora.bench.quantization.rows import Row, timings
from hf_qlora.bench.quantization.settings import Context
from hf_qlora.config.nf4 import COMPUTE_DTYPES
from hf_qlora.merge.load import load_model
from hf_qlora.merge.skeleton import class_named


def run(context: Context) -> list[Row]:
    settings = context.settings
    checkpoint, device = context.saved_nf4(), settings.device
    arms: dict[str, Callable[[], Any]] = {
        "dense": context.dense,
        "NF4, quantized in place": context.nf4,
        "NF4, saved checkpoint": lambda: load_model(str(checkpoint), settings.dtype).to(device),
        "stock NF4, BitsAndBytesConfig": lambda: stock_nf4(context.folder, device, COMPUTE_DTYPES[settings.dtype]),
    }
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for number in range(-1, settings.rounds):
        for arm, load in in_turn(arms.items(), number):
            context.at(f"{arm}, round {number + 1}")
            gc.collect()
            started = clock(device)
            model = load()
            taken = clock(device) - started
            del model
            if number >= 0:
                seconds[arm].append(taken)
    return timings(seconds)


def stock_nf4(folder: Path, device: str, dtype: torch.dtype) -> Any:
    """The model as transformers and bitsandbytes load it in NF4 with double quantization."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    cls: Any = class_named(AutoConfig.from_pretrained(folder).architectures or ())
    return cls.from_pretrained(folder, dtype=dtype, quantization_config=config, device_map={"": device}).eval()


CASE = Case(
    "load",
    "Loading",
    "Seconds from files, already in the system's cache, to a model that can be called; a saved checkpoint is loaded "
    "without being quantized again.",
    run,
    lambda sizes: sizes.dense + 2 * sizes.nf4,
    language=False,
    reference="dense",
)

"""`memory`: what weights take, counted by kind, and what a process takes to load the model and run it once.

    weights     bytes of all tensors, each storage once: codes, scales with the tables of
                levels, dense (embeddings, norms, heads, adapters)
    peak        of the process until one forward of 1 × 128 tokens is done, loading included, less the imports
    resident    of the process after it, with free memory given back, less the imports

Each arm is in a process of its own, on CUDA in one, where the allocator counts each tensor. Quantizing in place needs
the dense weights first: its peak is theirs. A saved NF4 checkpoint and bitsandbytes' own loading never have them all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model

from hf_qlora.bench.measure import memory, reset_peak
from hf_qlora.bench.quantization.case import Case
from hf_qlora.bench.quantization.load import stock_nf4
from hf_qlora.bench.quantization.rows import Row, numbers
from hf_qlora.bench.quantization.settings import Context, Settings, lora
from hf_qlora.config.nf4 import COMPUTE_DTYPES
from hf_qlora.data.tokenizer import vocabulary_of
from hf_qlora.merge.load import load_model
from hf_qlora.quant.base import quantize_model
from hf_qlora.quant.footprint import footprint


TOKENS = 128


def run(context: Context) -> list[Row]:
    checkpoint = context.saved_nf4()
    rows = []
    for arm in ARMS:
        context.at(arm)
        folder = checkpoint if arm == CHECKPOINT else context.folder
        try:
            rows += numbers(arm, context.alone(measure, arm, folder, context.settings))
        except AssertionError as error:  # bitsandbytes', of a shape that its kernel for this processor cannot do
            context.notes.append(f"{arm} is left out: bitsandbytes cannot run this model here ({error}).")
    return rows


def measure(arm: str, folder: Path, settings: Settings) -> dict[str, float]:
    """Of one arm, in whatever process this is."""
    reset_peak(settings.device)
    imported = memory(settings.device).now
    model = ARMS[arm](folder, settings).eval()
    kinds = footprint(model)  # before a forward: bitsandbytes repacks in it
    ids = torch.arange(TOKENS).remainder(vocabulary_of(model))[None].to(settings.device)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    peak = memory(settings.device).peak
    reset_peak(settings.device)
    return {
        "quantized_bytes": kinds.code_bytes,
        "scale_bytes": kinds.scale_bytes + kinds.table_bytes,
        "dense_bytes": kinds.dense_bytes,
        "weight_bytes": kinds.total_bytes,
        "resident_bytes": max(memory(settings.device).now - imported, 0),
        "peak_bytes": max(peak - imported, 0),
    }


def _dense(folder: Path, settings: Settings) -> Any:
    return load_model(str(folder), settings.dtype).to(settings.device)


def _in_place(folder: Path, settings: Settings) -> Any:
    return quantize_model(_dense(folder, settings))


def _adapted(folder: Path, settings: Settings) -> Any:
    return get_peft_model(_dense(folder, settings), lora(settings))


def _stock(folder: Path, settings: Settings) -> Any:
    return stock_nf4(folder, settings.device, COMPUTE_DTYPES[settings.dtype])


CHECKPOINT = "NF4, saved checkpoint"
ARMS = {
    "dense": _dense,
    "NF4, quantized in place": _in_place,
    CHECKPOINT: _dense,
    "stock NF4, BitsAndBytesConfig": _stock,
    "NF4 + LoRA": _adapted,
}
CASE = Case(
    "memory",
    "Memory",
    "Weights are counted to the byte; resident and peak are what a process of its own took beyond its imports. "
    "Embeddings and a tied head stay dense, which bounds how much smaller the whole model can become.",
    run,
    lambda sizes: sizes.dense + 2 * sizes.nf4,
    language=False,
    reference="dense",
)

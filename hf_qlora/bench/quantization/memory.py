"""`memory`: what weights take, counted by kind, and what a process takes to load the model and run it once.

    weights     bytes of all tensors, each storage once: codes, scales with the tables of
                levels, dense (embeddings, norms, heads, adapters)
    peak        in use by the process at most until one forward of 1 × 128 tokens is done, loading included, less the
                imports
    resident    in use after it, with free memory given back, less the imports

Each arm is in a process of its own, on CUDA in one, where the allocator counts each tensor. On the CPU, in use are
anonymous and shared memory, and of a mapped checkpoint the weights that are still tensors (`bench/resident.py`): a
checkpoint in the dtype asked for is mapped, and quantizing it in place never has all dense weights of its own. One in
another dtype is cast first, and the peak is no less than that of the dense model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model

from hf_qlora.bench.measure import memory, peak_of, reset_peak
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
    with peak_of(settings.device) as peak:
        model = ARMS[arm](folder, settings).eval()
        kinds = footprint(model)  # before a forward: bitsandbytes repacks in it
        ids = torch.arange(TOKENS).remainder(vocabulary_of(model))[None].to(settings.device)
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    reset_peak(settings.device)
    return {
        "quantized_bytes": kinds.code_bytes,
        "scale_bytes": kinds.scale_bytes + kinds.table_bytes,
        "dense_bytes": kinds.dense_bytes,
        "weight_bytes": kinds.total_bytes,
        "resident_bytes": max(memory(settings.device).now - imported, 0),
        "peak_bytes": max(peak() - imported, 0),
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
    "Weights are counted to the byte; resident and peak are what a process of its own had in use beyond its imports: "
    "on the CPU its own memory and the mapped weights it has, without pages of files that the system can drop. "
    "Embeddings and a tied head stay dense, which bounds how much smaller the whole model can become.",
    run,
    lambda sizes: sizes.dense + 2 * sizes.nf4,
    language=False,
    reference="dense",
)

"""`latency`: seconds of reading a prompt and of writing on, a token at a time.

    prefill   one forward of batch × 32 tokens into an empty cache, with the logits of the last position
    decode    4 forwards of one token for each sequence of the batch, greedily, from that cache

The arms are all in memory and take turns within a round, in another order each round; one round before is not
counted, in which bitsandbytes and `fast_generation` repack weights. On CUDA every reading of the clock waits for the
device. `fast_generation` serves batches up to 32 on CPUs with AVX512-BF16; elsewhere the
arm is left out, and a note says so.
"""

from __future__ import annotations

import copy
import inspect
from contextlib import ExitStack
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor

from hf_qlora.bench.generation.arms import as_stock
from hf_qlora.bench.measure import clock, in_turn
from hf_qlora.bench.quantization.case import Case
from hf_qlora.bench.quantization.rows import Row, timings
from hf_qlora.bench.quantization.settings import Context, Settings, lora
from hf_qlora.config import NF4Config
from hf_qlora.data.tokenizer import vocabulary_of
from hf_qlora.quant.base import quantize_model
from hf_qlora.quant.generation import fast_generation
from hf_qlora.quant.repacked import obstacle_here


DENSE, NF4, FAST, STOCK, LORA = "dense", "NF4", "NF4, fast_generation", "stock NF4", "NF4 + LoRA"
PROMPT, NEW = 32, 4


def run(context: Context) -> list[Row]:
    settings, rows = context.settings, []
    prompt, new = (8, 2) if settings.smoke else (PROMPT, NEW)
    models = _models(context)
    with ExitStack() as ways, torch.inference_mode():
        if FAST in models:
            ways.enter_context(fast_generation(models[FAST]))
        for batch in settings.batches:
            generator = torch.Generator().manual_seed(settings.seed)
            vocabulary = vocabulary_of(models[DENSE])
            ids = torch.randint(vocabulary, (batch, prompt), generator=generator).to(settings.device)
            found = _rounds(context, models, ids, new)
            rows += timings(found["prefill"], f"prefill, batch {batch}", batch * prompt)
            rows += timings(found["decode"], f"decode, batch {batch}", batch * new)
    return rows


def _models(context: Context) -> dict[str, Any]:
    dense = context.dense()
    nf4 = quantize_model(copy.deepcopy(dense), NF4Config())
    models = {DENSE: dense, NF4: nf4}
    if obstacle := _obstacle(context.settings):
        context.notes.append(f"{FAST} is left out: {obstacle}.")
    else:
        models[FAST] = copy.deepcopy(nf4)
    stock = as_stock(copy.deepcopy(nf4)).eval()
    try:
        generate(stock, torch.ones(1, 1, dtype=torch.long, device=stock.device), 1, context.settings.device)
        models[STOCK] = stock
    except AssertionError as error:  # bitsandbytes', of a shape that its kernel for this processor cannot do
        context.notes.append(f"{STOCK} is left out: bitsandbytes cannot run this model here ({error}).")
    torch.manual_seed(context.settings.seed)
    models[LORA] = get_peft_model(copy.deepcopy(nf4), lora(context.settings, init_lora_weights=False))
    # Heads as users have them, of dense models not frozen: torch copies a frozen one for each sequence of a batch
    # where the last position alone is asked for, and the adapted model's is of this package, which does not let it.
    return {name: model.eval() for name, model in models.items()}


def _obstacle(settings: Settings) -> str:
    """Why there is no fast_generation, or ""."""
    if torch.device(settings.device).type != "cpu":
        return "it is for generating on the CPU"
    return "it computes in bfloat16" if settings.dtype != "bfloat16" else obstacle_here(NF4Config().block_size)


def _rounds(context: Context, models: dict[str, Any], ids: Tensor, new: int) -> dict[str, dict[str, list[float]]]:
    found: dict[str, dict[str, list[float]]] = {step: {arm: [] for arm in models} for step in ("prefill", "decode")}
    for number in range(-1, context.settings.rounds):
        for arm in in_turn(models, number):
            context.at(f"{arm}, batch {len(ids)}, round {number + 1}")
            prefill, decode = generate(models[arm], ids, new, context.settings.device)
            if number >= 0:
                found["prefill"][arm].append(prefill)
                found["decode"][arm].append(decode)
    return found


def generate(model: Any, ids: Tensor, new: int, device: str) -> tuple[float, float]:
    """Seconds of the prompt, and of `new` tokens after it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(base.forward).parameters else {}
    started = clock(device)
    output = model(input_ids=ids, use_cache=True, **last)
    read = clock(device)
    for _ in range(new):
        token = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True, **last)
    return read - started, clock(device) - read


CASE = Case(
    "latency",
    "Latency",
    "Higher bars are faster; each mark is a round, and arms take turns, so that ratios hold on a busy machine. "
    "Prefill is bound by arithmetic and decoding by memory, so that NF4 helps where batches are small and a kernel "
    "reads the codes themselves.",
    run,
    lambda sizes: sizes.dense + 6 * sizes.nf4,
    reference=DENSE,
)

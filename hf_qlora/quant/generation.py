"""Faster generation from a 4-bit model on the CPU, by the kernel of `quant/repacked.py`, while it is asked for."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from hf_qlora.quant.linear4bit import Linear4bit
from hf_qlora.quant.repacked import Repacked, lock, obstacle_here, obstacle_to_shape
from hf_qlora.validation import check_model


logger = logging.getLogger(__name__)


@contextmanager
def fast_generation(model: nn.Module) -> Iterator[None]:
    """Let a model's NF4 layers multiply without unpacking their weights: `with fast_generation(model): ...`.

    It is for generating on CPUs with AVX512-BF16. Within it, layers in eval mode that get at most 32 rows (tokens of
    the batch) without gradients are computed by bitsandbytes' kernel, which rounds the blocks' scales to bfloat16;
    everything else, training with it, is computed as ever. The weights themselves stay as they are: training, merging,
    saving, moving and copying the model within it, or after, is what it was. A copy of the codes is kept until the
    end: 4 + 16/`block_size` bits a weight, made at each layer's first use, and made again where a weight has been
    replaced (but not one whose bytes were overwritten through `.data`).

    It holds for the model, not for the thread: what other threads generate with the same model meanwhile is fast too.
    It may be nested. Layers that were merged when it began are dense and stay so.

    Args:
        model (`torch.nn.Module`): with NF4 layers of this package (`quantize_model`, `get_peft_model` with a
            `QLoRAConfig`), on the CPU, computing in bfloat16.

    Raises:
        RuntimeError: the processor, or the installed bitsandbytes, has no such kernel.
        ValueError: no layer of the model can be served; the message says why.
    """
    held = _hold(model)
    try:
        yield
    finally:
        _let_go(held)


def _hold(model: nn.Module) -> list[tuple[Linear4bit, Repacked]]:
    check_model(model)
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    if not layers:
        raise ValueError(
            "fast_generation is for NF4 layers, and this model has none that are packed. Merged layers are dense and "
            "generate fast as they are: leave it out."
        )
    why = {layer: _obstacle(layer) for layer in layers}
    reasons = sorted({reason for reason in why.values() if reason})
    served = [layer for layer in layers if not why[layer]]
    if not served:
        raise ValueError(f"fast_generation cannot serve any of the model's {len(layers)} NF4 layers: {reasons[0]}.")
    for block_size in {layer.state.blocksize for layer in served}:
        if problem := obstacle_here(block_size):
            raise RuntimeError(
                f"fast_generation: {problem}. Leave it out; model.merge_adapter() is the fast way to generate here."
            )
    if reasons:
        logger.warning(
            "%d of %d NF4 layers are unpacked as ever: %s.", len(layers) - len(served), len(layers), reasons
        )
    with lock:
        held = []
        for layer in served:
            if layer.repacked is None:
                layer.repacked = Repacked()
            layer.repacked.users += 1
            held.append((layer, layer.repacked))
    return held


def _let_go(held: list[tuple[Linear4bit, Repacked]]) -> None:
    with lock:
        for layer, repacked in held:
            repacked.users -= 1
            # A layer may have been made dense meanwhile, and a dense one packed again.
            if not repacked.users and layer.__dict__.get("repacked") is repacked:
                del layer.repacked


def _obstacle(layer: Linear4bit) -> str:
    device = layer.weight.device.type
    if device != "cpu":
        return f"they are on {device}, where bitsandbytes' own forward is the fast one: leave it out"
    dtype = layer.compute_dtype or torch.bfloat16  # None: the input's, seen then
    if dtype != torch.bfloat16:
        return f"they compute in {dtype}, and the kernel in bfloat16: load the model with dtype=torch.bfloat16"
    return obstacle_to_shape(layer.state)

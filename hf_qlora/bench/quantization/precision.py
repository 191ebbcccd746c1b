"""`precision`: what the model loses in NF4, layer by layer and as a whole, against a dense reference.

    mean squared error, largest error    of a layer's weights, W − Q(W), in the dtype that the layer computes with
    relative error                       ‖W − Q(W)‖ / ‖W‖, Frobenius
    KL                                   mean over positions of KL(p ‖ q) in nats, p of the dense model, q in NF4
    perplexity                           exp of the mean loss a token

The reference is loaded once and only read: what is quantized is a copy, and both are compared piece by piece in
float32. (A comparison that casts the model with `.to(float32)` compares it with itself: that works in place.) Texts
are those of `hf_qlora/merge/probe.py`, two paragraphs of prose, unless others are named; a model without a tokenizer
gets random tokens, on which its perplexity says nothing.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_qlora.bench.quantization.case import Case
from hf_qlora.bench.quantization.rows import Row, numbers
from hf_qlora.bench.quantization.settings import Context, texts_of
from hf_qlora.config import NF4Config
from hf_qlora.merge import probe
from hf_qlora.quant.base import quantize_model
from hf_qlora.quant.linear4bit import Linear4bit, dense_weight
from hf_qlora.quant.rounding import DensePieces, PackedPieces


SCHEMES = {"NF4": NF4Config(), "NF4, scales in float32": NF4Config(double_quant=False)}


def run(context: Context) -> list[Row]:
    context.at("dense")
    reference = context.dense()
    ids, text = probe.rows(reference, texts_of(context.settings), None)
    context.notes.append(f"KL and perplexity are on {text}.")
    expected = [log_probabilities(reference, row) for row in ids]
    rows = numbers("dense", {"kl": 0.0, "perplexity": perplexity(expected, ids)})
    for arm, config in SCHEMES.items():
        context.at(arm)
        quantized = quantize_model(copy.deepcopy(reference), config)
        found = [log_probabilities(quantized, row) for row in ids]
        layers = layer_errors(reference, quantized)
        total = {
            "kl": divergence(expected, found),
            "perplexity": perplexity(found, ids),
            "relative_error": _of_all(layers.values()),
            "max_error": max(layer["max_error"] for layer in layers.values()),
        }
        rows += numbers(arm, total)
        for name, layer in layers.items():
            shown = {metric: layer[metric] for metric in ("mse", "max_error", "relative_error")}
            rows += numbers(arm, shown, name, layer=True)
    return rows


def layer_errors(reference: nn.Module, quantized: nn.Module) -> dict[str, dict[str, float]]:
    """Of each quantized layer, by name; the reference is read and nothing else."""
    return {
        name: weight_error(dense_weight(reference.get_submodule(name)), layer)
        for name, layer in quantized.named_modules()
        if isinstance(layer, Linear4bit)
    }


def weight_error(weight: Tensor, layer: Linear4bit) -> dict[str, float]:
    """Of one layer, with the sums of squares that they are of."""
    squares, norm, largest = 0.0, 0.0, 0.0
    pieces = zip(DensePieces(weight, layer.state.blocksize), PackedPieces(layer.weight.data, layer.state), strict=True)
    for dense, packed in pieces:
        difference = (dense - packed).double()
        squares += float(difference.square().sum())
        norm += float(dense.double().square().sum())
        largest = max(largest, float(difference.abs().max()))
    return {
        "mse": squares / weight.numel(),
        "max_error": largest,
        "relative_error": math.sqrt(squares / norm) if norm else 0.0,
        "squares": squares,
        "norm": norm,
    }


def _of_all(layers: Any) -> float:
    found = list(layers)
    norm = sum(layer["norm"] for layer in found)
    return math.sqrt(sum(layer["squares"] for layer in found) / norm) if norm else 0.0


@torch.no_grad()
def log_probabilities(model: Any, ids: Tensor) -> Tensor:
    """(tokens, vocabulary), float32, on the CPU."""
    ids = ids.to(model.device)
    logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits[0].float().log_softmax(-1).cpu()


def divergence(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Mean KL over all positions, nats."""
    pairs = ((p.double(), q.double()) for p, q in zip(expected, found, strict=True))
    total = sum(float((p.exp() * (p - q)).sum()) for p, q in pairs)
    return max(total / sum(len(p) for p in expected), 0.0)


def perplexity(found: Sequence[Tensor], ids: Sequence[Tensor]) -> float:
    """Over all tokens but the first of each row."""
    losses = [-p[:-1].gather(1, row[0, 1:, None]) for p, row in zip(found, ids, strict=True)]
    return math.exp(float(torch.cat(losses).double().mean()))


CASE = Case(
    "precision",
    "Precision",
    "Errors are of weights, KL and perplexity of what the whole model says; the reference is the dense model as its "
    "files have it, in the same dtype, and is only read. NF4 of Gaussian weights in blocks of 64 has a relative "
    "error of 0.092.",
    run,
    lambda sizes: 2 * sizes.dense + sizes.nf4,
    reference="dense",
)

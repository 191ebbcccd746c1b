"""`double-quant`: what the block size and the quantization of the scales cost and save, in NF4 and FP4.

    bits a weight    of the codes and scales that were made, over the weights
    relative error   ‖W − Q(W)‖ / ‖W‖ over all layers that `quantize_model` would pack
    seconds          to make one weight of each shape dense again, the schemes taking turns

Codes take 4 bits. A scale of 32 bits for each block of B weights takes 32/B; quantized itself it takes 8/B, and
32/(256 B) for the scales of scales.
"""

from __future__ import annotations

import math

from bitsandbytes.functional import QuantState
from torch import Tensor

from hf_qlora.bench.measure import clock, in_turn
from hf_qlora.bench.quantization.case import Case
from hf_qlora.bench.quantization.rows import Row, numbers, timings
from hf_qlora.bench.quantization.settings import Context
from hf_qlora.config import NF4Config
from hf_qlora.quant.dequantize import dequantize_weight
from hf_qlora.quant.linear4bit import dense_weight
from hf_qlora.quant.packing import quantize_weight
from hf_qlora.quant.rounding import distances
from hf_qlora.quant.scheme import QUANT_TYPES, Scheme
from hf_qlora.quant.selection import quantizable_layers


REPEATS = 4  # dequantizations in a timed round: one alone is a few milliseconds


def run(context: Context) -> list[Row]:
    schemes = [
        Scheme(kind, size, nested)
        for kind in QUANT_TYPES
        for size in context.settings.block_sizes
        for nested in (False, True)
    ]
    layers = quantizable_layers(context.dense(), NF4Config(), ())[0].values()
    weights = {id(layer.weight): dense_weight(layer) for layer in layers}
    errors = dict.fromkeys(schemes, 0.0)
    for number, weight in enumerate(weights.values(), 1):
        context.at(f"errors of layer {number} of {len(weights)}")
        for scheme, distance in distances(weight, schemes).items():
            errors[scheme] += distance**2
    norm = sum(float(weight.double().square().sum()) for weight in weights.values())
    samples = list({weight.shape: weight for weight in weights.values()}.values())
    packed = {scheme: [quantize_weight(weight, scheme) for weight in samples] for scheme in schemes}
    rows: list[Row] = []
    for scheme in schemes:
        found = {"bits": bits(packed[scheme]), "relative_error": math.sqrt(errors[scheme] / norm) if norm else 0.0}
        rows += numbers(arm_of(scheme), found, setting_of(scheme))
    for scheme, seconds in _dequantized(context, packed).items():
        rows += timings({arm_of(scheme): seconds}, setting_of(scheme))
    return rows


def _dequantized(context: Context, packed: dict[Scheme, list[tuple[Tensor, QuantState]]]) -> dict[Scheme, list[float]]:
    device = context.settings.device
    seconds: dict[Scheme, list[float]] = {scheme: [] for scheme in packed}
    for number in range(-1, context.settings.rounds):
        context.at(f"dequantizing, round {number + 1}")
        for scheme, weights in in_turn(packed.items(), number):
            started = clock(device)
            for _ in range(REPEATS):
                for codes, state in weights:
                    dequantize_weight(codes, state)
            taken = (clock(device) - started) / REPEATS
            if number >= 0:
                seconds[scheme].append(taken)
    return seconds


def bits(packed: list[tuple[Tensor, QuantState]]) -> float:
    """Bits a weight of what is stored: codes, scales, and scales of scales with their mean."""
    stored: list[Tensor] = []
    for codes, state in packed:
        stored += [codes, state.absmax]
        if state.nested:
            stored += [state.state2.absmax, state.offset]
    weights = sum(int(state.shape.numel()) for _, state in packed)
    return 8 * sum(tensor.nbytes for tensor in stored) / weights


def arm_of(scheme: Scheme) -> str:
    return f"{scheme.quant_type.upper()}, scales {'in 8 bits' if scheme.double_quant else 'in float32'}"


def setting_of(scheme: Scheme) -> str:
    return f"blocks of {scheme.block_size}"


CASE = Case(
    "double-quant",
    "Double quantization",
    "The error hardly moves when the scales are quantized too, and the bits do: about 4.13 for 4.5 in blocks of 64. "
    "Larger blocks save less than that, and lose more.",
    run,
    lambda sizes: 2 * sizes.dense,
    language=False,
)

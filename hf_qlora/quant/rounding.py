"""What rounding one layer to 4 bits loses, and what its weights look like. Nothing is changed.

    error      ‖W − Q(W)‖ / ‖W‖                        Frobenius; Q(W) in W's dtype, as the layer would compute with it
    peak       the largest |w| / rms of its row        about 3 to 4 for Gaussian rows
    kurtosis   mean (w − mean)⁴ / variance²            3 for Gaussian weights

A block's scale is its largest weight, so that one far from the rest costs all of them: error grows with both signals.
A weight is read in pieces of rows, and of its packed form only a piece is ever dense: beside the model, a layer takes
its codes and scales. Sums are in float64.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from bitsandbytes.functional import QuantState
from torch import Tensor

from hf_qlora.quant.dequantize import block_scales, dequantize_weight
from hf_qlora.quant.packing import nest_scales, quantize_weight, rows_at_a_time
from hf_qlora.quant.scheme import Scheme


GAUSSIAN_WEIGHTS = 2**20  # 16,384 blocks of 64: the error is known to 0.1 %


@dataclass(frozen=True)
class Spread:
    """How the values of a weight lie; see the module.

    Attributes:
        norm: ‖W‖, Frobenius.
        kurtosis: None where all values are one.
    """

    norm: float
    peak: float
    kurtosis: float | None


def distances(weight: Tensor, schemes: Iterable[Scheme]) -> dict[Scheme, float]:
    """‖W − Q(W)‖ of a dense weight, (out_features, in_features); codes are made once for both kinds of scales."""
    found: dict[Scheme, float] = {}
    wanted = list(schemes)
    for flat in dict.fromkeys(replace(scheme, double_quant=False) for scheme in wanted):
        packed, state = quantize_weight(weight, flat)
        nested = replace(flat, double_quant=True)
        if flat in wanted:
            found[flat] = distance(weight, packed, state)
        if nested in wanted:
            nest_scales(state)
            found[nested] = distance(weight, packed, state)
    return {scheme: found[scheme] for scheme in wanted}


def distance(weight: Tensor, packed: Tensor, state: QuantState) -> float:
    """‖W − Q(W)‖ of a weight, (out_features, in_features), and packed codes of its shape."""
    pairs = zip(DensePieces(weight, state.blocksize), PackedPieces(packed, state), strict=True)
    return math.sqrt(sum(_norm(piece - values) ** 2 for piece, values in pairs))


def spread(pieces: Iterable[Tensor]) -> Spread:
    """See the module; of a weight that comes in pieces of rows, float32, which are gone through twice.

    Args:
        pieces: an iterable that can be started again, such as a list.
    """
    count, total, squares, peak = 0, 0.0, 0.0, 0.0
    for piece in pieces:
        count, total = count + piece.numel(), total + float(piece.sum(dtype=torch.float64))
        squares += _norm(piece) ** 2
        largest = piece.abs().amax(1, keepdim=True)
        least = float((piece / largest).square().mean(1).nan_to_num(nan=1.0).min())  # NaN: a row of zeros
        peak = max(peak, 1 / math.sqrt(least))
    mean = total / count
    variance = squares / count - mean**2
    if variance <= 1e-9 * mean**2 or not variance:  # float32's rounding of a constant
        return Spread(math.sqrt(squares), peak, None)
    scaled = (((piece - mean) / math.sqrt(variance)).square() for piece in pieces)
    kurtosis = sum(_norm(z) ** 2 for z in scaled) / count
    return Spread(math.sqrt(squares), peak, kurtosis)


@dataclass(frozen=True)
class DensePieces:
    """A weight, (out_features, in_features), in pieces of whole rows and blocks, float32."""

    weight: Tensor
    block_size: int

    def __iter__(self) -> Iterator[Tensor]:
        for piece in self.weight.detach().split(
            rows_at_a_time(self.weight.device, self.weight.shape[1], self.block_size)
        ):
            yield piece.float()


@dataclass(frozen=True)
class PackedPieces:
    """The same of a packed weight; the values are those of its dtype."""

    packed: Tensor
    state: QuantState

    def __iter__(self) -> Iterator[Tensor]:
        state, size = self.state, self.state.blocksize
        N, K = state.shape
        codes, scales = self.packed.view(torch.uint8).reshape(-1), block_scales(state)
        rows = rows_at_a_time(codes.device, K, size)
        for first in range(0, N, rows):
            start, stop = first * K, min(first + rows, N) * K
            part = copy.copy(state)
            part.nested, part.shape = False, torch.Size((1, stop - start))
            part.absmax = scales[start // size : -(-stop // size)]
            values = dequantize_weight(codes[start // 2 : -(-stop // 2)], part, torch.float32)
            yield values.reshape(-1, K)


@functools.cache
def gaussian_error(scheme: Scheme) -> float:
    """The error of Gaussian weights, as a yardstick: 0.0920 in NF4 and 0.1220 in FP4, in blocks of 64."""
    weight = torch.randn(2**8, GAUSSIAN_WEIGHTS // 2**8, generator=torch.Generator().manual_seed(0))
    return distances(weight, [scheme])[scheme] / _norm(weight)


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))

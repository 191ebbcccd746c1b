"""A stand-in for bitsandbytes' AVX512-BF16 kernel, written from the description of its layout, for every machine."""

from __future__ import annotations

import torch
from bitsandbytes.functional import QuantState
from torch import Tensor


def decoded(codes: Tensor, state: QuantState, scales: Tensor) -> Tensor:
    """The weight, (N, K), in float64: one code after the other, from the byte and the half byte that it is in."""
    N, K = state.shape
    row, column = torch.arange(N)[:, None], torch.arange(K)[None, :]
    tile, inside = row // 32, row % 32
    byte = codes.reshape(-1)[tile * 32 * (K // 2) + (column // 2) * 32 + 2 * (inside % 16) + column % 2]
    code = torch.where(inside < 16, byte & 15, byte >> 4).long()
    return state.code.double()[code] * scales.double()[column // state.blocksize, row]


class StandIn:
    """Takes the arguments of `repacked.gemv`, and counts its calls."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor, self.calls = factor, 0

    def __call__(self, x: Tensor, codes: Tensor, state: QuantState, scales: Tensor) -> Tensor:
        assert x.is_contiguous()
        assert x.dtype == scales.dtype == torch.bfloat16
        self.calls += 1
        return (self.factor * (x.double() @ decoded(codes, state, scales).t())).to(torch.bfloat16)

"""The form of NF4 codes that bitsandbytes' CPU kernel multiplies by without unpacking them; AVX512-BF16 alone has it.

    codes (N, K/2)            tiles of 32 rows; in a tile, for each pair of columns, 32 bytes: byte 2i + p has column p
                              of row i in its low and of row 16 + i in its high half
    scales (K/block, N)       bfloat16, no longer nested

For a few rows of x the product takes a fraction of the time of unpacking the weight, and reads a quarter of the bytes
of a dense one. The scales' rounding changes a weight by 2^-9 at most, as rounding it to bfloat16 does: against exact
arithmetic the product is off by 0.29 % where that of the dequantized weight is off by 0.23 %.

It is another copy: the layer's own codes and scales are never touched, so that training, merging and saving are what
they were. bitsandbytes repacks in place, and neither its own training nor PEFT's merge know of it afterwards.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cache

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise, has_avx512bf16, quantize_4bit
from torch import Tensor


TILE = 32  # rows
# Up to here the kernel is the faster way for every shape of weight that was measured; with more it loses on some.
MAX_ROWS = 32
# The kernel's error is 0.003 in the norm, more on a tiny weight; of a wrong layout or a wrong scale it is near 1.
_TOLERANCE = 0.02

lock = threading.Lock()  # while it is decided which layers have such a form


@dataclass(eq=False)
class Repacked:
    """A layer's weight in that form, made when first used, and again when the weight has been replaced.

    Attributes:
        users: how many open `fast_generation`s want it.
    """

    users: int = 0
    _form: _Form | None = None  # replaced as a whole: other threads may be multiplying

    def multiply(self, x: Tensor, packed: Tensor, state: QuantState) -> Tensor:
        """x Wᵀ, (..., out_features), for x (..., in_features); both in bfloat16.

        Args:
            packed, state: the weight as the layer has it.
        """
        form = self._form
        if form is None or not form.is_of(packed, state):
            form = self._form = _Form(packed, state)
        return gemv(x.contiguous(), form.codes, state, form.scales)

    @property
    def nbytes(self) -> int:
        return 0 if self._form is None else self._form.codes.nbytes + self._form.scales.nbytes


class _Form:
    """Codes and scales, and what they were made of, which is held so that nothing else can have its address."""

    def __init__(self, packed: Tensor, state: QuantState) -> None:
        self._packed, self._version = packed.detach(), version_of(packed)
        self._state, self._absmax = state, state.absmax
        self.codes, self.scales = repack_codes(packed, state), flat_scales(state)

    def is_of(self, packed: Tensor, state: QuantState) -> bool:
        same = packed.data_ptr() == self._packed.data_ptr() and version_of(packed) == self._version
        return same and state is self._state and state.absmax is self._absmax


def version_of(tensor: Tensor) -> int:
    """Goes up where a tensor is written to; 0 for one made in inference mode, of which torch does not count it."""
    return 0 if tensor.is_inference() else tensor._version


def gemv(x: Tensor, codes: Tensor, state: QuantState, scales: Tensor) -> Tensor:
    """bitsandbytes' kernel, which reads x's rows as contiguous, however they are."""
    result: Tensor = torch.ops.bitsandbytes.gemv_4bit.default(
        x, codes, state.shape, scales, state.code, state.blocksize
    )
    return result


def repack_codes(packed: Tensor, state: QuantState) -> Tensor:
    """Codes as bitsandbytes stores them, two a byte along rows, in tiles; (out_features, in_features / 2)."""
    N, K = state.shape
    tiles = packed.view(torch.uint8).reshape(N // TILE, 2, TILE // 2, K // 2).transpose(2, 3)
    low, high = tiles[:, 0], tiles[:, 1]
    even, odd = (high & 0xF0) | (low >> 4), (high << 4) | (low & 0x0F)
    return torch.stack([even, odd], -1).reshape(N, K // 2)


def flat_scales(state: QuantState) -> Tensor:
    """The scales as the kernel reads them, (in_features / block size, out_features), in bfloat16."""
    N, K = state.shape
    absmax = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(absmax, state.state2) + state.offset
    scales: Tensor = absmax.reshape(N, K // state.blocksize).t().to(torch.bfloat16).contiguous()
    return scales


def obstacle_to_shape(state: QuantState) -> str:
    """Why the kernel cannot read a weight, or ''."""
    N, K = state.shape
    if N % TILE or K % state.blocksize:
        return (
            f"a weight of {N} × {K}: rows must be a multiple of {TILE}, columns of the block size, {state.blocksize}"
        )
    return "" if state.quant_type == "nf4" else f"quant_type={state.quant_type!r}"


def obstacle_here(block_size: int) -> str:
    """Why this machine cannot, or ''."""
    if not has_avx512bf16():
        return "this processor has no AVX512-BF16, for which alone bitsandbytes has such a kernel"
    return _kernel_error(block_size)


@cache
def _kernel_error(block_size: int) -> str:
    """Compare the kernel with the dequantized product on a small weight: another bitsandbytes may read other forms."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2 * TILE, 2 * block_size, generator=generator)
    packed, state = quantize_4bit(weight, blocksize=block_size, quant_type="nf4", compress_statistics=True)
    x = torch.randn(3, 2 * block_size, generator=generator).to(torch.bfloat16)
    found = Repacked().multiply(x, packed, state).double()
    expected = x.double() @ dequantize_4bit(packed, state).double().t()
    error = float((found - expected).norm() / expected.norm())
    if error < _TOLERANCE:
        return ""
    return f"the installed bitsandbytes computes something else in this form (a relative error of {error:.2g})"

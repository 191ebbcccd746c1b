"""The dense weight of packed codes: by bitsandbytes, or by the Triton kernel that does it in one launch.

`implementation` chooses for all layers. "auto" takes Triton for CUDA tensors where it is installed, knows the format,
and has, once in this process, given bit for bit what bitsandbytes gives on that device; else bitsandbytes. "triton"
and "bitsandbytes" are taken at their word: where they cannot serve, they raise.
"""

from __future__ import annotations

import copy
import logging
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise, quantize_4bit
from torch import Tensor

from hf_qlora.quant.codebook import nf4_levels


logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that bitsandbytes unpacks weights to

Implementation = Literal["auto", "bitsandbytes", "triton"]

implementation: Implementation = "auto"


def dequantize_weight(
    packed: Tensor, state: QuantState, dtype: torch.dtype | None = None, impl: Implementation | None = None
) -> Tensor:
    """The dense weight of packed codes, in the state's shape.

    Args:
        packed (`torch.Tensor`): two codes a byte, of any dtype and shape.
        state: how they are packed.
        dtype: of the result; the values are those of the state's dtype, by default also the result's.
        impl: instead of `implementation`.

    Raises:
        ImportError: Triton was asked for and is not installed.
        ValueError: an unknown `impl`, or Triton was asked for and does not know the format or the device.
    """
    impl = impl or implementation
    if impl not in ("auto", "bitsandbytes", "triton"):
        raise ValueError(f"implementation={impl!r} is not known; choose 'auto', 'bitsandbytes' or 'triton'.")
    dtype = dtype or state.dtype
    if impl == "triton" or (impl == "auto" and packed.is_cuda and _triton_serves(packed.device, state, dtype)):
        return _by_triton(packed, state, dtype)
    return _by_bitsandbytes(packed, state).to(dtype)


def product_weight(packed: Tensor, state: QuantState, dtype: torch.dtype) -> Tensor:
    """The dense weight that a product in `dtype` is of; arguments as above.

    Its values are those of `dtype`, not rounded to the state's first: so bitsandbytes' forward has it, since 0.50. Its
    backward rounds twice, and ours does not.
    """
    if state.dtype != dtype:
        state = copy.copy(state)
        state.dtype = dtype if dtype in DTYPES else torch.float32
    return dequantize_weight(packed, state, dtype)


def wide_weight(packed: Tensor, state: QuantState, compute_dtype: torch.dtype | None) -> Tensor:
    """The dense weight in the wider of the state's dtype and that of its products: what was trained on, or more."""
    return product_weight(packed, state, torch.promote_types(state.dtype, compute_dtype or state.dtype))


def block_scales(state: QuantState) -> Tensor:
    """The scale of each block, (blocks,), float32, of scales that are nested or not."""
    scales: Tensor = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    return scales.float()


def _by_bitsandbytes(packed: Tensor, state: QuantState) -> Tensor:
    """In the state's dtype.

    On AVX-512 processors bitsandbytes reads the scales of a weight whose rows are not whole blocks from wrong places:
    silently, a relative error of 0.2 to 0.5 instead of 0.09. One long row has no such places.
    """
    if packed.device.type != "cpu" or state.shape[-1] % state.blocksize == 0:
        whole: Tensor = dequantize_4bit(packed, state)
        return whole
    row = copy.copy(state)
    row.shape = torch.Size((1, state.shape.numel()))
    # An odd length falls back to code that bitsandbytes compiles, for seconds, at the first call.
    with torch.compiler.set_stance("force_eager") if row.shape[-1] % 2 else nullcontext():
        flat: Tensor = dequantize_4bit(packed, row)
        return flat.reshape(state.shape)


def _by_triton(packed: Tensor, state: QuantState, dtype: torch.dtype) -> Tensor:
    from hf_qlora.kernels.triton import DTYPES, Nested, dequantize_nf4

    unknown = _unknown_to_triton(state)
    if unknown:
        raise ValueError(f"the Triton kernels do not know {unknown}; choose 'auto' or 'bitsandbytes'.")
    # A float32 product rounded to bfloat16 is the same whether it was written as float32 in between or not.
    direct = dtype in DTYPES and state.dtype == torch.float32
    nested = Nested(state.state2.code, state.state2.absmax, state.offset) if state.nested else None
    weight = dequantize_nf4(
        packed.contiguous().view(torch.uint8),
        state.absmax,
        _levels(packed.device),
        state.shape,
        dtype if direct else state.dtype,
        state.blocksize,
        nested,
    )
    return weight.to(dtype)


def _unknown_to_triton(state: QuantState) -> str | None:
    """What of the format the kernel has not been written for."""
    if state.quant_type != "nf4":
        return f"quant_type={state.quant_type!r}"
    if state.nested and state.state2.blocksize != 256:
        return f"scales in groups of {state.state2.blocksize}"
    if not state.nested and state.absmax.dtype != torch.float32:
        return f"scales in {state.absmax.dtype}"
    return None


def _triton_serves(device: torch.device, state: QuantState, dtype: torch.dtype) -> bool:
    return not _unknown_to_triton(state) and _triton_is_right(
        device, state.dtype, dtype, state.blocksize, state.nested
    )


@cache
def _triton_is_right(
    device: torch.device, packed_from: torch.dtype, dtype: torch.dtype, block_size: int, nested: bool
) -> bool:
    """Compare the kernel with bitsandbytes on a small weight: what it was tested on may differ from this device."""
    if torch.version.hip or find_spec("triton") is None:
        return False
    # 255 · 16 weights: the last program and the last block are not whole.
    weight = torch.randn(255, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -6, 255)[:, None]
    try:
        packed, state = quantize_4bit(
            weight.to(device, packed_from), blocksize=block_size, compress_statistics=nested, quant_type="nf4"
        )
        found, expected = _by_triton(packed, state, dtype), _by_bitsandbytes(packed, state).to(dtype)
        different = int((found.view(torch.uint8) != expected.view(torch.uint8)).sum())  # -0 is not 0 here
        right, problem = not different, f"{different} of {found.nbytes} bytes differ"
    except Exception as error:  # a compiler or a driver may raise anything, and bitsandbytes serves as well
        right, problem = False, f"{type(error).__name__}: {error}"
    if not right:
        logger.warning(
            "The Triton kernel does not give what bitsandbytes gives on %s (%s, block size %d): %s. bitsandbytes is "
            "used.",
            device,
            dtype,
            block_size,
            problem,
        )
    return right


@cache
def _levels(device: torch.device) -> Tensor:
    """Not the state's own: bitsandbytes does not read those either."""
    return nf4_levels(device)

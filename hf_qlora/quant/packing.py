"""Packing a weight: codes and scales of a dense one, as bitsandbytes would have them, with a bounded workspace.

A `QuantState` is bitsandbytes' description of a packed weight: its scales, shape, dtype, block size and tables.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from bitsandbytes.functional import (
    QuantState,
    _convert_weight_packed_for_cpu_inverse,
    quantize_4bit,
    quantize_blockwise,
)
from torch import Tensor

from hf_qlora.config import NF4Config
from hf_qlora.quant.scheme import NESTED_BLOCK_SIZE, Scheme


# Weights handled at a time: on the CPU bitsandbytes compares each with all 16 levels, 128 bytes a weight.
CHUNK = {"cpu": 2**16, "cuda": 2**26}

_tables: dict[tuple[torch.device, torch.dtype, bytes], Tensor] = {}


def quantize_weight(weight: Tensor, config: NF4Config | Scheme) -> tuple[Tensor, QuantState]:
    """Quantize as `bitsandbytes.functional.quantize_4bit` does, with a bounded workspace.

    Blocks run over the flat, row-major weight, so that pieces of whole blocks have the codes and scales of the whole;
    the scales are nested over the whole weight.

    Args:
        weight (`torch.Tensor`, (out_features, in_features), float32, bfloat16 or float16): contiguous or not.

    Returns:
        the packed codes, `torch.uint8`, (⌈numel / 2⌉, 1), and the `QuantState`.
    """
    # Made before the pieces: small results between large temporary ones would keep the allocator from reusing space.
    packed = torch.empty(-(-weight.numel() // 2), 1, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-weight.numel() // config.block_size), dtype=torch.float32, device=weight.device)
    done = 0
    for piece in weight.detach().split(rows_at_a_time(weight.device, weight.shape[1], config.block_size)):
        with _float32_tables():
            codes, state = quantize_4bit(piece.reshape(-1), blocksize=config.block_size, quant_type=config.quant_type)
        packed[done // 2 : done // 2 + len(codes)] = codes
        absmax[done // config.block_size : done // config.block_size + len(state.absmax)] = state.absmax
        done += piece.numel()
    result = QuantState(
        absmax=absmax,
        shape=weight.shape,
        dtype=weight.dtype,
        blocksize=config.block_size,
        code=state.code,
        quant_type=config.quant_type,
    )
    if config.double_quant:
        nest_scales(result)
    share_tables(result)
    return packed, result


def nest_scales(state: QuantState) -> None:
    """Double quantization: write the scales of a weight in 8 bits, in place."""
    scales = state.absmax
    state.offset = scales.mean()
    state.absmax, state.state2 = quantize_blockwise(scales - state.offset, blocksize=NESTED_BLOCK_SIZE)
    state.nested = True


def unpacked(packed: Tensor, state: QuantState) -> tuple[Tensor, QuantState]:
    """A weight and its state without bitsandbytes' CPU repacking; as they are where there is none. `state` is kept."""
    if not getattr(state, "packing_format_for_cpu", False):
        return packed, state
    codes, result = _convert_weight_packed_for_cpu_inverse(packed, copy.copy(state))
    if not result.nested:  # bitsandbytes leaves these scales as repacked: bfloat16, transposed
        result.absmax = result.absmax.t().reshape(-1).float()
    return codes, result


def chunk_of(device: torch.device) -> int:
    """How many weights to handle at a time on a device."""
    return CHUNK.get(device.type, CHUNK["cpu"])


def rows_at_a_time(device: torch.device, row_length: int, block_size: int) -> int:
    """Rows of about a chunk of weights in all that make whole blocks, and with them whole bytes."""
    whole = block_size // math.gcd(row_length, block_size)
    return max(chunk_of(device) // row_length // whole, 1) * whole


def share_tables(state: QuantState) -> None:
    """Let all layers of a device share the constant code tables, which bitsandbytes keeps per layer (1 KiB each)."""
    state.code = _shared(state.code)
    if state.nested:
        state.state2.code = _shared(state.state2.code)


def _shared(table: Tensor) -> Tensor:
    values = table.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return _tables.setdefault((table.device, table.dtype, values), table)


@contextmanager
def _float32_tables() -> Iterator[None]:
    """bitsandbytes makes the table of levels in torch's default dtype, whatever that is."""
    default = torch.get_default_dtype()
    if default == torch.float32:
        yield
        return
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(default)

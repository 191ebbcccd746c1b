"""Two kernels for NVIDIA GPUs: nested NF4 to a dense weight in one launch, and logits to their loss and gradient.

NF4 comes out bit for bit as from bitsandbytes' three launches.

    absmax_b = table[code_b] · group[b / 256] + offset     or read as it is, where the scales are not nested
    weight_i = level[nibble_i] · absmax_b,  rounded once to the result's dtype

The products and the sum are fp32, each rounded by itself. bitsandbytes' CUDA kernels are built with --use_fast_math: a
product below 2⁻¹²⁶ becomes zero, while torch's addition of the offset keeps what is small. `mul.rn.ftz` is such a
product, and being explicitly rounded it is never fused with the addition. In Triton's interpreter, which cuts bfloat16
instead of rounding, the kernel multiplies as a CPU does and rounds by itself (`NATIVE` is false).

In memory: blocks run over the flat weight, two codes a byte, the earlier one in the high nibble. A program writes TILE
weights, taken as rows of 32, the shortest block, so that a row has one scale whatever the block size. A thread reads
runs of bytes that make 16 bytes of weights, and writes these beside its neighbour's: nothing is exchanged by threads.

Rejected: a tree of selects for the levels, 15 instructions a weight where the memory leaves time for about 20; a table
of 256 pairs, which does not lie in one cache line; `tl.gather`, which exchanges them.

The loss goes over a row of logits twice: for its maximum and sum of exponentials, and to put the gradient in its
place. In between nothing but two numbers is kept, so logits in 16 bits are never there in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        "the Triton kernels need Triton, which is not installed: python -m pip install 'hf-qlora[triton]' (on Linux), "
        "or choose 'bitsandbytes'."
    ) from error


DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK_SIZE = 256
TILE = 2048
WARPS = 4  # 16 weights a thread
LOGITS = 8192  # of a row at a time

_TILE = tl.constexpr(TILE)
_ROW = tl.constexpr(BLOCK_SIZES[0])
_GROUP = tl.constexpr(NESTED_BLOCK_SIZE)


@dataclass(frozen=True)
class Nested:
    """What 8-bit scales are read with.

    Attributes:
        table (`torch.Tensor`, (256,), float32): the level of each code.
        absmax (`torch.Tensor`, (⌈blocks / 256⌉,), float32): the scale of each group of scales.
        offset (`torch.Tensor`, (), float32): added to every scale.
    """

    table: Tensor
    absmax: Tensor
    offset: Tensor


def dequantize_nf4(
    packed: Tensor,
    absmax: Tensor,
    levels: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    block_size: int,
    nested: Nested | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The dense weight of packed codes.

    All tensors are contiguous, on one CUDA device, or on the CPU in Triton's interpreter (TRITON_INTERPRET=1).

    Args:
        packed (`torch.Tensor`, uint8): ⌈numel / 2⌉ bytes, of any shape.
        absmax (`torch.Tensor`, (⌈numel / block_size⌉,)): the scales in float32; with `nested`, their codes, uint8.
        levels (`torch.Tensor`, (16,), float32): the NF4 levels, ascending.
        shape, dtype: of the weight; float16, bfloat16 or float32.
        block_size: weights per scale, one of `BLOCK_SIZES`.
        nested: how the scales' codes are read.
        out (`torch.Tensor`, *optional*): of that shape and dtype, to write to.

    Raises:
        ValueError: for tensors that do not fit together, or that are where the kernel cannot run.
    """
    if dtype not in DTYPES or block_size not in BLOCK_SIZES:
        raise ValueError(
            f"dtype={dtype} with block_size={block_size} is not supported; choose from {DTYPES} and {BLOCK_SIZES}."
        )
    if torch.version.hip or not (packed.is_cuda or INTERPRETED):
        where = "ROCm" if torch.version.hip else f"device {packed.device}"
        raise ValueError(
            f"the Triton kernels run on NVIDIA GPUs, and the packed weight is on {where}; choose 'auto' or "
            "'bitsandbytes'. To try them on a CPU, set TRITON_INTERPRET=1 before hf_qlora is imported."
        )
    out = torch.empty(shape, dtype=dtype, device=packed.device) if out is None else out
    _check(packed, absmax, levels, tuple(shape), dtype, block_size, nested, out)
    # Triton launches on the current device, and nothing for a grid of 0.
    with torch.cuda.device_of(packed):
        _dequantize[(-(-out.numel() // TILE),)](
            out,
            packed,
            absmax,
            levels,
            nested and nested.table,
            nested and nested.absmax,
            nested and nested.offset,
            out.numel(),
            packed.numel(),
            BLOCK=block_size,
            NESTED=nested is not None,
            NATIVE=not INTERPRETED,
            RUN=8 // out.itemsize,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    return out


def logits_to_gradient(z: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
    """Turn logits into the gradient of the sum of their cross entropies, in place.

    Args:
        z (`torch.Tensor`, (rows, V), float16, bfloat16 or float32): contiguous.
        target (`torch.Tensor`, (rows,), int64): classes, all below V.
        smoothing: of the labels, 0 to 1.

    Returns:
        `torch.Tensor`, (rows,), float32: the losses.

    Raises:
        ValueError: tensors of another kind.
        RuntimeError: a class that is none of z's; on a GPU an assertion on the device, as of torch's cross entropy.
    """
    losses = z.new_empty(len(z), dtype=torch.float32)
    if z.dtype not in DTYPES or not z.is_contiguous() or (target.dtype, len(target)) != (torch.int64, len(z)):
        raise ValueError(
            f"logits of {z.dtype}, shape {tuple(z.shape)}, strides {z.stride()}, with {len(target)} targets of "
            f"{target.dtype}, are not supported: contiguous rows of one of {DTYPES}, and an int64 for each."
        )
    if len(z):
        z.gather(1, target[:, None])  # which looks at the classes; the kernel would read beside its row, silently
        with torch.cuda.device_of(z):
            _cross_entropy[(len(z),)](
                z,
                target.contiguous(),
                losses,
                smoothing,
                V=z.shape[1],
                TILE=min(LOGITS, triton.next_power_of_2(z.shape[1])),
                NATIVE=not INTERPRETED,
                num_warps=8,
            )
    return losses


def _check(
    packed: Tensor,
    absmax: Tensor,
    levels: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    block_size: int,
    nested: Nested | None,
    out: Tensor,
) -> None:
    """Raise a ValueError unless the kernel would stay within all tensors; it looks at none of their values."""
    numel = math.prod(shape)
    blocks = -(-numel // block_size)
    expected = [
        ("packed", packed, torch.uint8, -(-numel // 2)),
        ("absmax", absmax, torch.uint8 if nested else torch.float32, blocks),
        ("levels", levels, torch.float32, 16),
        ("out", out, dtype, numel),
    ]
    if nested:
        expected += [
            ("nested.table", nested.table, torch.float32, 256),
            ("nested.absmax", nested.absmax, torch.float32, -(-blocks // NESTED_BLOCK_SIZE)),
            ("nested.offset", nested.offset, torch.float32, 1),
        ]
    for name, tensor, kind, count in expected:
        if (tensor.dtype, tensor.numel(), tensor.device) != (kind, count, packed.device) or not tensor.is_contiguous():
            raise ValueError(
                f"{name} has {tensor.numel()} elements of {tensor.dtype} on {tensor.device}, strides "
                f"{tensor.stride()}; a weight of shape {shape} needs {count} of {kind} on {packed.device}, contiguous."
            )
    if out.shape != shape:
        raise ValueError(f"out has shape {tuple(out.shape)}; the weight has {shape}.")


# Triton has no types, for its decorator and for what it compiles: hence the ignored errors below.
@triton.jit  # type: ignore[untyped-decorator]
def _product(a, b, NATIVE: tl.constexpr):  # type: ignore[no-untyped-def]
    if NATIVE:
        return tl.inline_asm_elementwise(
            "mul.rn.ftz.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return a * b


@triton.jit  # type: ignore[untyped-decorator]
def _rounded(x, dtype: tl.constexpr, NATIVE: tl.constexpr):  # type: ignore[no-untyped-def]
    if NATIVE or dtype != tl.bfloat16:
        return x.to(dtype)
    else:
        bits = x.to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _dequantize(  # type: ignore[no-untyped-def]
    out,
    packed,
    absmax,
    levels,
    table,
    group,
    offset,
    numel,
    size,
    BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    NATIVE: tl.constexpr,
    RUN: tl.constexpr,  # bytes that make 16 bytes of weights
):
    start = tl.program_id(0).to(tl.int64) * _TILE  # may pass 2³¹
    row = tl.arange(0, _TILE // _ROW)
    first = start // BLOCK  # tiles and blocks are powers of two: either the tile starts a block or lies in one
    block = first + row * _ROW // BLOCK
    inside = start + row * _ROW < numel
    scale = tl.load(absmax + block, mask=inside, other=0)
    if NESTED:
        wide = tl.load(group + block // _GROUP, mask=inside, other=0.0)
        scale = _product(tl.load(table + scale.to(tl.int32)), wide, NATIVE) + tl.load(offset)
    at = row[:, None] * (_ROW // 2) + tl.arange(0, _ROW // 2)[None, :]
    # Without the bound a thread would read 16 bytes, and its weights would not lie beside its neighbour's.
    at = tl.max_contiguous(at, [1, RUN])
    left = tl.minimum(size - start // 2, _TILE // 2).to(tl.int32)
    code = tl.load(packed + start // 2 + at, mask=at < left, other=0).to(tl.int32)
    # Looked up apart and joined afterwards: so all loads have one layout.
    high = _product(tl.load(levels + (code >> 4)), scale[:, None], NATIVE)
    low = _product(tl.load(levels + (code & 15)), scale[:, None], NATIVE)
    weight = tl.reshape(tl.join(high, low), [_TILE // _ROW, _ROW])
    to = row[:, None] * _ROW + tl.arange(0, _ROW)[None, :]
    left = tl.minimum(numel - start, _TILE).to(tl.int32)
    tl.store(out + start + to, _rounded(weight, out.dtype.element_ty, NATIVE), mask=to < left)


@triton.jit
def _larger(a, b):  # type: ignore[no-untyped-def]
    return tl.maximum(a, b)


@triton.jit
def _sum(a, b):  # type: ignore[no-untyped-def]
    return a + b


@triton.jit  # type: ignore[untyped-decorator]
def _cross_entropy(  # type: ignore[no-untyped-def]
    z, target, losses, smoothing, V: tl.constexpr, TILE: tl.constexpr, NATIVE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    z += row * V
    wanted = tl.load(target + row)
    # Before the reductions, which keep the warps together: no warp has written a gradient there yet.
    expected = tl.load(z + wanted).to(tl.float32)
    column = tl.arange(0, TILE)
    # For each column of the tile, so that there is one reduction at the end.
    highest = tl.full([TILE], -3e38, tl.float32)
    total = tl.full([TILE], 0.0, tl.float32)
    summed = tl.full([TILE], 0.0, tl.float32)
    for start in range(0, V, TILE):
        at = start + column
        x = tl.load(z + at, mask=at < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, x)
        total = total * tl.exp(highest - higher) + tl.exp(x - higher)
        summed += tl.where(at < V, x, 0.0)
        highest = higher
    most = tl.reduce(highest, 0, _larger)
    whole = most + tl.log(tl.reduce(total * tl.exp(highest - most), 0, _sum))
    loss = whole - (1 - smoothing) * expected
    if smoothing > 0:
        loss -= smoothing * (tl.reduce(summed, 0, _sum) / V)
    tl.store(losses + row, loss)
    for start in range(0, V, TILE):
        at = start + column
        p = tl.exp(tl.load(z + at, mask=at < V, other=float("-inf")).to(tl.float32) - whole)
        p -= tl.where(at == wanted, 1 - smoothing, 0.0) + smoothing / V
        tl.store(z + at, _rounded(p, z.dtype.element_ty, NATIVE), mask=at < V)


INTERPRETED = not isinstance(_dequantize, triton.JITFunction)
"""Whether TRITON_INTERPRET was set when this module was imported: then it runs on CPU tensors, slowly."""

"""NF4 and double quantization, defined in plain torch: the specification that the tests hold bitsandbytes against.

The maths (arXiv 2305.14314), for a weight read row-major as one flat sequence w and cut into blocks of 64:
    absmax_b = max |w_i| over block b,   code_i = nearest NF4 level to w_i / absmax_b,   ŵ_i = level[code_i] · absmax_b
and double quantization writes the scales themselves in 8 bits, in groups of 256 blocks:
    offset = mean of absmax,   group_g = max |absmax_b − offset|,   code_b = map level of (absmax_b − offset) / group_g
    absmax_b ≈ map[code_b] · group_g + offset,   4 + 8/64 + 32/(64 · 256) = 4.127 bits per parameter

In memory: two codes a byte, the earlier weight in the high nibble; an odd last byte is filled with code 7 (zero).
Blocks run on across rows: a row whose length is not a multiple of the block size shares a block with the next one, and
the last block of the weight may be short.

To the bit, this is what bitsandbytes does on a CPU, including where it is not quite the maths above:
    * a full block is multiplied by 1 / absmax, the short last block is divided by absmax: a rounding apart;
    * a scale below 1e-38 is taken as 1e-38; in the short last block that is also what is stored;
    * midpoints and quotients are fp32, and a value on a midpoint takes the lower level;
    * scales do not get the nearest map level. They are first snapped to 65,536 points on [-1, 1] (the kernel looks the
      level up in a table of that size), which puts the seven map levels nearest to zero, zero among them, out of
      reach. The CUDA kernel searches the map itself, so nested codes written on the two devices may differ;
    * `offset` is a parallel sum: its last bit depends on the number of threads.

NaN and infinity are refused. They have no NF4 value: bitsandbytes spreads one of them over its block, with double
quantization over the whole weight, and may then write it back as zero.

Rejected: reshaping to (rows, blocks per row, 64), which reads better and is another format as soon as a row ends
inside a block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hf_qlora.quant.codebook import dynamic_map, nf4_levels


BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Weights per scale that bitsandbytes accepts for 4-bit types."""

NESTED_BLOCK_SIZE = 256
"""Scales per nested scale; the only value that bitsandbytes supports."""

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

ZERO_CODE = 7
SMALLEST_ABSMAX = 1e-38
GRID_INTERVALS = 65535


@dataclass(frozen=True)
class NestedAbsmax:
    """Double-quantized scales of one weight.

    Args:
        codes (`torch.Tensor`, (blocks,), uint8): dynamic-map level of each scale's distance from the mean.
        absmax (`torch.Tensor`, (ceil(blocks / 256),), fp32): largest such distance of each group of 256.
        offset (`torch.Tensor`, (), fp32): mean of the scales.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    offset: torch.Tensor


@dataclass(frozen=True)
class NF4Tensor:
    """A weight in NF4.

    Args:
        packed (`torch.Tensor`, (ceil(numel / 2),), uint8): two codes a byte, the earlier weight in the high nibble.
        absmax (`torch.Tensor` (blocks,), fp32, or `NestedAbsmax`): the scale of each block.
        shape (`torch.Size`), dtype (`torch.dtype`): of the weight, restored by `dequantize_nf4`.
        block_size (`int`): weights per scale.
    """

    packed: torch.Tensor
    absmax: torch.Tensor | NestedAbsmax
    shape: torch.Size
    dtype: torch.dtype
    block_size: int


def quantize_nf4(weight: torch.Tensor, block_size: int = 64, double_quant: bool = True) -> NF4Tensor:
    """Write a weight in NF4 (arXiv 2305.14314).

    Args:
        weight (`torch.Tensor`, any shape): fp32, bf16 or fp16; finite, not empty.
        block_size (`int`): weights per scale, one of `BLOCK_SIZES`.
        double_quant (`bool`): write the scales in 8 bits, see `quantize_absmax`.

    Raises:
        `ValueError`: for a block size, a dtype or a value that NF4 does not have.
    """
    _check(weight, block_size)
    scaled, absmax = _scale_blocks(weight.detach().reshape(-1).float(), block_size)
    codes = _nearest(scaled, nf4_levels(weight.device))
    scales = quantize_absmax(absmax) if double_quant else absmax
    return NF4Tensor(pack(codes), scales, weight.shape, weight.dtype, block_size)


def dequantize_nf4(quantized: NF4Tensor) -> torch.Tensor:
    """The weight that the codes stand for.

    Returns:
        `torch.Tensor` of the weight's shape and dtype; the product is taken in fp32 and rounded once.
    """
    absmax = quantized.absmax
    if isinstance(absmax, NestedAbsmax):
        absmax = dequantize_absmax(absmax)
    codes = unpack(quantized.packed, math.prod(quantized.shape))
    values = _scale_up(codes, nf4_levels(codes.device), absmax, quantized.block_size)
    return values.view(quantized.shape).to(quantized.dtype)


def quantize_absmax(absmax: torch.Tensor) -> NestedAbsmax:
    """Double quantization: write scales in the signed 8-bit dynamic map, centred on their mean.

    Args:
        absmax (`torch.Tensor`, (blocks,)): fp32 scales.
    """
    offset = absmax.mean()
    groups = _to_blocks(absmax - offset, NESTED_BLOCK_SIZE)
    nested_absmax = groups.abs().amax(dim=1)
    # 0 · inf is NaN in a group of equal scales (or of distances below 2^-128): the kernel reads it as −1.
    scaled = (groups * (1.0 / nested_absmax)[:, None]).clamp(-1.0, 1.0).nan_to_num(nan=-1.0)
    codes = _nearest(_snap_to_grid(scaled), dynamic_map(absmax.device))
    return NestedAbsmax(codes.view(-1)[: absmax.numel()], nested_absmax, offset)


def dequantize_absmax(nested: NestedAbsmax) -> torch.Tensor:
    """The scales that nested codes stand for.

    Small ones may come out negative, and that of a block of zeros positive: the error is a share of the group's
    largest distance from the mean, not of the scale.

    Returns:
        `torch.Tensor` (blocks,), fp32.
    """
    return _scale_up(nested.codes, dynamic_map(nested.codes.device), nested.absmax, NESTED_BLOCK_SIZE) + nested.offset


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Two 4-bit codes a byte, the earlier one in the high nibble.

    Args:
        codes (`torch.Tensor`, (n,)): uint8, 0 … 15.

    Returns:
        `torch.Tensor` (ceil(n / 2),), uint8.
    """
    codes = torch.nn.functional.pad(codes, (0, codes.numel() % 2), value=ZERO_CODE)
    return codes[0::2] << 4 | codes[1::2]


def unpack(packed: torch.Tensor, numel: int) -> torch.Tensor:
    """The first `numel` codes of packed bytes; inverse of `pack`.

    Returns:
        `torch.Tensor` (numel,), uint8, 0 … 15.
    """
    return torch.stack([packed >> 4, packed & 0xF], dim=1).view(-1)[:numel]


def _scale_blocks(flat: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide every block by its largest magnitude: (values in [-1, 1] but for a rounding (n,), absmax (blocks,))."""
    full = flat.numel() // block_size * block_size
    blocks, tail = flat[:full].view(-1, block_size), flat[full:]
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax.clamp(min=SMALLEST_ABSMAX))[:, None]).view(-1)
    if tail.numel():
        tail_absmax = tail.abs().amax().clamp(min=SMALLEST_ABSMAX)
        absmax = torch.cat([absmax, tail_absmax[None]])
        scaled = torch.cat([scaled, tail / tail_absmax])
    return scaled, absmax


def _nearest(values: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Code of the level nearest to each value, uint8: how many midpoints lie strictly below it, so a tie goes down."""
    midpoints = (levels[:-1] + levels[1:]) / 2
    return torch.bucketize(values, midpoints).to(torch.uint8)


def _snap_to_grid(scaled: torch.Tensor) -> torch.Tensor:
    """Move values in [-1, 1] to the nearest of 65,536 equidistant points; none of them is zero.

    The kernel fuses the multiplication by 65535 with the addition: for every fp32 number the index is the same.
    """
    index = ((scaled + 1.0) * 0.5 * GRID_INTERVALS + 0.5).trunc()
    return 2.0 * index / GRID_INTERVALS - 1.0


def _scale_up(codes: torch.Tensor, levels: torch.Tensor, absmax: torch.Tensor, block_size: int) -> torch.Tensor:
    """Level of each code times the scale of its block, fp32, (n,)."""
    blocks = _to_blocks(levels[codes.int()], block_size)
    return (blocks * absmax[:, None]).view(-1)[: codes.numel()]


def _to_blocks(flat: torch.Tensor, block_size: int) -> torch.Tensor:
    """(n,) as (ceil(n / block_size), block_size), the last block filled with zeros."""
    return torch.nn.functional.pad(flat, (0, -flat.numel() % block_size)).view(-1, block_size)


def _check(weight: torch.Tensor, block_size: int) -> None:
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size={block_size} is not supported; choose one of {BLOCK_SIZES}.")
    if weight.dtype not in WEIGHT_DTYPES:
        raise ValueError(f"a weight of {weight.dtype} cannot be written in NF4; cast it to one of {WEIGHT_DTYPES}.")
    if weight.numel() == 0:
        raise ValueError(f"a weight of shape {tuple(weight.shape)} has no values; leave such a layer unquantized.")
    bad = int(weight.numel() - weight.isfinite().sum())
    if bad:
        raise ValueError(
            f"the weight has {bad} values that are NaN or infinite, and NF4 would spread each over its whole block; "
            "repair the checkpoint, or leave this layer unquantized."
        )

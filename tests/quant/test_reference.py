"""The reference is bitsandbytes to the bit, and both are the maths of NF4 within the rounding of fp32.

Two oracles: bitsandbytes' CPU kernels, compared exactly, and fp64 arithmetic that shares no code with the reference,
compared within tolerances derived where they are used. Where the CPU kernels do not follow their own format, the last
section says when and by how much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import FrozenInstanceError
from itertools import pairwise

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.functional import QuantState
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from hf_qlora.quant.codebook import NF4_LEVELS, dynamic_map, nf4_levels
from hf_qlora.quant.reference import (
    BLOCK_SIZES,
    NESTED_BLOCK_SIZE,
    WEIGHT_DTYPES,
    NestedAbsmax,
    NF4Tensor,
    dequantize_absmax,
    dequantize_nf4,
    pack,
    quantize_absmax,
    quantize_nf4,
    unpack,
)


LAWS = settings(max_examples=100, deadline=None, database=None)
HALF_LARGEST_GAP = max(upper - lower for lower, upper in pairwise(NF4_LEVELS)) / 2
FP32_STEP = 2.0**-24  # largest relative error of one fp32 rounding
SMALLEST_NORMAL = 2.0**-126

# One value, two values, an odd count, odd rows, rows that end inside a block, whole blocks, a last block of 16, more
# than one group of 256 blocks with a last one of 107, a vector, three dimensions.
SHAPES = [(1, 1), (1, 2), (3, 5), (7, 13), (33, 48), (64, 64), (5, 16), (31, 750), (130,), (4, 24, 40)]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Thousands of small weights are slower on two threads; the one large weight is tried on both."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _bitsandbytes_eager() -> Iterator[None]:
    """bitsandbytes compiles its dequantization anew for odd shapes and long blocks: 17 s each, the same numbers."""
    with torch.compiler.set_stance("force_eager"):
        yield


# What bitsandbytes does, in the reference's types.


def bnb_quantize(weight: torch.Tensor, block_size: int, double_quant: bool) -> NF4Tensor:
    packed, state = bnb.quantize_4bit(weight, blocksize=block_size, compress_statistics=double_quant, quant_type="nf4")
    absmax = NestedAbsmax(state.absmax, state.state2.absmax, state.offset) if double_quant else state.absmax
    return NF4Tensor(packed.view(-1), absmax, state.shape, state.dtype, state.blocksize)


def bnb_state(quantized: NF4Tensor) -> QuantState:
    common = {"shape": quantized.shape, "dtype": quantized.dtype, "blocksize": quantized.block_size}
    scales = quantized.absmax
    if isinstance(scales, torch.Tensor):
        return QuantState(scales, quant_type="nf4", code=nf4_levels(), **common)
    group = QuantState(scales.absmax, blocksize=NESTED_BLOCK_SIZE, code=dynamic_map(), dtype=torch.float32)
    return QuantState(scales.codes, quant_type="nf4", code=nf4_levels(), offset=scales.offset, state2=group, **common)


def bnb_dequantize_in_shape(quantized: NF4Tensor) -> torch.Tensor:
    return bnb.dequantize_4bit(quantized.packed[:, None], bnb_state(quantized))


def bnb_dequantize(quantized: NF4Tensor) -> torch.Tensor:
    """Through a state whose shape is one row: there bitsandbytes' kernels take the scales of the flat blocks."""
    state = copy(bnb_state(quantized))
    state.shape = torch.Size([1, quantized.shape.numel()])
    return bnb.dequantize_4bit(quantized.packed[:, None], state).reshape(quantized.shape)


def assert_identical(got: NF4Tensor, expected: NF4Tensor) -> None:
    def tensors(quantized: NF4Tensor) -> list[torch.Tensor]:
        scales = quantized.absmax
        parts = [scales] if isinstance(scales, torch.Tensor) else [scales.codes, scales.absmax, scales.offset]
        return [quantized.packed, *parts]

    assert_close(tensors(got), tensors(expected), rtol=0, atol=0, equal_nan=True)
    assert (got.shape, got.dtype, got.block_size) == (expected.shape, expected.dtype, expected.block_size)


# What is quantized.


def gaussian(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape)


def heavy_tailed(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape) ** 5


def all_zero(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.zeros(shape)


def mostly_zero(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape) * (torch.rand(shape) < 0.02)


def constant(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.full(shape, -0.3)


def near_zero(shape: tuple[int, ...]) -> torch.Tensor:
    """Every row another magnitude, from 1 down to the smallest fp32 numbers."""
    exponents = torch.linspace(0, -44, shape[0]).view(-1, *[1] * (len(shape) - 1))
    return torch.randn(shape) * 10.0**exponents


def levels_and_midpoints(shape: tuple[int, ...]) -> torch.Tensor:
    levels = nf4_levels()
    values = torch.cat([levels, (levels[:-1] + levels[1:]) / 2])
    return values[torch.randint(values.numel(), shape)]


KINDS = [gaussian, heavy_tailed, all_zero, mostly_zero, constant, near_zero, levels_and_midpoints]


def weights(*, width: int = 32, allow_subnormal: bool = False) -> st.SearchStrategy[torch.Tensor]:
    """Short vectors of any finite values: one block, several, and a last one of any length."""
    value = st.floats(width=width, allow_nan=False, allow_infinity=False, allow_subnormal=allow_subnormal)
    return st.lists(value, min_size=1, max_size=150).map(torch.tensor)


def neighbours(values: torch.Tensor, reach: int) -> torch.Tensor:
    """Each fp32 value with those up to `reach` steps beside it, along the last dimension."""
    steps = torch.arange(-reach, reach + 1, dtype=torch.int32)
    return (values.contiguous().view(torch.int32)[..., None] + steps).view(torch.float32).flatten(-2)


# The reference is bitsandbytes.


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_quantize_equals_bitsandbytes(block_size: int, dtype: torch.dtype, double_quant: bool) -> None:
    for make in KINDS:
        for shape in SHAPES:
            weight = make(shape).to(dtype)
            expected = bnb_quantize(weight, block_size, double_quant)
            assert_identical(quantize_nf4(weight, block_size, double_quant), expected)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_dequantize_equals_bitsandbytes(block_size: int, dtype: torch.dtype, double_quant: bool) -> None:
    # AVX512-BF16 instructions write a subnormal bf16 as zero, so below 2^-126 the two may differ by the value itself.
    # Everything else is equal to the bit.
    atol = SMALLEST_NORMAL if dtype is torch.bfloat16 else 0
    for make in (gaussian, mostly_zero, near_zero):
        for shape in SHAPES:
            quantized = quantize_nf4(make(shape).to(dtype), block_size, double_quant)
            assert_close(dequantize_nf4(quantized), bnb_dequantize(quantized), rtol=0, atol=atol)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_4096_by_4096_weight_equals_bitsandbytes(threads: int) -> None:
    # The mean of 262,144 scales is a parallel sum: its last bit, and with it some codes, are those of a thread count.
    torch.set_num_threads(threads)
    weight = torch.randn(4096, 4096).bfloat16()
    quantized = quantize_nf4(weight)
    assert_identical(quantized, bnb_quantize(weight, 64, True))
    assert_close(dequantize_nf4(quantized), bnb_dequantize_in_shape(quantized), rtol=0, atol=0)


@LAWS
@given(weight=weights(allow_subnormal=True), block_size=st.sampled_from([32, 64]), double_quant=st.booleans())
def test_any_finite_weight_equals_bitsandbytes(weight: torch.Tensor, block_size: int, double_quant: bool) -> None:
    # Also where the mean of the scales overflows: offset, scales and weights are then not finite, in both alike.
    quantized = quantize_nf4(weight, block_size, double_quant)
    assert_identical(quantized, bnb_quantize(weight, block_size, double_quant))
    assert_close(dequantize_nf4(quantized), bnb_dequantize(quantized), rtol=0, atol=0, equal_nan=True)


@given(numel=st.integers(1, 700), scale=st.floats(1e-6, 1e6), spread=st.floats(0, 4))
@LAWS
def test_any_scales_are_nested_as_in_bitsandbytes(numel: int, scale: float, spread: float) -> None:
    absmax = scale * torch.rand(numel).pow(spread)
    codes, state = bnb.quantize_blockwise(absmax - absmax.mean(), blocksize=NESTED_BLOCK_SIZE)
    nested = quantize_absmax(absmax)
    assert_close([nested.codes, nested.absmax], [codes, state.absmax], rtol=0, atol=0)
    assert_close(dequantize_absmax(nested), bnb.dequantize_blockwise(codes, state) + absmax.mean(), rtol=0, atol=0)


def test_codes_beside_a_midpoint_equal_bitsandbytes() -> None:
    # Here the last bit decides: a full block is multiplied by 1 / absmax, a short last one divided by absmax.
    midpoints = (nf4_levels()[:-1] + nf4_levels()[1:]) / 2
    scales = torch.rand(400, 1) + 0.5
    beside = neighbours(midpoints * scales, 1)
    blocks = torch.cat([scales, beside, torch.zeros(400, 64 - 1 - beside.shape[1])], dim=1)
    assert_identical(quantize_nf4(blocks, 64, False), bnb_quantize(blocks, 64, False))
    for block in blocks:
        assert_identical(quantize_nf4(block[:-1], 64, False), bnb_quantize(block[:-1], 64, False))


def test_scales_beside_an_edge_of_the_grid_equal_bitsandbytes() -> None:
    # Here the last bit decides, too: a position on the grid is rounded to fp32 before its fraction is cut off. Edges
    # that matter lie between two points of different levels; each group has a largest distance of 1 and a mean of 0.
    points = 2 * torch.arange(65536, dtype=torch.float64) / 65535 - 1
    levels = dynamic_map().double()
    below = torch.bucketize(points, (levels[:-1] + levels[1:]) / 2).diff().nonzero()[:, 0]
    edges = ((points[below] + points[below + 1]) / 2).float()
    beside = neighbours(edges[edges != 0], 8)
    beside = torch.cat([beside, torch.zeros(-beside.numel() % 127)]).view(-1, 127)
    absmax = torch.cat([torch.ones(beside.shape[0], 1), beside], dim=1)
    absmax = torch.stack([absmax, -absmax], dim=2).view(-1)
    assert absmax.mean().abs() < 1e-8

    codes, _ = bnb.quantize_blockwise(absmax - absmax.mean(), blocksize=NESTED_BLOCK_SIZE)
    assert_close(quantize_absmax(absmax).codes, codes, rtol=0, atol=0)


# Both are the maths.


@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("make", [gaussian, heavy_tailed, levels_and_midpoints])
def test_every_code_is_the_nearest_level(make: Callable[..., torch.Tensor], block_size: int) -> None:
    # Brute force in fp64. A code may differ only within three fp32 roundings of a midpoint (of 1 / absmax, of the
    # product, of the midpoint), where the two neighbours are equally good; of four million Gaussian weights none did.
    weight = make((123, 457))
    quantized = quantize_nf4(weight, block_size, double_quant=False)
    codes = unpack(quantized.packed, weight.numel()).long()

    blocks = torch.arange(weight.numel()) // block_size
    largest = torch.zeros(int(blocks[-1]) + 1).scatter_reduce(0, blocks, weight.abs().view(-1), "amax")
    assert_close(quantized.absmax, largest, rtol=0, atol=0)
    exact = weight.view(-1).double() / largest.double()[blocks]
    distances = (exact[:, None] - nf4_levels().double()).abs()
    excess = distances.gather(1, codes[:, None])[:, 0] - distances.amin(dim=1)
    # At a distance d from the midpoint, the two neighbours differ by 2 d.
    assert (excess <= 2 * 3 * FP32_STEP * exact.abs()).all()


@pytest.mark.parametrize("quantize", [quantize_nf4, bnb_quantize])
def test_a_tie_takes_the_lower_level(quantize: Callable[..., NF4Tensor]) -> None:
    levels = nf4_levels()
    ties = (levels[:-1] + levels[1:]) / 2
    above = torch.nextafter(ties, torch.ones(15))
    weight = torch.cat([torch.ones(1), ties, above, torch.zeros(1)])
    codes = unpack(quantize(weight, 32, False).packed, 32)
    assert codes.tolist() == [15, *range(15), *range(1, 16), 7]


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("block_size", [32, 64])
def test_a_dequantized_weight_is_level_times_absmax_rounded_once(block_size: int, dtype: torch.dtype) -> None:
    weight = gaussian((37, 91)).to(dtype)
    quantized = quantize_nf4(weight, block_size, double_quant=False)
    numel = weight.numel()
    bytes_ = [divmod(byte, 16) for byte in quantized.packed.tolist()]
    levels = torch.tensor([NF4_LEVELS[code] for pair in bytes_ for code in pair][:numel], dtype=torch.float64)
    scales = torch.tensor([quantized.absmax[i // block_size] for i in range(numel)], dtype=torch.float64)
    # fp64 holds the product of two fp32 numbers exactly.
    expected = (levels * scales).float().to(dtype).view(weight.shape)
    assert_close(dequantize_nf4(quantized), expected, rtol=0, atol=0)


@pytest.mark.parametrize("make", [gaussian, heavy_tailed])
def test_every_nested_scale_is_nearest_but_for_the_grid(make: Callable[..., torch.Tensor]) -> None:
    # The scale is first moved by at most half a grid step, 1 / 65535, so its level may be worse than the nearest
    # by at most two of those, in units of the group's largest distance. Of the scales of a Gaussian 4096 × 4096
    # weight 0.18 % get another level than the nearest, by up to 4 levels and 2.9e-5.
    absmax = make((300, 64)).abs().amax(dim=1)
    nested = quantize_absmax(absmax)
    groups = torch.arange(absmax.numel()) // NESTED_BLOCK_SIZE
    exact = (absmax.double() - nested.offset.double()) / nested.absmax.double()[groups]
    levels = dynamic_map().double()
    nearest = (exact[:, None] - levels).abs().amin(dim=1)
    excess = (exact - levels[nested.codes.long()]).abs() - nearest
    # On the way are fewer than eight fp32 roundings of numbers up to 1: distance, quotient, position, grid point.
    assert (excess <= 2 / 65535 + 2 * 8 * FP32_STEP).all()


@pytest.mark.parametrize("quantize", [quantize_nf4, bnb_quantize])
def test_nested_scales_never_use_the_seven_levels_nearest_to_zero(quantize: Callable[..., NF4Tensor]) -> None:
    # The grid points next to zero, ±1.5e-5, belong to levels 123 and 131: a scale equal to the mean is off by 2.1e-5.
    scales = torch.tensor([0.0, 1.0, 2.0])
    assert quantize(scales.repeat_interleave(64), 64, True).absmax.codes.tolist() == [0, 131, 255]

    codes = quantize(torch.rand(100_000).repeat_interleave(32), 32, True).absmax.codes
    assert not ((codes > 123) & (codes < 131)).any()


# Laws of the format.


@LAWS
@given(weight=weights(), block_size=st.sampled_from([32, 64]))
def test_error_is_at_most_half_the_largest_gap_times_absmax(weight: torch.Tensor, block_size: int) -> None:
    # The largest gap is that between −1 and −0.696. Four roundings: quotient (two), midpoint, product.
    # Subnormal weights are left out: a scale below 1e-38 is taken as 1e-38, and the bound is lost.
    quantized = quantize_nf4(weight, block_size, double_quant=False)
    scales = quantized.absmax.repeat_interleave(block_size)[: weight.numel()].double()
    error = (dequantize_nf4(quantized).double() - weight.double()).abs()
    assert (error <= scales * (HALF_LARGEST_GAP + 4 * FP32_STEP)).all()


@given(weight=weights(width=16), block_size=st.sampled_from([32, 64]), dtype=st.sampled_from(WEIGHT_DTYPES))
@LAWS
def test_quantizing_what_was_dequantized_gives_the_same_codes(
    weight: torch.Tensor, block_size: int, dtype: torch.dtype
) -> None:
    # Not with double quantization: the scale that comes back is not the largest magnitude of its block.
    # Values in fp16's normal range, because levels of a subnormal scale run together.
    once = quantize_nf4(weight.to(dtype), block_size, double_quant=False)
    assert_identical(quantize_nf4(dequantize_nf4(once), block_size, double_quant=False), once)


@given(weight=weights(), block_size=st.sampled_from([32, 64]), double_quant=st.booleans())
@LAWS
def test_zeros_stay_zeros(weight: torch.Tensor, block_size: int, double_quant: bool) -> None:
    weight = weight.clamp(-1e30, 1e30)  # beyond, the mean of the scales may overflow
    weight[::3] = 0.0
    assert not dequantize_nf4(quantize_nf4(weight, block_size, double_quant))[::3].any()


def test_a_nested_scale_is_within_half_a_gap_of_its_group() -> None:
    # The largest gap of the map is 0.9 / 64, in its top decade; the grid adds half a step, and fp32 its roundings.
    absmax = heavy_tailed((3000, 64)).abs().amax(dim=1)
    nested = quantize_absmax(absmax)
    error = (dequantize_absmax(nested) - absmax).abs()
    groups = nested.absmax.repeat_interleave(NESTED_BLOCK_SIZE)[: absmax.numel()]
    assert (error <= groups * (0.9 / 128 + 1 / 65535 + 8 * FP32_STEP) + absmax * 2 * FP32_STEP).all()


def test_double_quantization_loses_scales_far_below_the_mean() -> None:
    # The error of a scale is a share of its group's largest distance from the mean (the law above), so a block 10^5
    # times smaller than its neighbours gets a scale that has nothing to do with it, negative for some.
    weight = torch.randn(4096, 64) ** 3
    weight[:240] *= 1e-5
    weight[0] = 0.0
    quantized = quantize_nf4(weight)
    scales, exact = dequantize_absmax(quantized.absmax), quantize_nf4(weight, double_quant=False).absmax
    assert scales[0] != 0.0
    assert (scales[1:240] / exact[1:240]).abs().median() > 100
    assert (scales[:240] < 0).any()
    assert_identical(quantized, bnb_quantize(weight, 64, True))


@pytest.mark.parametrize(("double_quant", "expected"), [(True, 4 + 8 / 64 + 32 / (64 * 256)), (False, 4 + 32 / 64)])
def test_bits_per_parameter(double_quant: bool, expected: float) -> None:
    weight = torch.randn(1024, 1024)
    quantized = quantize_nf4(weight, double_quant=double_quant)
    scales = quantized.absmax
    tensors = [scales] if isinstance(scales, torch.Tensor) else [scales.codes, scales.absmax]
    bits = 8 * sum(tensor.nbytes for tensor in [quantized.packed, *tensors]) / weight.numel()
    assert bits == expected  # 4.127 and 4.5; the offset is four bytes a weight more, whatever its size


@pytest.mark.parametrize("double_quant", [False, True])
def test_relative_rmse_of_gaussian_weights(double_quant: bool) -> None:
    # 0.09198 and 0.09200 on 16.8 million weights; over seeds, those of four million vary by 3e-5.
    weight = torch.randn(2048, 2048)
    error = dequantize_nf4(quantize_nf4(weight, double_quant=double_quant)) - weight
    assert (error.norm() / weight.norm()).item() == pytest.approx(0.0920, abs=1e-4)


@given(st.lists(st.integers(0, 15), max_size=9))
@LAWS
def test_packing_is_two_codes_a_byte_the_earlier_one_high(codes: list[int]) -> None:
    packed = pack(torch.tensor(codes, dtype=torch.uint8))
    padded = [*codes, 7] if len(codes) % 2 else codes
    assert bytes(packed.tolist()).hex() == "".join(f"{code:x}" for code in padded)
    assert unpack(packed, len(codes)).tolist() == codes


def test_blocks_run_on_across_rows() -> None:
    weight = gaussian((10, 48))
    flat = quantize_nf4(weight.view(-1))
    assert_close(quantize_nf4(weight).packed, flat.packed, rtol=0, atol=0)
    assert_close(dequantize_nf4(quantize_nf4(weight)), dequantize_nf4(flat).view(10, 48), rtol=0, atol=0)


def test_a_transposed_view_is_read_row_by_row() -> None:
    weight = gaussian((40, 50)).t().requires_grad_()
    quantized = quantize_nf4(weight)
    assert_identical(quantized, quantize_nf4(weight.detach().contiguous()))
    assert not dequantize_nf4(quantized).requires_grad


def test_a_quantized_weight_cannot_be_reassigned() -> None:
    with pytest.raises(FrozenInstanceError):
        quantize_nf4(gaussian((8, 8))).block_size = 32  # type: ignore[misc]


# What is refused.


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_nf4_does_not_have_are_refused(bad: float) -> None:
    weight = gaussian((8, 64))
    weight[3, 5] = bad
    with pytest.raises(ValueError, match=r"1 values that are NaN or infinite.*repair the checkpoint"):
        quantize_nf4(weight)


def test_settings_that_nf4_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match=r"block_size=48 is not supported; choose one of \(32, 64, .*4096\)"):
        quantize_nf4(gaussian((8, 8)), block_size=48)
    with pytest.raises(ValueError, match=r"torch.float64 cannot be written in NF4; cast it to one of"):
        quantize_nf4(gaussian((8, 8)).double())
    with pytest.raises(ValueError, match=r"shape \(0, 4\) has no values; leave such a layer unquantized"):
        quantize_nf4(torch.empty(0, 4))


# Where bitsandbytes' CPU kernels leave the format.


def misread(quantized: NF4Tensor) -> torch.Tensor:
    """Dequantize as if every row began with a block of its own: scale row · ⌊columns / block⌋ + column // block."""
    rows, columns = quantized.shape
    per_row = columns // quantized.block_size
    index = torch.arange(rows)[:, None] * per_row + torch.arange(columns) // quantized.block_size
    levels = nf4_levels()[unpack(quantized.packed, rows * columns).int()].view(rows, columns)
    return (levels * quantized.absmax[index]).to(quantized.dtype)


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="only the AVX-512 kernel does this")
@pytest.mark.parametrize(
    ("shape", "block_size", "rmse"),
    [((32, 32), 64, 0.37), ((48, 48), 64, 0.40), ((576, 576), 128, 0.22), ((64, 4304), 64, 0.25)],
)
def test_bitsandbytes_takes_wrong_scales_where_rows_end_inside_a_block(
    shape: tuple[int, int], block_size: int, rmse: float
) -> None:
    # The AVX-512 kernel runs when the row length is a multiple of 16 and the block is shorter than 2048, and indexes
    # scales by row. Unless rows are whole blocks, most weights get another block's scale: a relative error of 0.2 to
    # 0.5 instead of 0.09, and nothing is said. What is stored is right, and read right as one long row.
    weight = torch.randn(shape)
    quantized = quantize_nf4(weight, block_size, double_quant=False)
    wrong, right = bnb_dequantize_in_shape(quantized), dequantize_nf4(quantized)
    if torch.equal(wrong, right):
        pytest.skip("this bitsandbytes indexes scales by flat block; the detour over one row is no longer needed")
    assert_close(wrong, misread(quantized), rtol=0, atol=0)
    assert ((wrong - weight).norm() / weight.norm()).item() == pytest.approx(rmse, abs=0.04)
    assert_close(bnb_dequantize(quantized), right, rtol=0, atol=0)


def test_bitsandbytes_transposes_a_weight_of_one_byte() -> None:
    # Packed data of one row is taken for an old transposed layout, and one byte is one row: (1, 2) comes back (2, 1).
    quantized = quantize_nf4(gaussian((1, 2)), double_quant=False)
    assert_close(bnb_dequantize_in_shape(quantized), dequantize_nf4(quantized).t(), rtol=0, atol=0)


@pytest.mark.parametrize(("double_quant", "spoilt"), [(False, 64), (True, 128 * 64)])
def test_bitsandbytes_spreads_a_nan_over_its_block_or_the_whole_weight(double_quant: bool, spoilt: int) -> None:
    weight = gaussian((128, 64))
    weight[3, 5] = float("nan")
    assert bnb_dequantize(bnb_quantize(weight, 64, double_quant)).isnan().sum() == spoilt


def test_bitsandbytes_may_write_a_nan_back_as_zero() -> None:
    # In a short last block, in bf16, in rows of a length that is not a multiple of 16: the scale is a NaN of all ones,
    # and the scalar kernel's rounding carries it over into zero. Another processor's kernel may keep the NaN.
    weight = gaussian((10, 50)).bfloat16()
    weight[-1, -1] = float("nan")
    last_block = bnb_dequantize_in_shape(bnb_quantize(weight, 64, False)).view(-1)[448:]
    assert last_block.isnan().all() or not last_block.any()

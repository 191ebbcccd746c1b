"""What rounding loses: against the specification of NF4 in float64, bitsandbytes, and integrals over the Gaussian."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor

from hf_qlora import NF4Config, quantize_model
from hf_qlora.quant.codebook import NF4_LEVELS
from hf_qlora.quant.dequantize import dequantize_weight
from hf_qlora.quant.footprint import footprint
from hf_qlora.quant.packing import quantize_weight
from hf_qlora.quant.reference import dequantize_nf4, quantize_nf4
from hf_qlora.quant.rounding import DensePieces, PackedPieces, distances, gaussian_error, spread
from hf_qlora.quant.scheme import Scheme
from hf_qlora.validation import ConfigError


# bitsandbytes' functional.py, get_4bit_type: a sign, and 0, 0.0625, 2, 3, 4, 6, 8 or 12 twelfths.
FP4_LEVELS = sorted(sign * level / 12 for sign in (-1, 1) for level in (0, 0.0625, 2, 3, 4, 6, 8, 12))
# Several pieces with rows that end inside a block, one piece, a last block of 20, an odd count.
SHAPES = [(3000, 40), (64, 64), (7, 20), (3, 5)]


def integrated_error(levels: tuple[float, ...] | list[float], block_size: int) -> float:
    """The relative error of Gaussian blocks: their largest magnitude m is exact, the others lie within ±m."""
    grid = np.array(levels)
    edges = np.concatenate([[-1.0], (grid[1:] + grid[:-1]) / 2, [1.0]])

    def within(m: float) -> float:
        """E (w − Q(w))² of a Gaussian w within ±m, by moments of the Gaussian over each level's cell."""
        a, b, q = edges[:-1] * m, edges[1:] * m, grid * m
        pdf, cdf = scipy.stats.norm.pdf, scipy.stats.norm.cdf
        zeroth, first = cdf(b) - cdf(a), pdf(a) - pdf(b)
        second = zeroth + a * pdf(a) - b * pdf(b)
        return float((second - 2 * q * first + q**2 * zeroth).sum() / (cdf(m) - cdf(-m)))

    def density(m: float) -> float:
        inside = 2 * scipy.stats.norm.cdf(m) - 1
        return float(block_size * inside ** (block_size - 1) * 2 * scipy.stats.norm.pdf(m))

    squared, _ = scipy.integrate.quad(lambda m: density(m) * within(m), 1e-3, 9, limit=200)
    return float(np.sqrt(squared * (block_size - 1) / block_size))


@pytest.mark.parametrize(
    ("quant_type", "block_size", "published"),
    [("nf4", 64, 0.0920), ("fp4", 64, 0.1220), ("nf4", 32, None), ("nf4", 256, None), ("fp4", 128, None)],
)
def test_gaussian_weights_have_the_error_of_the_integral(
    quant_type: str, block_size: int, published: float | None
) -> None:
    expected = integrated_error(NF4_LEVELS if quant_type == "nf4" else FP4_LEVELS, block_size)
    # 2^20 weights: their mean squared error is known to 0.3 % (two standard deviations), its root to half of that.
    # bfloat16 is not in play, and scales in 8 bits add less than 0.1 %.
    assert gaussian_error(Scheme(quant_type, block_size, False)) == pytest.approx(expected, rel=2e-3)
    assert gaussian_error(Scheme(quant_type, block_size, True)) == pytest.approx(expected, rel=3e-3)
    if published:
        assert expected == pytest.approx(published, abs=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [True, False])
def test_the_error_is_that_of_the_specification(
    shape: tuple[int, int], dtype: torch.dtype, double_quant: bool
) -> None:
    weight = (torch.randn(shape) * torch.rand(shape[0], 1)).to(dtype)
    expected = (weight.double() - dequantize_nf4(quantize_nf4(weight, 64, double_quant)).double()).norm()
    scheme = Scheme("nf4", 64, double_quant)
    # The differences of two floats are rounded once to float32, 6e-8; the nested offset's last bit may move a scale.
    torch.testing.assert_close(distances(weight, [scheme])[scheme], float(expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("double_quant", [True, False])
def test_fp4_is_bitsandbytes(block_size: int, double_quant: bool) -> None:
    weight = torch.randn(256, 128)
    state = quantize_4bit(weight, blocksize=block_size, compress_statistics=double_quant, quant_type="fp4")
    expected = (weight.double() - dequantize_4bit(*state).double()).norm()
    scheme = Scheme("fp4", block_size, double_quant)
    torch.testing.assert_close(distances(weight, [scheme])[scheme], float(expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double_quant", [True, False])
def test_pieces_are_the_whole(shape: tuple[int, int], double_quant: bool) -> None:
    weight = torch.randn(shape).to(torch.bfloat16)
    packed, state = quantize_weight(weight, NF4Config(double_quant=double_quant))
    assert torch.equal(torch.cat(list(DensePieces(weight, 64))), weight.float())
    assert torch.equal(torch.cat(list(PackedPieces(packed, state))), dequantize_weight(packed, state, torch.float32))


def test_a_transposed_weight_is_that_of_its_copy() -> None:
    weight = torch.randn(96, 200).t()
    assert not weight.is_contiguous()
    scheme = Scheme()
    # The same differences, summed in another order.
    expected = distances(weight.contiguous(), [scheme])[scheme]
    assert distances(weight, [scheme])[scheme] == pytest.approx(expected, rel=1e-12)


def test_the_spread_is_that_of_the_moments() -> None:
    weight = torch.randn(50, 80) + 0.3
    weight[7, 3] = 40.0
    exact = weight.double()
    centred = exact - exact.mean()
    found = spread([weight[:20], weight[20:]])
    # float32 in the values, float64 in the sums.
    assert found.norm == pytest.approx(float(exact.norm()), rel=1e-6)
    assert found.peak == pytest.approx(float((exact.abs().amax(1) / exact.square().mean(1).sqrt()).max()), rel=1e-6)
    assert found.kurtosis == pytest.approx(float((centred**4).mean() / centred.square().mean() ** 2), rel=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.25, 1e-30])
def test_a_constant_weight_has_no_kurtosis(value: float) -> None:
    found = spread([torch.full((4, 8), value)])
    assert (found.peak, found.kurtosis) == (pytest.approx(1.0), None)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", [64, 128])
def test_bytes_are_those_that_the_footprint_counts(block_size: int, double_quant: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(520, 300, bias=False), torch.nn.Linear(5, 3, bias=False))
    quantize_model(model, NF4Config(block_size=block_size, double_quant=double_quant))
    counted = footprint(model)
    scheme = Scheme("nf4", block_size, double_quant)
    assert scheme.packed_bytes(520 * 300) + scheme.packed_bytes(15) == counted.code_bytes + counted.scale_bytes


@pytest.mark.parametrize(("quant_type", "block_size"), [("int4", 64), ("nf4", 63), ("nf4", 64.0), ("NF4", 64)])
def test_an_unknown_scheme_is_refused(quant_type: str, block_size: int) -> None:
    with pytest.raises(ConfigError, match="choose one of"):
        Scheme(quant_type, block_size)


def test_nothing_is_written_to() -> None:
    weight = torch.randn(64, 64)
    before: Tensor = weight.clone()
    distances(weight, [Scheme(), Scheme("fp4")])
    assert torch.equal(weight, before)

"""The codebooks are the published constructions and, to the bit, the tables that bitsandbytes ships."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch

from hf_qlora.quant.codebook import NF4_LEVELS, NF4_OFFSET, dynamic_map, nf4_levels


def normal_quantiles() -> torch.Tensor:
    """The NF4 levels from their construction, fp64: 8 positive and 7 negative quantiles of N(0, 1), and zero."""

    def quantiles(count: int) -> torch.Tensor:
        return torch.special.ndtri(torch.linspace(NF4_OFFSET, 0.5, count + 1, dtype=torch.float64)[:-1])

    positive, negative = quantiles(8), -quantiles(7)
    levels = torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive]).sort().values
    return levels / levels.max()


def dynamic_levels() -> torch.Tensor:
    """The dynamic map from its construction, fp64: level by level, one decade after another."""
    positive = [10.0 ** (i - 6) * (0.1 + 0.9 * (cell + 0.5) / 2**i) for i in range(7) for cell in range(2**i)]
    return torch.tensor(sorted([*positive, 0.0, 1.0, *(-level for level in positive)]), dtype=torch.float64)


def test_nf4_levels_are_bitsandbytes_own() -> None:
    assert torch.equal(nf4_levels(), bnb.get_4bit_type("nf4", device="cpu"))


def test_nf4_levels_are_normal_quantiles() -> None:
    # The published constants came from fp32 probabilities, so they are a little off: 1.083e-7 at the worst (code 1).
    difference = (torch.tensor(NF4_LEVELS, dtype=torch.float64) - normal_quantiles()).abs()
    assert difference.max() <= 1.1e-7


def test_nf4_levels_are_written_in_full() -> None:
    assert torch.equal(nf4_levels().double(), torch.tensor(NF4_LEVELS, dtype=torch.float64))


def test_nf4_has_seven_negative_levels_an_exact_zero_and_eight_positive() -> None:
    levels = nf4_levels()
    assert (levels.diff() > 0).all()
    assert [int((levels < 0).sum()), int((levels == 0).sum()), int((levels > 0).sum())] == [7, 1, 8]
    assert (levels[0], levels[7], levels[15]) == (-1.0, 0.0, 1.0)


def test_dynamic_map_is_bitsandbytes_own() -> None:
    assert torch.equal(dynamic_map(), bnb.create_dynamic_map(signed=True))


def test_dynamic_map_is_the_table_that_nested_states_carry() -> None:
    _, state = bnb.quantize_4bit(torch.randn(64, 64), quant_type="nf4", compress_statistics=True)
    assert torch.equal(dynamic_map(), state.state2.code)


def test_dynamic_map_is_its_construction() -> None:
    # Computed in fp32: cell edges, their sum and the product with a power of ten round once each.
    expected = dynamic_levels()
    assert ((dynamic_map().double() - expected).abs() <= 2**-22 * expected.abs()).all()


def test_dynamic_map_doubles_its_levels_with_every_decade() -> None:
    levels = dynamic_map().double()
    for exponent in range(7):
        top = 10.0 ** (exponent - 6)
        for sign in (1, -1):
            in_decade = (sign * levels > 0.1 * top) & (sign * levels < top)
            assert int(in_decade.sum()) == 2**exponent


def test_dynamic_map_is_ascending_and_reaches_one_only_upwards() -> None:
    levels = dynamic_map()
    assert levels.shape == (256,)
    assert (levels.diff() > 0).all()
    assert levels[127] == 0.0
    assert levels[-1] == 1.0
    assert levels[0].item() == pytest.approx(-(1 - 0.9 / 128), abs=1e-7)


@pytest.mark.parametrize("table", [nf4_levels, dynamic_map])
def test_tables_are_fp32_on_the_device_asked_for(table) -> None:
    assert table().device.type == "cpu"
    assert table("meta").device.type == "meta"
    assert table().dtype == torch.float32

"""The choice between bitsandbytes and Triton: what is chosen, what is refused, and what happens when Triton is wrong.

The kernel itself is not needed here; `tests/kernels/test_triton.py` has the tests with it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor

from hf_qlora.quant import dequantize
from hf_qlora.quant.dequantize import dequantize_weight, product_weight


class OnCuda(Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a new process, on a machine that has Triton."""
    monkeypatch.setattr(dequantize, "find_spec", lambda name: name)
    dequantize._triton_is_right.cache_clear()
    yield
    dequantize._triton_is_right.cache_clear()


@pytest.fixture
def weight() -> tuple[Tensor, QuantState, Tensor]:
    packed, state = bnb.quantize_4bit(torch.randn(8, 64), quant_type="nf4", compress_statistics=True)
    return packed.as_subclass(OnCuda), state, bnb.dequantize_4bit(packed, state)


def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "hf_qlora.kernels.triton", raising=False)
    monkeypatch.setattr(dequantize, "find_spec", lambda name: None)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_bitsandbytes_result_in_the_wanted_dtype(
    weight: tuple[Tensor, QuantState, Tensor], dtype: torch.dtype | None
) -> None:
    packed, state, expected = weight
    found = dequantize_weight(packed, state, dtype, impl="bitsandbytes")
    assert found.dtype == (dtype or torch.float32)
    assert torch.equal(found, expected.to(found.dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_weight_of_a_product_is_rounded_once(state_dtype: torch.dtype, dtype: torch.dtype) -> None:
    packed, state = bnb.quantize_4bit(torch.randn(8, 64), quant_type="nf4", compress_statistics=True)
    expected = bnb.dequantize_4bit(packed, state)  # in float32
    state.dtype = state_dtype
    found = product_weight(packed, state, dtype)
    assert torch.equal(found, expected.to(dtype))
    assert state.dtype == state_dtype


def test_unknown_implementation(weight: tuple[Tensor, QuantState, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    packed, state, _ = weight
    message = "implementation='torch' is not known; choose 'auto', 'bitsandbytes' or 'triton'"
    with pytest.raises(ValueError, match=message):
        dequantize_weight(packed, state, impl="torch")  # type: ignore[arg-type]
    monkeypatch.setattr(dequantize, "implementation", "torch")
    with pytest.raises(ValueError, match=message):
        dequantize_weight(packed, state)


def test_triton_without_triton_is_an_import_error(
    weight: tuple[Tensor, QuantState, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_triton(monkeypatch)
    with pytest.raises(ImportError, match=r"python -m pip install 'hf-qlora\[triton\]'"):
        dequantize_weight(*weight[:2], impl="triton")


def test_auto_without_triton_is_bitsandbytes(
    weight: tuple[Tensor, QuantState, Tensor], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    packed, state, expected = weight
    without_triton(monkeypatch)
    assert torch.equal(dequantize_weight(packed, state), expected)
    assert not caplog.records


@pytest.mark.parametrize("packed_type", [Tensor, OnCuda])
def test_auto_takes_triton_for_cuda_tensors_only(
    weight: tuple[Tensor, QuantState, Tensor], packed_type: type[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, state, expected = weight
    calls = []

    def by_triton(packed: Tensor, state: QuantState, dtype: torch.dtype) -> Tensor:
        calls.append(tuple(state.shape))
        return dequantize._by_bitsandbytes(packed, state).to(dtype)

    monkeypatch.setattr(dequantize, "_by_triton", by_triton)
    for _ in range(2):
        assert torch.equal(dequantize_weight(packed.as_subclass(packed_type), state), expected)
    assert calls == ([(255, 16), (8, 64), (8, 64)] if packed_type is OnCuda else [])  # the check comes first, once


def raising(*args: Any) -> Tensor:
    raise RuntimeError("no such instruction")


def wrong(packed: Tensor, state: QuantState, dtype: torch.dtype) -> Tensor:
    return torch.zeros(state.shape, dtype=dtype)


@pytest.mark.parametrize(
    ("kernel", "message"), [(raising, "RuntimeError: no such instruction"), (wrong, r"of 16320 bytes differ")]
)
def test_auto_falls_back_with_one_warning(
    weight: tuple[Tensor, QuantState, Tensor],
    kernel: Any,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    packed, state, expected = weight
    monkeypatch.setattr(dequantize, "_by_triton", kernel)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert torch.equal(dequantize_weight(packed, state), expected)
    assert len(caplog.records) == 1
    assert message in caplog.text
    assert "on cpu (torch.float32, block size 64)" in caplog.text
    assert "bitsandbytes is used." in caplog.text


def test_a_choice_does_not_fall_back(
    weight: tuple[Tensor, QuantState, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dequantize, "_by_triton", raising)
    with pytest.raises(RuntimeError, match="no such instruction"):
        dequantize_weight(*weight[:2], impl="triton")


def test_the_check_draws_no_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dequantize, "_by_triton", wrong)
    before = torch.get_rng_state()
    dequantize._triton_is_right(torch.device("cpu"), torch.float32, torch.float32, 64, True)
    assert torch.equal(torch.get_rng_state(), before)

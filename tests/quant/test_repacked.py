"""The repacked form is bitsandbytes', and what its kernel makes of it is the layer's product.

Oracles: bitsandbytes' own repacking; the weight's codes and scales in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from bitsandbytes.functional import (
    QuantState,
    _convert_weight_packed_for_cpu,
    dequantize_blockwise,
    has_avx512bf16,
    quantize_4bit,
)
from repacked_kernel import StandIn
from torch import Tensor

from hf_qlora.quant import repacked
from hf_qlora.quant.repacked import Repacked, flat_scales, obstacle_here, obstacle_to_shape, repack_codes


BLOCK_SIZES = [32, 64, 256, 4096]


@pytest.fixture(autouse=True)
def _unchecked() -> Iterator[None]:
    """As in a new process."""
    repacked._kernel_error.cache_clear()
    yield
    repacked._kernel_error.cache_clear()


def quantized(
    N: int, K: int, block_size: int = 64, nested: bool = True, storage: torch.dtype = torch.uint8
) -> tuple[Tensor, QuantState]:
    weight = torch.randn(N, K) * torch.logspace(0, -3, N)[:, None]
    packed, state = quantize_4bit(
        weight, blocksize=block_size, quant_type="nf4", compress_statistics=nested, quant_storage=storage
    )
    return packed, state


def exact(packed: Tensor, state: QuantState) -> Tensor:
    """The weight in float64: level by level, from the codes as they are stored."""
    absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    flat = packed.view(torch.uint8).reshape(-1)
    levels = state.code.double()[torch.stack([flat >> 4, flat & 15], 1).reshape(-1).long()]
    return (levels.view(-1, state.blocksize) * absmax.double().view(-1, 1)).view(state.shape)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_the_form_is_bitsandbytes_to_the_bit(block_size: int, nested: bool, storage: torch.dtype) -> None:
    for N, K in ((32, block_size), (96, 2 * block_size)):
        packed, state = quantized(N, K, block_size, nested, storage)
        before = packed.clone()
        codes, scales = repack_codes(packed, state), flat_scales(state)
        expected, expected_state = _convert_weight_packed_for_cpu(packed.clone(), copy.deepcopy(state))
        assert torch.equal(codes, expected)
        assert torch.equal(scales, expected_state.absmax)
        assert scales.dtype == torch.bfloat16
        assert torch.equal(packed.view(torch.uint8), before.view(torch.uint8))
        assert state.nested == nested


def test_the_kernel_computes_what_the_codes_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes' where the processor has it, and a stand-in everywhere, for any number of rows and any strides."""
    kernels = [StandIn(), *([repacked.gemv] if has_avx512bf16() else [])]
    for kernel in kernels:
        monkeypatch.setattr(repacked, "gemv", kernel)
        for block_size in BLOCK_SIZES:
            packed, state = quantized(96, 2 * block_size, block_size)
            W, form = exact(packed, state), Repacked()
            K = state.shape[1]
            given = [torch.randn(*shape, K) for shape in ((1,), (1, 1), (2, 3), (33,), (200,))]
            given += [torch.randn(K, 5).t(), torch.randn(5, 2 * K)[:, ::2], torch.randn(1, K).expand(4, K)]
            for x in (x.to(torch.bfloat16) for x in given):
                found, expected = form.multiply(x, packed, state), x.double() @ W.t()
                assert found.dtype == torch.bfloat16
                assert found.shape == expected.shape
                # Scales and the result are rounded to bfloat16, by the kernel levels too: each by 2^-9 at most.
                error = (found.double() - expected).abs()
                assert bool((error <= 3 * 2**-9 * (x.double().abs() @ W.abs().t())).all())
                assert float((found.double() - expected).norm() / expected.norm()) < 0.005


def test_the_scales_are_rounded_as_said() -> None:
    state = quantized(64, 128)[1]
    exactly = dequantize_blockwise(state.absmax, state.state2) + state.offset
    changed = flat_scales(state).t().reshape(-1).double() / exactly.double() - 1
    assert 0 < float(changed.abs().max()) <= 2**-8  # half a step of 8 bits, at the lower end of a power of two


def test_a_weight_that_is_replaced_is_repacked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repacked, "gemv", StandIn())
    (packed, state), (other, other_state) = quantized(32, 64), quantized(32, 64)
    form, x = Repacked(), torch.randn(1, 64).to(torch.bfloat16)
    first = form.multiply(x, packed, state)
    kept = form._form
    assert torch.equal(form.multiply(x, packed, state), first)
    assert form._form is kept
    assert form.nbytes == 32 * 64 // 2 + 32 * 2
    assert not torch.equal(form.multiply(x, other, other_state), first)
    packed.copy_(other)  # in place
    assert torch.equal(form.multiply(x, packed, other_state), form.multiply(x, other, other_state))


def test_weights_made_in_inference_mode_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repacked, "gemv", StandIn())
    with torch.inference_mode():
        packed, state = quantized(32, 64)
        assert Repacked().multiply(torch.ones(1, 64, dtype=torch.bfloat16), packed, state).shape == (1, 32)


@pytest.mark.parametrize(("shape", "said"), [((31, 64), "31 × 64"), ((32, 96), "block size, 64"), ((64, 64), "")])
def test_shapes_that_the_kernel_cannot_read(shape: tuple[int, int], said: str) -> None:
    found = obstacle_to_shape(quantized(*shape)[1])
    assert said in found
    assert bool(found) == bool(said)


def test_other_codes_are_not_for_the_kernel() -> None:
    state = quantize_4bit(torch.randn(32, 64), quant_type="fp4")[1]
    assert "fp4" in obstacle_to_shape(state)


def test_a_processor_without_the_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repacked, "has_avx512bf16", lambda: False)
    assert "AVX512-BF16" in obstacle_here(64)


def test_a_kernel_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repacked, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(repacked, "gemv", StandIn(factor=1.1))
    assert "relative error of 0.1" in obstacle_here(64)
    repacked._kernel_error.cache_clear()
    right = StandIn()
    monkeypatch.setattr(repacked, "gemv", right)
    state = torch.get_rng_state()
    assert obstacle_here(64) == obstacle_here(64) == ""
    assert right.calls == 1  # once in a process
    assert torch.equal(torch.get_rng_state(), state)


def test_the_kernel_of_this_machine_is_right_where_there_is_one() -> None:
    assert bool(obstacle_here(64)) != bool(has_avx512bf16())

"""The node's output and gradients are those of the formula, written out with autograd, and it keeps little.

Oracles: finite differences in float64, and the same products as separate operations.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_qlora.kernels.dora import dora_linear
from hf_qlora.kernels.functional import Adapter, frozen_linear, lora_linear


K, N = 24, 40
# Sums of up to 40 products: ten roundings of each dtype, relative to the largest value.
ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 4e-2, torch.float16: 5e-3}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def make_adapter(
    dtype: torch.dtype, r: int = 4, scaling: float = 0.7, gain: bool = False, dropout: float = 0.0
) -> Adapter:
    A, B = torch.randn(r, K, dtype=dtype), torch.randn(N, r, dtype=dtype)
    g = torch.tensor([1.3], dtype=dtype).requires_grad_(True) if gain else None
    return Adapter(A.requires_grad_(True), B.requires_grad_(True), scaling, g, dropout)


def reference(x: Tensor, W: Tensor, bias: Tensor | None, adapters: list[Adapter]) -> Tensor:
    """One operation after the other, in x's dtype, with the random numbers in the node's order."""
    y = x @ W.t() if bias is None else x @ W.t() + bias
    for a in adapters:
        dropped = nn.functional.dropout(x.reshape(-1, K), a.dropout).view(x.shape) if a.dropout else x
        c = a.scaling if a.gain is None else a.scaling * a.gain
        y = y + (dropped @ a.A.to(x.dtype).t() @ a.B.to(x.dtype).t()) * c
    return y


def leaves(x: Tensor, bias: Tensor | None, adapters: list[Adapter]) -> list[Tensor]:
    tensors = [x, bias, *(t for a in adapters for t in (a.A, a.B, a.gain))]
    return [t for t in tensors if t is not None and t.requires_grad]


def gradients(y: Tensor, of: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad((y.double() * torch.arange(y.numel()).view(y.shape).cos()).sum(), of))


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    if not expected.any():
        return torch.equal(found, expected)
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max()) <= ROUNDING[dtype]


CASES: dict[str, list[dict[str, Any]]] = {
    "none": [],
    "one": [{}],
    "rank 1": [{"r": 1}],
    "gain": [{"gain": True}],
    "dropout": [{"dropout": 0.4}],
    "two": [{"r": 2}, {"r": 6, "scaling": -1.5}],
    "all": [{"gain": True, "dropout": 0.2}, {"r": 3, "dropout": 0.5}, {}],
}


@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 2, 2), (1, 1), (0,)], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_output_and_gradients_are_the_formulas(dtype: torch.dtype, case: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape, K, dtype=dtype, requires_grad=True)
    W, bias = torch.randn(N, K, dtype=dtype), torch.randn(N, dtype=dtype, requires_grad=True)
    adapters = [make_adapter(dtype, **settings) for settings in CASES[case]]
    torch.manual_seed(1)
    expected = reference(x, W, bias, adapters)
    torch.manual_seed(1)
    found = lora_linear(x, lambda: W, bias, adapters)
    assert found.shape == expected.shape
    assert found.dtype == dtype
    assert close(found, expected, dtype)
    of = leaves(x, bias, adapters)
    for one, other in zip(gradients(found, of), gradients(expected, of), strict=True):
        assert one.dtype == other.dtype
        assert close(one, other, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["one", "gain", "two"])
def test_narrow_products_of_float32_adapters_are_close_to_float64(dtype: torch.dtype, case: str) -> None:
    x = torch.randn(16, K).to(dtype).requires_grad_(True)
    W = torch.randn(N, K).to(dtype)
    adapters = [make_adapter(torch.float32, **settings) for settings in CASES[case]]
    exact_x = x.detach().double().requires_grad_(True)
    exact = [
        Adapter(
            *(t.detach().double().requires_grad_(True) for t in (a.A, a.B)),
            a.scaling,
            None if a.gain is None else a.gain.detach().double().requires_grad_(True),
        )
        for a in adapters
    ]
    found, expected = lora_linear(x, lambda: W, None, adapters), reference(exact_x, W.double(), None, exact)
    assert found.dtype == dtype
    assert close(found, expected, dtype)
    of, exact_of = leaves(x, None, adapters), leaves(exact_x, None, exact)
    for one, other in zip(gradients(found, of), gradients(expected, exact_of), strict=True):
        assert close(one, other, dtype)
    assert {a.A.grad_fn for a in adapters} == {None}
    assert all(g.dtype == torch.float32 for g in gradients(lora_linear(x, lambda: W, None, adapters), of[1:]))


@pytest.mark.parametrize("case", ["one", "gain", "two"])
def test_gradcheck(case: str) -> None:
    x = torch.randn(3, K, dtype=torch.float64, requires_grad=True)
    W, bias = torch.randn(N, K, dtype=torch.float64), torch.randn(N, dtype=torch.float64, requires_grad=True)
    adapters = [make_adapter(torch.float64, **settings) for settings in CASES[case]]

    def output(*_: Tensor) -> Tensor:
        return lora_linear(x, lambda: W, bias, adapters)

    assert torch.autograd.gradcheck(output, leaves(x, bias, adapters))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mask_is_the_one_that_dropout_draws_and_random_numbers_go_on_as_they_would(dtype: torch.dtype) -> None:
    x = torch.randn(6, K).to(dtype).requires_grad_(True)
    adapter = make_adapter(torch.float32, dropout=0.5)
    W = torch.zeros(N, K, dtype=dtype)
    torch.manual_seed(2)
    dropped = nn.functional.dropout(x.detach(), 0.5)
    after = torch.rand(3)
    torch.manual_seed(2)
    y = lora_linear(x, lambda: W, None, [adapter])
    y.sum().backward()
    assert torch.equal(torch.rand(3), after)
    assert x.grad is not None
    assert torch.equal(x.grad == 0, dropped == 0)
    torch.manual_seed(9)  # whatever is drawn between forward and backward
    x.grad = None
    torch.manual_seed(2)
    y = lora_linear(x, lambda: W, None, [adapter])
    torch.rand(100)
    y.sum().backward()
    assert torch.equal(x.grad == 0, dropped == 0)


@pytest.mark.parametrize("wanted", ["x", "A", "B", "gain", "bias"])
def test_only_what_is_wanted_gets_a_gradient(wanted: str) -> None:
    x, bias, adapter = torch.randn(4, K), torch.randn(N), make_adapter(torch.float32, gain=True)
    tensors = {"x": x, "bias": bias, "A": adapter.A, "B": adapter.B, "gain": adapter.gain}
    for name, tensor in tensors.items():
        assert tensor is not None
        tensor.requires_grad_(name == wanted)
    W = torch.randn(N, K)
    unpacked: list[int] = []

    def unpack() -> Tensor:
        unpacked.append(1)
        return W

    lora_linear(x, unpack, bias, [adapter]).sum().backward()
    assert {name for name, tensor in tensors.items() if tensor is not None and tensor.grad is not None} == {wanted}
    assert len(unpacked) == (2 if wanted == "x" else 1)  # backward makes W for dx alone


def kept_bytes(x: Tensor, adapters: list[Adapter]) -> int:
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lora_linear(x, lambda: torch.zeros(N, K, dtype=x.dtype), None, adapters).sum()
    own = {t.untyped_storage().data_ptr() for t in (x, *leaves(x, None, adapters))}
    return sum(size for pointer, size in storages.items() if pointer not in own)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_nothing_is_kept_but_the_input_the_adapters_and_the_skinny_product(dropout: float) -> None:
    x = torch.randn(50, K, requires_grad=True)
    assert kept_bytes(x, [make_adapter(torch.float32, dropout=dropout)]) == 50 * 4 * 4
    assert kept_bytes(x, []) == 0


def test_nothing_lives_on_after_backward() -> None:
    x = torch.randn(8, K, requires_grad=True)
    adapter, made = make_adapter(torch.float32), []

    def unpack() -> Tensor:
        W = torch.randn(N, K)
        made.append(weakref.ref(W))
        return W

    y = lora_linear(x, unpack, None, [adapter])
    gc.collect()
    assert made[0]() is None
    y.sum().backward()
    assert all(ref() is None for ref in made)


def test_there_is_no_second_order() -> None:
    x = torch.randn(4, K, requires_grad=True)
    y = lora_linear(x, lambda: torch.randn(N, K), None, [make_adapter(torch.float32)])
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        dx.sum().backward()


def test_the_input_is_not_changed_and_results_are_the_same_each_time() -> None:
    x, W, adapter = torch.randn(4, K), torch.randn(N, K), make_adapter(torch.float32)
    before = x.clone()
    first = lora_linear(x, lambda: W, None, [adapter])
    assert torch.equal(lora_linear(x, lambda: W, None, [adapter]), first)
    assert torch.equal(x, before)
    assert torch.equal(frozen_linear(x, lambda: W), nn.functional.linear(x, W))


@pytest.mark.parametrize("shape", [(5,), (2, 3), ()], ids=str)
def test_the_output_may_be_changed_in_place(shape: tuple[int, ...]) -> None:
    x, W, adapter = torch.randn(*shape, K, requires_grad=True), torch.randn(N, K), make_adapter(torch.float32)
    y = lora_linear(x, lambda: W, None, [adapter])
    y *= 2
    y[..., 0] = 0
    (found,) = torch.autograd.grad(y.sum(), [adapter.B])
    expected = torch.autograd.grad((reference(x, W, None, [adapter]) * 2)[..., 1:].sum(), [adapter.B])[0]
    assert close(found, expected, torch.float32)


def dora_formula(x: Tensor, W: Tensor, bias: Tensor | None, a: Adapter) -> Tensor:
    """Equation 5 of arXiv 2402.09353 with the norm a constant, as in its section 4.3."""
    V = W + a.scaling * a.B.to(x.dtype) @ a.A.to(x.dtype)
    assert a.magnitude is not None
    y = x @ (a.magnitude.to(x.dtype)[:, None] * V / V.detach().norm(dim=1, keepdim=True)).t()
    return y if bias is None else y + bias


def squares(W: Tensor) -> Tensor:
    return W.double().square().sum(1).to(torch.promote_types(W.dtype, torch.float32))


@pytest.mark.parametrize("shape", [(5,), (2, 3), (1, 1), (0,)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dora_is_its_formula(dtype: torch.dtype, bias: bool, shape: tuple[int, ...]) -> None:
    x, W = torch.randn(*shape, K, dtype=dtype, requires_grad=True), torch.randn(N, K, dtype=dtype)
    b = torch.randn(N, dtype=dtype, requires_grad=True) if bias else None
    plain = make_adapter(dtype)
    magnitude = torch.rand(N, dtype=dtype).add_(0.5).requires_grad_(True)
    adapter = replace(plain, magnitude=magnitude, row_squares=squares)
    found, expected = dora_linear(x, lambda: W, b, adapter), dora_formula(x, W, b, adapter)
    assert found.shape == expected.shape
    assert found.dtype == dtype
    assert close(found, expected, dtype)
    of = [*leaves(x, b, [adapter]), magnitude]
    # the norm adds a root and a quotient to the roundings of the products
    for one, other in zip(gradients(found, of), gradients(expected, of), strict=True):
        assert one.dtype == other.dtype
        assert torch.allclose(
            one,
            other,
            rtol=20 * ROUNDING[dtype],
            atol=20 * ROUNDING[dtype] * float(other.abs().max() if other.numel() else 0),
        )


def test_dora_in_bfloat16_is_close_to_float64() -> None:
    x, W = torch.randn(16, K).bfloat16().requires_grad_(True), torch.randn(N, K).bfloat16()
    magnitude = torch.rand(N).add_(0.5).requires_grad_(True)
    adapter = replace(make_adapter(torch.float32), magnitude=magnitude, row_squares=squares)
    wide = replace(
        adapter,
        A=adapter.A.detach().double().requires_grad_(True),
        B=adapter.B.detach().double().requires_grad_(True),
        magnitude=magnitude.detach().double().requires_grad_(True),
    )
    exact_x = x.detach().double().requires_grad_(True)
    found, expected = dora_linear(x, lambda: W, None, adapter), dora_formula(exact_x, W.double(), None, wide)
    assert close(found, expected, torch.bfloat16)
    assert wide.magnitude is not None
    of, exact_of = [x, adapter.A, adapter.B, magnitude], [exact_x, wide.A, wide.B, wide.magnitude]
    for one, other in zip(gradients(found, of), gradients(expected, exact_of), strict=True):
        assert close(one, other, torch.bfloat16)


def test_dora_of_a_row_of_zeros_stays_finite() -> None:
    W = torch.randn(N, K)
    W[3] = 0
    plain = make_adapter(torch.float32)
    with torch.no_grad():
        plain.B[3] = 0
    magnitude = W.norm(dim=1).requires_grad_(True)
    y = dora_linear(torch.randn(4, K), lambda: W, None, replace(plain, magnitude=magnitude, row_squares=squares))
    assert torch.isfinite(y).all()
    assert not y[:, 3].any()


@pytest.mark.parametrize("make", [lambda: torch.randn(1, K, 6).transpose(1, 2), lambda: torch.randn(K, 6).t()])
def test_the_mask_is_one_whatever_the_order_in_memory(make: Callable[[], Tensor]) -> None:
    """Column-major, as after a convolution."""
    x = make().detach().requires_grad_(True)
    adapter = make_adapter(torch.float32, dropout=0.5)
    with torch.no_grad():
        adapter.A.copy_(torch.eye(4, K))
        adapter.B.copy_(torch.eye(N, 4))
    torch.manual_seed(2)
    y = lora_linear(x, lambda: torch.zeros(N, K), None, [adapter])
    (dx,) = torch.autograd.grad(y.sum(), [x])
    # y's first columns are the dropped x, times the scaling; its derivative is the mask, times the same
    torch.testing.assert_close(y[..., :4], x[..., :4] * dx[..., :4])
    assert 0 < int((dx[..., :4] == 0).sum()) < dx[..., :4].numel()

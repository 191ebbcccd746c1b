"""A product is kept as its factors: gradients are the same to the bit, its memory is free, hooks see the product."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from hf_qlora.kernels import factors
from hf_qlora.kernels.dora import dora_linear
from hf_qlora.kernels.functional import Adapter, lora_linear
from hf_qlora.kernels.shared import share


T, K, N, R = 16, 24, 40, 4
Layer = Callable[[Tensor], Tensor]


def make_layer(kind: str = "lora", shared: bool = False, dtype: torch.dtype = torch.float32) -> tuple[Layer, Adapter]:
    """A layer and its adapter, with the same weights each time."""
    generator = torch.Generator().manual_seed(0)
    W, A, B = (torch.randn(*shape, generator=generator) for shape in ((N, K), (R, K), (N, R)))
    more: dict[str, Any] = {"dropout": 0.3} if kind == "dropout" else {}
    if kind == "dora":
        more = {"magnitude": torch.ones(N).requires_grad_(True), "row_squares": lambda W: W.float().square().sum(1)}
    adapter = Adapter(A.requires_grad_(True), B.requires_grad_(True), 0.5, **more)

    def layer(x: Tensor) -> Tensor:
        given, total = share(x) if shared else (x, None)
        unpack = W.to(dtype).clone
        if kind == "dora":
            return dora_linear(given, unpack, None, adapter, total)
        return lora_linear(given, unpack, None, [adapter], total)

    return layer, adapter


def make_factors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    gate, up = (torch.randn(2, T // 2, K, generator=generator).to(dtype).requires_grad_(True) for _ in range(2))
    return gate, up


def gradients(layer: Layer, adapter: Adapter, make_x: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> Any:
    gate, up = make_factors(dtype)
    torch.manual_seed(2)
    y = layer(make_x(gate, up))
    return torch.autograd.grad(y.float().square().sum(), [gate, up, adapter.A, adapter.B])


def product(gate: Tensor, up: Tensor) -> Tensor:
    return nn.functional.silu(gate) * up


def is_freed(layer: Layer, x: Tensor) -> tuple[Tensor, bool]:
    """The layer's result, and whether nothing but the caller's name holds the memory of x."""
    y, storage = layer(x), StorageWeakRef(x.untyped_storage())
    del x
    gc.collect()
    return y, bool(storage.expired())


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ["lora", "dropout", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_a_product_that_is_kept_to_the_bit(dtype: torch.dtype, kind: str, shared: bool) -> None:
    layer, adapter = make_layer(kind, shared, dtype)

    def opaque(gate: Tensor, up: Tensor) -> Tensor:
        return product(gate, up).view(2, T // 2, K)  # another operation than a product makes it

    found = gradients(layer, adapter, product, dtype)
    for one, other in zip(found, gradients(layer, adapter, opaque, dtype), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["lora", "dropout", "dora"])
@pytest.mark.parametrize("shared", [False, True])
def test_the_memory_of_a_product_is_free_after_the_forward(shared: bool, kind: str) -> None:
    layer, _ = make_layer(kind, shared)
    y, freed = is_freed(layer, product(*make_factors()))
    assert freed
    assert y.requires_grad


@pytest.mark.parametrize(
    "make_x",
    [
        lambda gate, up: gate + up,
        lambda gate, up: gate * 2.0,
        lambda gate, up: gate * up[:, :1],  # spread over the tokens
        lambda gate, up: gate.detach() * up,  # one factor alone is kept by autograd
        lambda gate, up: product(gate, up).mul_(up),  # in place, of what is gone
        lambda gate, up: product(gate, up).double().float(),
    ],
    ids=["sum", "number", "spread", "one factor", "in place", "cast"],
)
def test_what_cannot_be_made_again_is_kept(make_x: Callable[[Tensor, Tensor], Tensor]) -> None:
    layer, adapter = make_layer()
    _, freed = is_freed(layer, make_x(*make_factors()))
    assert not freed
    gate, up = make_factors()
    x = make_x(gate, up)
    y = layer(x)
    found = torch.autograd.grad(y.sum(), adapter.A)[0]
    expected = torch.full((R, T), 0.5) * adapter.B.sum(0)[:, None] @ x.detach().view(T, K)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-4)  # float32 sums of 640 products


def test_a_factor_changed_in_place_is_an_error() -> None:
    layer, adapter = make_layer()
    gate, up = make_factors()
    up = up * 1.0
    y = layer(gate * up)
    with torch.no_grad():
        up.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), adapter.A)


def test_a_product_changed_out_of_autograds_sight_is_kept_and_found_out() -> None:
    layer, adapter = make_layer()
    x = product(*make_factors())
    with torch.no_grad():
        x.zero_()  # before the layer reads it: the factors would make another x
    dA = torch.autograd.grad(layer(x).sum(), adapter.A)[0]
    assert not dA.any()


@pytest.mark.parametrize("how", ["checkpointed", "packed away"])
def test_factors_that_hooks_have_packed_are_not_unpacked(how: str) -> None:
    layer, adapter = make_layer()
    gate, up = make_factors()
    calls: list[str] = []

    def make(gate: Tensor, up: Tensor) -> Tensor:
        calls.append("made")
        return product(gate, up)

    def unpack(tensor: Tensor) -> Tensor:
        calls.append("unpacked")
        return tensor

    if how == "checkpointed":
        x = torch.utils.checkpoint.checkpoint(make, gate, up, use_reentrant=False)
    else:
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
            x = make(gate, up)
    y = layer(x)
    assert calls == ["made"]
    found = torch.autograd.grad(y.square().sum(), [gate, up, adapter.A, adapter.B])
    for one, other in zip(found, gradients(layer, adapter, product, torch.float32), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("how", ["backward has been there", "a factor was written to"])
def test_factors_that_are_gone_are_none(how: str) -> None:
    layer, adapter = make_layer()
    gate, up = make_factors()
    wide = up * 1.0
    x = gate * wide
    if how == "a factor was written to":
        with torch.no_grad():
            wide.zero_()
    else:
        x.sum().backward()
    found = torch.autograd.grad(layer(x).sum(), adapter.A)[0]
    expected = torch.full((R, T), 0.5) * adapter.B.sum(0)[:, None] @ x.detach().view(T, K)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-4)  # float32 sums of 640 products


@pytest.mark.parametrize("kind", ["lora", "dropout", "dora"])
@pytest.mark.parametrize("no_gradients", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_looked_for(kind: str, no_gradients: Any) -> None:
    layer, _ = make_layer(kind)
    gate, up = make_factors()
    x = product(gate, up)
    x.sum().backward()
    torch.manual_seed(3)
    expected = layer(x.detach())
    with no_gradients():
        torch.manual_seed(3)
        assert torch.equal(layer(x), expected)
        torch.manual_seed(3)
        assert torch.equal(layer(product(gate, up)), expected)


def test_nothing_lives_on_after_backward() -> None:
    layer, _ = make_layer()
    gate, up = make_factors()
    wide = up * 1.0
    y = layer(gate * wide)
    y.sum().backward()
    storage = StorageWeakRef(wide.untyped_storage())
    del wide
    gc.collect()
    assert storage.expired()
    assert y.grad_fn is not None


def test_under_hooks_the_product_is_saved_and_may_be_counted_as_left_out() -> None:
    layer, adapter = make_layer()
    saved: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gate, up = make_factors()
        x = product(gate, up)
        before = len(saved)
        with factors.products_left_out(pack) as left_out:
            y = layer(x)
            with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
                layer(product(gate, up))  # given to others
        assert saved[before:].count(tuple(x.shape)) == 1
        assert left_out == {StorageWeakRef(x.untyped_storage()): 1}
        layer(product(gate, up))  # nobody asks any more
    assert len(left_out) == 1
    expected = gradients(layer, adapter, product, torch.float32)
    for one, other in zip(
        torch.autograd.grad(y.square().sum(), [gate, up, adapter.A, adapter.B]), expected, strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_it_has_the_same_gradients(use_reentrant: bool) -> None:
    layer, adapter = make_layer()
    expected = gradients(layer, adapter, product, torch.float32)
    gate, up = make_factors()

    def block(gate: Tensor, up: Tensor) -> Tensor:
        return layer(product(gate, up))

    y = torch.utils.checkpoint.checkpoint(block, gate, up, use_reentrant=use_reentrant)
    y.square().sum().backward()
    for one, other in zip([gate.grad, up.grad, adapter.A.grad, adapter.B.grad], expected, strict=True):
        assert one is not None
        assert torch.equal(one, other)

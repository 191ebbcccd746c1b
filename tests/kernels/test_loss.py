"""The chunked loss and its gradients are those of cross entropy over all logits, which are never there.

Oracles: finite differences in float64, and `torch.nn.functional.cross_entropy` over the full logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hf_qlora.kernels.loss import chunked_cross_entropy, linear_cross_entropy


T, K, V = 11, 6, 13
ROW_BYTES = 4 * V
# Sums of 11 x 13 terms: some roundings of each dtype, relative to the largest value. In bfloat16 the oracle computes
# in float32 from the same numbers, so that the roundings are those of the logits and of the products' results.
ROUNDING = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
TARGETS = {"none ignored": [], "some": [0, 3, 4, 10], "one left": [i for i in range(T) if i != 5]}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def inputs(dtype: torch.dtype, ignored: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    target = torch.randint(0, V, (T,))
    target[ignored] = -100
    hidden, W, bias = torch.randn(T, K).to(dtype), torch.randn(V, K).to(dtype), torch.randn(V).to(dtype)
    return hidden.requires_grad_(True), W, bias, target


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    error = (found.detach().double() - expected.detach().double()).abs().max()
    return float(error) <= ROUNDING[dtype] * float(expected.detach().double().abs().max())


@pytest.mark.parametrize("rows", [1, 4, 5, 11, 100])  # with and without a shorter last chunk
@pytest.mark.parametrize("ignored", TARGETS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_both_ways_are_cross_entropy_over_full_logits(
    dtype: torch.dtype, with_bias: bool, smoothing: float, reduction: str, ignored: str, rows: int
) -> None:
    hidden, W, bias, target = inputs(dtype, TARGETS[ignored])
    b = bias if with_bias else None
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    start = hidden.detach().to(exact).requires_grad_(True)
    settings: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
    expected = F.cross_entropy(F.linear(start, W.to(exact), b if b is None else b.to(exact)), target, **settings)
    (of_expected,) = torch.autograd.grad(expected * 1.7, start)
    chunk_bytes = rows * ROW_BYTES * (2 if dtype == torch.float64 else 1)
    ways = [
        linear_cross_entropy(hidden, lambda: W, b, target, chunk_bytes=chunk_bytes, **settings),
        chunked_cross_entropy(
            hidden, lambda h: F.linear(h, W, b), [], target, classes=V, chunk_bytes=chunk_bytes, **settings
        ),
    ]
    for found in ways:
        (of_found,) = torch.autograd.grad(found * 1.7, hidden)
        assert found.dtype == exact
        assert of_found.dtype == dtype
        assert close(found, expected, dtype)
        assert close(of_found, of_expected, dtype)
        assert not of_found[target == -100].any()


HEADS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "plain": lambda h, W, A: F.linear(h, W),
    "softcap": lambda h, W, A: torch.tanh(F.linear(h, W) / 2.0) * 2.0,
    "scaled": lambda h, W, A: F.linear(h, W) * 0.3,
    "low rank": lambda h, W, A: F.linear(h, W) + (h @ A.t()) @ torch.arange(2 * V).to(A).cos().view(2, V),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_trained_heads_of_any_form(head: str, reduction: str, weighted: bool, smoothing: float) -> None:
    hidden, W, _, target = inputs(torch.float64, TARGETS["some"])
    W.requires_grad_(True)
    A = torch.randn(2, K, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(V, dtype=torch.float64) if weighted else None
    settings: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing, "weight": weight}
    expected = F.cross_entropy(HEADS[head](hidden, W, A), target, **settings)
    trained = [W, A] if head == "low rank" else [W]
    found = chunked_cross_entropy(
        hidden, lambda h: HEADS[head](h, W, A), trained, target, classes=V, chunk_bytes=ROW_BYTES * 8, **settings
    )
    of = [hidden, *trained]
    pairs = zip(torch.autograd.grad(found, of), torch.autograd.grad(expected, of), strict=True)
    assert close(found, expected, torch.float64)
    assert all(close(mine, theirs, torch.float64) for mine, theirs in pairs)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("rows", [0, T])
def test_without_any_row_it_is_what_torch_says(rows: int, reduction: str) -> None:
    hidden = torch.randn(rows, K, requires_grad=True)
    W, target = torch.randn(V, K), torch.full((rows,), -100)
    expected = F.cross_entropy(F.linear(hidden, W), target, reduction=reduction)
    (of_expected,) = torch.autograd.grad(expected, hidden)
    for found in (
        linear_cross_entropy(hidden, lambda: W, None, target, reduction=reduction),
        chunked_cross_entropy(hidden, lambda h: F.linear(h, W), [], target, classes=V, reduction=reduction),
    ):
        assert math.isnan(found.item()) == math.isnan(expected.item()) == (reduction == "mean")
        (of_found,) = torch.autograd.grad(found, hidden)
        assert torch.equal(of_found, of_expected)


def test_gradcheck() -> None:
    hidden, W, bias, target = inputs(torch.float64, TARGETS["some"])

    def fast(h: Tensor) -> Tensor:
        return linear_cross_entropy(h, lambda: W, bias, target, label_smoothing=0.1, chunk_bytes=8 * V * 3)

    def general(h: Tensor, weight: Tensor) -> Tensor:
        return chunked_cross_entropy(
            h, lambda part: F.linear(part, weight), [weight], target, classes=V, chunk_bytes=8 * V * 3
        )

    assert torch.autograd.gradcheck(fast, hidden)
    assert torch.autograd.gradcheck(general, (hidden, W.requires_grad_(True)))


def test_improbable_targets_keep_their_loss() -> None:
    hidden = torch.tensor([[1.0]], requires_grad=True)
    W = torch.tensor([[200.0], [-200.0], [-200.0]])  # exp(-400) is 0 in float32
    loss = linear_cross_entropy(hidden, lambda: W, None, torch.tensor([1]))
    assert float(loss) == 400.0


def test_small_gradients_survive_float16() -> None:
    """A mean over many rows is below float16's least number until the loss scale multiplies it."""
    hidden = torch.randn(4096, K).half().requires_grad_(True)
    W, target = (torch.randn(V, K) * 1e-3).half(), torch.randint(0, V, (4096,))
    scale = 2.0**14
    (found,) = torch.autograd.grad(linear_cross_entropy(hidden, lambda: W, None, target) * scale, hidden)
    start = hidden.detach().float().requires_grad_(True)
    (expected,) = torch.autograd.grad(F.cross_entropy(F.linear(start, W.float()), target) * scale, start)
    assert close(found, expected, torch.float16)


def test_the_narrow_products_of_autocast_are_asked_for_by_dtype() -> None:
    hidden, W, _, target = inputs(torch.float32, [])
    narrow = W.bfloat16()
    found = linear_cross_entropy(hidden, lambda: narrow, None, target, dtype=torch.bfloat16)
    expected = F.cross_entropy(F.linear(hidden.bfloat16(), narrow).float(), target)
    (of_found,), (of_expected,) = (torch.autograd.grad(loss, hidden) for loss in (found, expected))
    assert of_found.dtype == torch.float32
    assert close(found, expected, torch.bfloat16)
    assert close(of_found, of_expected, torch.bfloat16)


class Largest(TorchDispatchMode):
    """The most rows of `columns` numbers that anything within has."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.rows = columns, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.ndim and tensor.shape[-1] == self.columns:
                self.rows = max(self.rows, tensor.numel() // self.columns)
        return result


def test_no_more_logits_than_a_chunk_are_ever_there() -> None:
    hidden, W, _, target = inputs(torch.float32, [1, 2])
    for loss in (
        lambda: linear_cross_entropy(hidden, lambda: W, None, target, chunk_bytes=2 * ROW_BYTES),
        lambda: chunked_cross_entropy(
            hidden, lambda h: F.linear(h, W), [], target, classes=V, chunk_bytes=2 * ROW_BYTES
        ),
    ):
        with Largest(V) as largest:
            loss().backward()
        assert largest.rows in (2, K)  # W transposed has K


def test_there_is_no_second_order_and_backward_can_be_repeated() -> None:
    hidden, W, _, target = inputs(torch.float32, [])
    loss = linear_cross_entropy(hidden, lambda: W, None, target)
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, hidden, retain_graph=True)[0], first)
    (dx,) = torch.autograd.grad(loss * loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()

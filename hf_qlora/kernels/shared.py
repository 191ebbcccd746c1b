"""One input of several layers (q, k and v; gate and up), whose gradients for it are summed in one place.

Each layer adds its product into the sum, and the skinny products are added as one. The sum goes on when autograd has
run, or left out, all of them, which is what it knows of any operation's consumers; so nothing need be known of which
layers are called, or used, beforehand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_qlora.kernels.emulated import add_gradient_in_parts


class SharedInput:
    """One input of several nodes: the sum of the gradients that they have for it."""

    def __init__(self) -> None:
        self._dx: Tensor | None = None
        self._skinny: list[tuple[Tensor, Tensor, float]] = []
        self._pass = -1

    def add(self, g: Tensor, W: Tensor) -> Tensor:
        """Add g W, and return the sum so far, to be added to in place."""
        current = torch._C._current_graph_task_id()
        if self._pass != current:  # else left by a pass that did not want the input's gradient
            self._pass, self._dx, self._skinny = current, None, []
        self._dx = add_product(self._dx, g, W)
        return self._dx

    def add_skinny(self, gs: Tensor, A: Tensor, alpha: float) -> None:
        """Add alpha gs A, with the others of its kind, when all have come."""
        self._skinny.append((gs, A, alpha))

    def take(self) -> Tensor | None:
        """The sum, (tokens, in_features), which is then forgotten; None where nothing was added."""
        dx, skinny, self._dx, self._skinny, self._pass = self._dx, self._skinny, None, [], -1
        if dx is None or not skinny:
            return dx
        alphas = {alpha for _, _, alpha in skinny}
        if len(alphas) > 1:
            skinny, alphas = [(gs * alpha, A, 1.0) for gs, A, alpha in skinny], {1.0}
        gs, A = (
            (skinny[0][:2])
            if len(skinny) == 1
            else (torch.cat([gs for gs, _, _ in skinny], 1), torch.cat([A for _, A, _ in skinny]))
        )
        return dx.addmm_(gs, A, alpha=alphas.pop())


def is_in_backward() -> bool:
    """Whether autograd runs a backward pass on this thread."""
    return torch._C._current_graph_task_id() != -1


def share(x: Tensor) -> tuple[Tensor, SharedInput]:
    """x for several nodes, and the place where they sum up its gradient; both go to each of them."""
    shared = SharedInput()
    gated: Tensor = _Gate.apply(x, shared)
    return gated, shared


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shared: SharedInput) -> Tensor:
        ctx.shared, ctx.shape, ctx.dtype = shared, x.shape, x.dtype
        ctx.set_materialize_grads(False)
        return x.detach()  # and no view, which would keep x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        dx = ctx.shared.take()
        if dx is None:
            return grad, None
        whole = dx.view(ctx.shape).to(ctx.dtype)
        return whole if grad is None else whole + grad, None


def add_product(dx: Tensor | None, g: Tensor, W: Tensor) -> Tensor:
    """Add g W to dx, in place where it is there; g may be wider than W."""
    if g.dtype != W.dtype:
        return add_gradient_in_parts(g.new_zeros(len(g), W.shape[1]) if dx is None else dx, g, W)
    return g @ W if dx is None else dx.addmm_(g, W)

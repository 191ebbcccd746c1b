"""A linear layer whose weight is frozen and kept packed: y = x Wᵀ + b, with W made for the product, then dropped.

Backward needs W again and makes it again; what autograd holds in between is the packed weight, which the layer owns
anyway. There is no gradient for W.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def frozen_linear(x: Tensor, unpack: Callable[[], Tensor], bias: Tensor | None = None) -> Tensor:
    """Apply a frozen, packed linear layer.

    Args:
        x (`torch.Tensor`, (..., in_features)): the input, in the dtype of the product.
        unpack: returns the dense weight, (out_features, in_features), in x's dtype; called once in each direction.
        bias (`torch.Tensor`, (out_features,), *optional*): in x's dtype.

    Returns:
        `torch.Tensor`, (..., out_features), in x's dtype.
    """
    result: Tensor = _FrozenLinear.apply(x, unpack, bias)
    return result


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, unpack: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        ctx.unpack = unpack
        return torch.nn.functional.linear(x, unpack(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        dx = grad @ ctx.unpack() if ctx.needs_input_grad[0] else None
        db = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
        return dx, None, db

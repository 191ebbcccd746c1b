"""A frozen linear layer with DoRA (arXiv 2402.09353) as a single autograd node.

    y = m/n ⊙ (x Wᵀ + c · s Bᵀ) + b,   s = x Aᵀ,   n = ‖W + c B A‖ by rows, a constant for backward (section 4.3)

    n² = ‖W‖² + 2c · B ⊙ (A Wᵀ)ᵀ + c² · B (A Aᵀ) ⊙ B, summed by rows

Rows of W have the same norm in every step; what is left are products with r rows. Neither B A nor an identity matrix
is made. The sum in parentheses is kept for m's gradient, beside what LoRA keeps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_qlora.kernels.emulated import widened
from hf_qlora.kernels.factors import Factors
from hf_qlora.kernels.functional import (
    Adapter,
    Unpack,
    adapter_backward,
    input_gradient,
    kept_factors,
    without_autocast,
)
from hf_qlora.kernels.shared import SharedInput


def dora_linear(
    x: Tensor, unpack: Unpack, bias: Tensor | None, adapter: Adapter, shared: SharedInput | None = None
) -> Tensor:
    """Apply a frozen linear layer with one adapter, which has a magnitude and no dropout.

    Args:
        x, unpack, bias, shared: as for `kernels.functional.lora_linear`.
    """
    magnitude = adapter.magnitude
    factors = kept_factors(x, shared, [adapter])
    result: Tensor = _DoraLinear.apply(x, bias, unpack, shared, factors, adapter, adapter.A, adapter.B, magnitude)
    return result


def weight_norm(W: Tensor, row_squares: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """‖W + scaling · B A‖ by rows, (out_features,), in float32 or wider.

    Args:
        W (`torch.Tensor`, (out_features, in_features)): in the dtype of the product.
        row_squares (`torch.Tensor`, (out_features,)): of W, in float32 or wider.
    """
    wide = torch.promote_types(W.dtype, torch.float32)
    A, B = A.to(W.dtype), B.to(W.dtype).to(wide)
    cross = (W @ A.t()).to(wide)  # (N, r)
    A = A.to(wide)
    own = B @ (A @ A.t())
    squares = row_squares + (B * (2 * scaling * cross + scaling**2 * own)).sum(1)
    return squares.clamp_(min=torch.finfo(wide).tiny).sqrt_()


class _DoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        unpack: Unpack,
        shared: SharedInput | None,
        factors: Factors | None,
        adapter: Adapter,
        A: Tensor,
        B: Tensor,
        magnitude: Tensor,
    ) -> Tensor:
        assert adapter.row_squares is not None
        ctx.unpack, ctx.shared, ctx.scaling = unpack, shared, adapter.scaling
        flat, narrow = widened(x.reshape(-1, x.shape[-1])), unpack()
        W = widened(narrow)
        s = flat @ A.to(flat.dtype).t()
        z = (flat @ W.t()).addmm_(s, B.to(flat.dtype).t(), alpha=adapter.scaling)
        norm = weight_norm(W, adapter.row_squares(narrow), A, B, adapter.scaling)
        ratio, z = magnitude.to(norm.dtype) / norm, z.to(x.dtype)
        x_kept = factors or (x if ctx.needs_input_grad[6] else None, None)
        ctx.save_for_backward(*x_kept, A, B, s, z, norm, ratio)
        ctx.shape = x.shape
        ctx.magnitude_dtype = magnitude.dtype
        result = z.new_empty(*x.shape[:-1], z.shape[-1])
        y = torch.mul(z, ratio, out=result.view(z.shape))
        if bias is not None:
            y += bias
        return result  # and not a view of it, which nobody could change in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(grad.device.type):
            return _dora_backward(ctx, grad)


def _dora_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, factor, A, B, s, z, norm, ratio = ctx.saved_tensors
    x = x if factor is None else x * factor
    whole = grad.reshape(-1, grad.shape[-1])
    g = widened(torch.mul(whole, ratio, out=torch.empty_like(whole)))
    flat = None if x is None else x.reshape(-1, x.shape[-1]).to(g.dtype)
    dx = input_gradient(g, ctx.unpack(), ctx.shared) if ctx.needs_input_grad[0] else None
    dbias = whole.sum(0) if ctx.needs_input_grad[1] else None
    dmagnitude = None
    if ctx.needs_input_grad[8]:
        dmagnitude = ((whole * z).sum(0, dtype=norm.dtype) / norm).to(ctx.magnitude_dtype)
    wanted = (*ctx.needs_input_grad[6:8], False)
    dA, dB, _ = adapter_backward(g, flat, (A, B, None, s), (ctx.scaling, 0.0), None, wanted, dx, ctx.shared)
    own = None if dx is None or ctx.shared is not None else dx.view(ctx.shape).to(grad.dtype)
    return (own, dbias, None, None, None, None, dA, dB, dmagnitude)

"""Linear layers with a frozen weight, alone and with LoRA, as single autograd nodes.

    x (T, K), W (N, K), A (r, K), B (N, r)
    y = x Wᵀ + b + Σ c · s Bᵀ,   s = drop(x) Aᵀ,   c = scaling · gain

    dx = g W + Σ drop'(c · g B A)      dA = c · (g B)ᵀ drop(x)      dB = c · gᵀ s      dgain = scaling · Σ (g B) ⊙ s

W is made for the product (dequantized, or taken as it is) and dropped; backward makes it again. What is kept for
backward is s, the adapters, and x itself, not a copy, where an A learns (with LoRA-FA none does): the skinny products
need no (T, N) or (T, K) tensor of their own. An x that is a product is made again too (`factors.py`).
A dropout mask is not kept but drawn again from the same state of the random numbers. A and B are master copies,
normally float32, and are cast to x's dtype in every step. There is no gradient for W, and none of second order.

Layers that get one x sum their dx in one place (`shared.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_qlora.kernels.dropout import dropped, random_again, random_state
from hf_qlora.kernels.emulated import FEW_ROWS, is_emulated, product_in_parts, widened
from hf_qlora.kernels.factors import Factors, factors_of
from hf_qlora.kernels.shared import SharedInput, add_product


Unpack = Callable[[], Tensor]


@dataclass(frozen=True)
class Adapter:
    """One LoRA of a layer.

    Attributes:
        A (`torch.Tensor`, (r, in_features)), B (`torch.Tensor`, (out_features, r)): in any floating dtype.
        scaling: α/r, or what stands for it.
        gain (`torch.Tensor`, (1,), *optional*): multiplies the scaling, and may be learned.
        dropout: probability of dropping an input of A; 0 in eval.
        magnitude (`torch.Tensor`, (out_features,), *optional*): DoRA's; then the layer is `kernels.dora`'s.
        row_squares: of the dense weight, (out_features, in_features), the sums of squares of its rows in float32;
            wanted with a magnitude.
    """

    A: Tensor
    B: Tensor
    scaling: float
    gain: Tensor | None = None
    dropout: float = 0.0
    magnitude: Tensor | None = None
    row_squares: Callable[[Tensor], Tensor] | None = None


def frozen_linear(x: Tensor, unpack: Unpack, bias: Tensor | None = None) -> Tensor:
    """Apply a frozen, packed linear layer.

    Args:
        x (`torch.Tensor`, (..., in_features)): the input, in the dtype of the product.
        unpack: returns the dense weight, (out_features, in_features), in x's dtype; called once in each direction.
        bias (`torch.Tensor`, (out_features,), *optional*): in x's dtype.

    Returns:
        `torch.Tensor`, (..., out_features), in x's dtype.
    """
    return lora_linear(x, unpack, bias, ())


def lora_linear(
    x: Tensor,
    unpack: Unpack,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    shared: SharedInput | None = None,
) -> Tensor:
    """Apply a frozen linear layer and its adapters; arguments and result as for `frozen_linear`.

    Args:
        shared: what `share` returned with x; x's gradient is then summed there.
    """
    if not (adapters or torch.is_grad_enabled()):  # the bookkeeping of a node takes as long as a small product
        wide = is_emulated(x) and x.numel() > FEW_ROWS * x.shape[-1]
        return _frozen_product(x, unpack(), bias, wide).to(x.dtype)
    tensors = [tensor for adapter in adapters for tensor in (adapter.A, adapter.B, adapter.gain)]
    settings = tuple((adapter.scaling, adapter.dropout) for adapter in adapters)
    factors = kept_factors(x, shared, adapters)
    result: Tensor = _LoraLinear.apply(x, bias, unpack, shared, factors, settings, *tensors)
    return result


def kept_factors(x: Tensor, shared: SharedInput | None, adapters: Sequence[Adapter]) -> Factors | None:
    """What a node saves in place of x, where it saves x at all."""
    learns = torch.is_grad_enabled() and any(adapter.A.requires_grad for adapter in adapters)
    return factors_of(x, shared is not None) if learns else None


def _frozen_product(x: Tensor, W: Tensor, bias: Tensor | None, wide: bool) -> Tensor:
    """In x's dtype, or in float32."""
    flat = x.reshape(-1, x.shape[-1])
    result = x.new_empty(*x.shape[:-1], len(W), dtype=torch.float32 if wide else x.dtype)
    y = result.view(len(flat), len(W))
    if wide:
        product_in_parts(flat, W, bias, y)
    elif bias is None:
        torch.mm(flat, W.t(), out=y)
    else:
        torch.addmm(bias, flat, W.t(), out=y)
    return result


def add_adapters(y: Tensor, x: Tensor, adapters: Sequence[tuple[Tensor, Tensor, float | Tensor]]) -> Tensor:
    """Add to y, in place, what adapters make of x, without gradients and dropout; return y.

    Of few rows x is cast to the adapters' dtype, which is how PEFT has it, and the sum is rounded once. Of more rows
    than an adapter's rank the adapter is cast, which is less to cast, and faster where it is to bfloat16.

    Args:
        y (`torch.Tensor`, (..., out_features)): of x's dtype; not changed, but copied, where it is not contiguous.
        x (`torch.Tensor`, (..., in_features)): the layer's input.
        adapters: of each A (r, in_features), B (out_features, r), and what to multiply their product by.
    """
    y = y.contiguous()
    K, N = x.shape[-1], y.shape[-1]
    rows = x.numel() // K
    for A, B, c in adapters:
        if rows == 1:
            _add_row(y.view(-1), x.reshape(-1), A, B, c)
        elif rows <= A.shape[0] or is_emulated(x):
            wide = torch.promote_types(A.dtype, torch.float32) if is_emulated(x) else A.dtype
            s = x.reshape(-1, K).to(wide) @ A.to(wide).t()
            y.view(rows, N).add_(_times(s, c) @ B.to(wide).t())
        else:
            s = x.reshape(-1, K) @ A.to(x.dtype).t()
            y.view(rows, N).addmm_(_times(s, c), B.to(x.dtype).t())
    return y


def _add_row(y: Tensor, x: Tensor, A: Tensor, B: Tensor, c: float | Tensor) -> None:
    """The same, of vectors: products so small that each operation counts."""
    product = B.mv(A.mv(x.to(A.dtype)))
    if isinstance(c, float):
        y.add_(product, alpha=c)
    else:
        y.add_(_times(product, c))


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        unpack: Unpack,
        shared: SharedInput | None,
        factors: Factors | None,
        settings: tuple[tuple[float, float], ...],
        *tensors: Tensor | None,
    ) -> Tensor:
        ctx.unpack, ctx.settings, ctx.shared = unpack, settings, shared
        result = _frozen_product(x, unpack(), bias, wide=is_emulated(x))
        flat, y = x.reshape(-1, x.shape[-1]).to(result.dtype), result.view(-1, result.shape[-1])
        kept: list[Tensor | None] = [*(factors or (x if any(ctx.needs_input_grad[6::3]) else None, None))]
        ctx.random = []
        for (scaling, dropout), (A, B, gain) in zip(settings, _in_threes(tensors), strict=True):
            ctx.random.append(random_state(flat.device) if dropout else None)
            s = dropped(flat, dropout) @ A.to(flat.dtype).t()
            if gain is None:
                y.addmm_(s, B.to(flat.dtype).t(), alpha=scaling)
            else:
                y.addmm_(_times(s, scaling * gain), B.to(flat.dtype).t())
            kept += [A, B, gain, s]
        ctx.save_for_backward(*kept)
        return result.to(x.dtype)  # and not a view of it, which nobody could change in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(grad.device.type):
            return _lora_backward(ctx, grad)


def _lora_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, factor, *kept = ctx.saved_tensors
    x = x if factor is None else x * factor
    g, shape = widened(grad.reshape(-1, grad.shape[-1])), grad.shape[:-1]
    flat = None if x is None else x.reshape(-1, x.shape[-1]).to(g.dtype)
    dx = input_gradient(g, ctx.unpack(), ctx.shared) if ctx.needs_input_grad[0] else None
    dbias = g.sum(0) if ctx.needs_input_grad[1] else None
    results: list[Tensor | None] = []
    for i, (settings, state) in enumerate(zip(ctx.settings, ctx.random, strict=True)):
        wanted = ctx.needs_input_grad[6 + 3 * i : 9 + 3 * i]
        results += adapter_backward(g, flat, kept[4 * i : 4 * i + 4], settings, state, wanted, dx, ctx.shared)
    own = None if dx is None or ctx.shared is not None else dx.view(*shape, dx.shape[-1]).to(grad.dtype)
    return (own, None if dbias is None else dbias.to(grad.dtype), None, None, None, None, *results)


def input_gradient(g: Tensor, W: Tensor, shared: SharedInput | None) -> Tensor:
    """g W, or the sum that it is added to."""
    return add_product(None, g, W) if shared is None else shared.add(g, W)


def without_autocast(kind: str) -> AbstractContextManager[object]:
    """Nothing is cast within it; of no cost where nothing is cast anyway."""
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def adapter_backward(
    g: Tensor,
    flat: Any,
    kept: Sequence[Any],
    settings: tuple[float, float],
    state: Tensor | None,
    wanted: Sequence[bool],
    dx: Tensor | None,
    shared: SharedInput | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dA, dB and dgain of one adapter, where they are wanted; its part of dx is added in place."""
    (A, B, gain, s), (scaling, dropout) = kept, settings
    gB = g @ B.to(g.dtype)  # (T, r)
    # A number is multiplied into the products, a tensor into what is skinny.
    alpha, gs = (scaling, gB) if gain is None else (1.0, _times(gB, scaling * gain))
    dA = dB = dgain = None
    if wanted[0]:
        with random_again(state, g.device):
            dA = _scaled(gs.t(), dropped(flat, dropout), alpha).to(A.dtype)
    if wanted[1]:
        cs = s if gain is None else _times(s, scaling * gain)
        dB = _scaled(cs.t(), g, alpha).t()  # gᵀ s takes 1.7 times as long on CPUs
        dB = dB.to(B.dtype, memory_format=torch.contiguous_format).contiguous()
    if wanted[2]:
        dgain = (scaling * (_wide(gB) * _wide(s)).sum()).to(gain.dtype).reshape(gain.shape)
    if dx is not None:
        if dropout:
            with random_again(state, g.device):
                dx += dropped(_scaled(gs, A.to(g.dtype), alpha), dropout)
        elif shared is not None:
            shared.add_skinny(gs, A.to(g.dtype), alpha)
        else:
            dx.addmm_(gs, A.to(g.dtype), alpha=alpha)
    return dA, dB, dgain


def _scaled(left: Tensor, right: Tensor, alpha: float) -> Tensor:
    """alpha left right, rounded once."""
    out = left.new_empty(left.shape[0], right.shape[1])
    return torch.addmm(out, left, right, beta=0, alpha=alpha, out=out)


def _times(skinny: Tensor, c: float | Tensor) -> Tensor:
    """The product with a scalar that may have more bits than the tensor's dtype."""
    return skinny * c if isinstance(c, float | int) else (_wide(skinny) * c).to(skinny.dtype)


def _wide(skinny: Tensor) -> Tensor:
    return skinny.to(torch.promote_types(skinny.dtype, torch.float32))


def _in_threes(tensors: Sequence[Any]) -> list[tuple[Any, Any, Any]]:
    return list(zip(tensors[::3], tensors[1::3], tensors[2::3], strict=True))

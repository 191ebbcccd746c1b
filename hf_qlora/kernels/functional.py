"""Linear layers with a frozen weight, alone and with LoRA, as single autograd nodes.

    x (T, K), W (N, K), A (r, K), B (N, r)
    y = x Wᵀ + b + Σ c · s Bᵀ,   s = drop(x) Aᵀ,   c = scaling · gain

    dx = g W + Σ drop'(c · g B A)      dA = c · (g B)ᵀ drop(x)      dB = c · gᵀ s      dgain = scaling · Σ (g B) ⊙ s

W is made for the product (dequantized, or taken as it is) and dropped; backward makes it again. What is kept for
backward is x itself, not a copy, s and the adapters: the skinny products need no (T, N) or (T, K) tensor of their own.
A dropout mask is not kept but drawn again from the same state of the random numbers. A and B are master copies,
normally float32, and are cast to x's dtype in every step. There is no gradient for W, and none of second order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


Unpack = Callable[[], Tensor]


@dataclass(frozen=True)
class Adapter:
    """One LoRA of a layer.

    Attributes:
        A (`torch.Tensor`, (r, in_features)), B (`torch.Tensor`, (out_features, r)): in any floating dtype.
        scaling: α/r, or what stands for it.
        gain (`torch.Tensor`, (1,), *optional*): multiplies the scaling, and may be learned.
        dropout: probability of dropping an input of A; 0 in eval.
    """

    A: Tensor
    B: Tensor
    scaling: float
    gain: Tensor | None = None
    dropout: float = 0.0


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


def lora_linear(x: Tensor, unpack: Unpack, bias: Tensor | None, adapters: Sequence[Adapter]) -> Tensor:
    """Apply a frozen linear layer and its adapters; arguments and result as for `frozen_linear`."""
    tensors = [tensor for adapter in adapters for tensor in (adapter.A, adapter.B, adapter.gain)]
    settings = tuple((adapter.scaling, adapter.dropout) for adapter in adapters)
    result: Tensor = _LoraLinear.apply(x, bias, unpack, settings, *tensors)
    return result


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        unpack: Unpack,
        settings: tuple[tuple[float, float], ...],
        *tensors: Tensor | None,
    ) -> Tensor:
        ctx.unpack, ctx.settings, ctx.shape = unpack, settings, x.shape
        flat = x.reshape(-1, x.shape[-1])
        y = torch.nn.functional.linear(flat, unpack(), bias)
        kept: list[Tensor | None] = [flat if settings else None]
        ctx.random = []
        for (scaling, dropout), (A, B, gain) in zip(settings, _in_threes(tensors), strict=True):
            ctx.random.append(random_state(flat.device) if dropout else None)
            s = _dropped(flat, dropout) @ A.to(flat.dtype).t()
            if gain is None:
                y.addmm_(s, B.to(flat.dtype).t(), alpha=scaling)
            else:
                y.addmm_(_times(s, scaling * gain), B.to(flat.dtype).t())
            kept += [A, B, gain, s]
        ctx.save_for_backward(*kept)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, *kept = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        dx = g @ ctx.unpack() if ctx.needs_input_grad[0] else None
        dbias = g.sum(0) if ctx.needs_input_grad[1] else None
        results: list[Tensor | None] = []
        for i, ((scaling, dropout), state) in enumerate(zip(ctx.settings, ctx.random, strict=True)):
            A, B, gain, s = kept[4 * i : 4 * i + 4]
            wants_A, wants_B, wants_gain = ctx.needs_input_grad[4 + 3 * i : 7 + 3 * i]
            c = scaling if gain is None else scaling * gain
            gB = g @ B.to(g.dtype)  # (T, r)
            gs = _times(gB, c)
            dA = dB = dgain = None
            with random_again(state, flat.device):
                if wants_A:
                    dA = (gs.t() @ _dropped(flat, dropout)).to(A.dtype)
            if wants_B:
                dB = (g.t() @ _times(s, c)).to(B.dtype)
            if wants_gain:
                dgain = (scaling * (_wide(gB) * _wide(s)).sum()).to(gain.dtype).reshape(gain.shape)
            if dx is not None:
                if dropout:
                    with random_again(state, flat.device):
                        dx += _dropped(gs @ A.to(g.dtype), dropout)
                else:
                    dx.addmm_(gs, A.to(g.dtype))
            results += [dA, dB, dgain]
        return (None if dx is None else dx.view(ctx.shape), dbias, None, None, *results)


def _times(skinny: Tensor, c: float | Tensor) -> Tensor:
    """The product with a scalar that may have more bits than the tensor's dtype."""
    return skinny * c if isinstance(c, float | int) else (_wide(skinny) * c).to(skinny.dtype)


def _wide(skinny: Tensor) -> Tensor:
    return skinny.to(torch.promote_types(skinny.dtype, torch.float32))


def _in_threes(tensors: Sequence[Any]) -> list[tuple[Any, Any, Any]]:
    return list(zip(tensors[::3], tensors[1::3], tensors[2::3], strict=True))


def _dropped(x: Tensor, dropout: float) -> Tensor:
    return torch.nn.functional.dropout(x, dropout) if dropout else x


@contextmanager
def random_again(state: Tensor | None, device: torch.device) -> Iterator[None]:
    """Within it, random numbers are drawn from `state`; afterwards they go on as before."""
    if state is None:
        yield
        return
    before = random_state(device)
    _set_random_state(state, device)
    try:
        yield
    finally:
        _set_random_state(before, device)


def random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)

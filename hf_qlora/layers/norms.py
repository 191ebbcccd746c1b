"""Sizes of ΔW and of W, without making ΔW."""

from __future__ import annotations

from typing import Any

from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from hf_qlora.quant.linear4bit import Linear4bit


def product_norm(B: Tensor, A: Tensor) -> float:
    """The Frobenius norm of B A, for B (out, r) and A (r, in): √tr(BᵀB · AAᵀ), in double precision."""
    left, right = B.detach().double(), A.detach().double()
    squared = ((left.T @ left) * (right @ right.T)).sum()
    return float(squared.clamp(min=0).sqrt())


def weight_norm(layer: nn.Module) -> float:
    """The Frobenius norm of a layer's weight, unpacked if need be."""
    weight: Any = layer.wide_weight() if isinstance(layer, Linear4bit) else dequantize_module_weight(layer)
    return float(weight.detach().float().norm())

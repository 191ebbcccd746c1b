"""Scaled dot-product attention as a device would choose it: whether a (tokens × tokens) matrix is made hangs on that.

torch chooses by device, and tensors without data are on none that it knows. On the CPU it takes its flash kernel,
which has no dropout. On CUDA it takes flash attention for half precision without a mask, else the memory-efficient
kernel, which has no grouped queries, else the formula itself. What these keep for backward, their own operators say.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode


_ATEN = torch.ops.aten


class AttentionOf(TorchFunctionMode):
    """Calls the kernel of scaled dot-product attention that the device would choose."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        call = _SIGNATURE.bind(*args, **(kwargs or {}))
        call.apply_defaults()
        return _attention(self.device, **call.arguments)


def _like_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> None:
    """For its signature."""


_SIGNATURE = inspect.signature(_like_sdpa)


def _attention(
    device: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    if device == "cpu":
        choice = SDPBackend.FLASH_ATTENTION if dropout_p == 0 else SDPBackend.MATH
    else:
        choice = _on_cuda(query, attn_mask, enable_gqa and query.shape[1] != key.shape[1])
    if choice == SDPBackend.MATH:
        with torch.nn.attention.sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
    mask = attn_mask
    if mask is not None and mask.dtype == torch.bool:  # what torch does before it calls a kernel
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))
    if device == "cpu":
        found = _ATEN._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale
        )
    elif choice == SDPBackend.FLASH_ATTENTION:
        found = _ATEN._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)
    else:
        if mask is not None:
            mask = mask.expand(*query.shape[:3], key.shape[2])
        found = _ATEN._scaled_dot_product_efficient_attention(
            query, key, value, mask, True, dropout_p, is_causal, scale=scale
        )
    result: Tensor = found[0]
    return result


def _on_cuda(query: Tensor, mask: Tensor | None, grouped: bool) -> SDPBackend:
    """torch's order: flash for half precision without a mask, memory-efficient, and else the formula itself."""
    if query.dtype in (torch.float16, torch.bfloat16) and mask is None and query.shape[-1] <= 256:
        return SDPBackend.FLASH_ATTENTION
    return SDPBackend.MATH if grouped else SDPBackend.EFFICIENT_ATTENTION

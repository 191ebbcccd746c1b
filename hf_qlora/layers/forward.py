"""The training forward of an adapted linear layer as one autograd node (`kernels/functional.py`).

It serves plain LoRA and depth scales, with any dropout and any number of active adapters, over a frozen base. All else
(DoRA and other variants, `lora_bias`, mixed batches, hooks on the parts, a base that is trained, no gradients wanted,
torch.compile) goes the way PEFT has it; which layers do so is logged at debug level, once each.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from hf_qlora.kernels.functional import Adapter, Unpack, lora_linear
from hf_qlora.layers.depth import DepthVariant, scale_of


logger = logging.getLogger(__name__)

_SAID = "_hf_qlora_said_slow"  # on a layer whose way has been logged


def step_adapters(layer: Any) -> list[Adapter] | None:
    """The active adapters as the node takes them; None where this forward is PEFT's."""
    if layer.disable_adapters or layer.merged or torch.compiler.is_compiling():
        return None
    if not (layer.training or torch.is_grad_enabled()):  # in training also without: what checkpointing does first
        return None
    found = []
    for name in layer.active_adapters:
        if name in layer.lora_A:
            parts = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
            why = _obstacle(layer, name, parts)
            if why:
                _say_once(layer, why)
                return None
            A, B, dropout = parts
            scale = scale_of(layer, name)
            p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
            gain = None if scale is None else scale()
            found.append(Adapter(A.weight, B.weight, layer.scaling[name], gain, p))
    return found or None


def step_forward(
    x: Tensor, dtype: torch.dtype, unpack: Unpack, bias: Tensor | None, adapters: list[Adapter]
) -> Tensor:
    """The node in the dtype of the product, which the result has too."""
    kind = x.device.type
    with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
        return lora_linear(x.to(dtype), unpack, None if bias is None else bias.to(dtype), adapters)


def _obstacle(layer: LoraLayer, name: str, parts: tuple[nn.Module, nn.Module, nn.Module]) -> str:
    A, B, dropout = parts
    variant = layer.lora_variant.get(name)
    if variant is not None and not isinstance(variant, DepthVariant):
        return type(variant).__name__
    if type(A) is not nn.Linear or type(B) is not nn.Linear or B.bias is not None:
        return "lora_bias, or other layers than nn.Linear"
    if type(dropout) not in (nn.Identity, nn.Dropout):
        return type(dropout).__name__
    if any(is_hooked(part) for part in (*parts, layer.get_base_layer())):
        return "hooks"
    return ""


def is_hooked(module: nn.Module) -> bool:
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(kinds) or hasattr(module, "_hf_hook")


def _say_once(layer: Any, why: str) -> None:
    if not layer.__dict__.get(_SAID):
        layer.__dict__[_SAID] = True
        logger.debug("%s takes PEFT's forward: %s.", type(layer).__name__, why)

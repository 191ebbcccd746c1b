"""The forward of an adapted linear layer: for training one autograd node, for inference a few operations in place.

The node (`kernels/functional.py`) serves plain LoRA and depth scales, with any dropout and any number of active
adapters, and DoRA alone and without dropout, over a frozen base. In eval mode without gradients plain LoRA and depth
scales are added to the base's result: when a model generates token by token, the products are so small that what
counts is how many operations there are. All else (other variants, `lora_bias`, mixed batches, hooks on the parts, a
base that is trained, inference under autocast) goes the way PEFT has it; which layers do so in training is logged at
debug level, once each.

Under torch.compile what the node serves, but for DoRA, is written in plain operations, which are fused there. PEFT's
own would multiply in the adapters' float32.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from hf_qlora.kernels.dora import dora_linear
from hf_qlora.kernels.functional import Adapter, Unpack, lora_linear, without_autocast
from hf_qlora.layers import siblings
from hf_qlora.layers.depth import SLOT, DepthVariant, scale_of
from hf_qlora.quant.linear4bit import Linear4bit as BaseLinear4bit


logger = logging.getLogger(__name__)

_SQUARES = "_hf_qlora_row_squares"  # on a layer with DoRA: its base's, with what they were computed of
_PLAIN = (type(None), DepthVariant)
_SAID = "_hf_qlora_said_slow"  # on a layer whose way has been logged


def step_adapters(layer: Any) -> list[Adapter] | None:
    """The active adapters as the node takes them; None where this forward is PEFT's."""
    if layer.disable_adapters or layer.merged:
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    compiling = torch.compiler.is_compiling()
    learns = layer.training or torch.is_grad_enabled()  # in training also without: what checkpointing does first
    dora = any(_is_dora(layer, name) for name in names)
    if dora if compiling else not (learns or dora):  # PEFT's DoRA multiplies by an identity matrix
        return None
    found = []
    for name in names:
        why = _obstacle(layer, name, alone=len(names) == 1)
        if why:
            if not compiling:
                _say_once(layer, why)
            return None
        found.append(_adapter(layer, name))
    return found or None


def inference_adapters(layer: Any, x: Tensor) -> list[tuple[Tensor, Tensor, float | Tensor]] | None:
    """The active adapters as `add_adapters` takes them; None where they are not for it.

    It is called for every layer and token, so it reads `_modules`: attributes of modules take ten times as long.
    """
    if layer.training or torch.is_grad_enabled() or layer.disable_adapters or layer.merged:
        return None
    kind = x.device.type
    if torch.is_autocast_enabled(kind) or torch.compiler.is_compiling():
        return None
    modules, found = layer._modules, []
    if is_hooked(modules["base_layer"]):
        return None
    As, Bs, dropouts = (modules[name]._modules for name in ("lora_A", "lora_B", "lora_dropout"))
    for name in layer.active_adapters:
        if name in As:
            A, B, variant = As[name], Bs[name], layer.lora_variant.get(name)
            if type(variant) not in _PLAIN or not (_is_plain(A) and _is_plain(B)) or is_hooked(dropouts[name]):
                return None
            c = layer.scaling[name]
            if variant is not None:
                scale = modules[SLOT]._modules[name]
                # elsewhere than on the CPU its value would wait for the device
                c = c * scale.value if kind == "cpu" else c * scale()
            found.append((A._parameters["weight"], B._parameters["weight"], c))
    return found or None


def _is_plain(part: Any) -> bool:
    return type(part) is nn.Linear and part._parameters["bias"] is None and not is_hooked(part)


def _adapter(layer: Any, name: str) -> Adapter:
    A, B, scaling, p = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name], _dropout(layer, name)
    if _is_dora(layer, name):
        magnitude = layer.lora_magnitude_vector[name].weight
        return Adapter(A, B, scaling, magnitude=magnitude, row_squares=partial(_row_squares, layer))
    scale = scale_of(layer, name)
    return Adapter(A, B, scaling, None if scale is None else scale(), p)


def _dropout(layer: Any, name: str) -> float:
    dropout = layer.lora_dropout[name]
    return float(dropout.p) if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def _is_dora(layer: Any, name: str) -> bool:
    return isinstance(layer.lora_variant.get(name), DoraLinearVariant)


def _row_squares(layer: Any, W: Tensor) -> Tensor:
    """Of the frozen W; of a packed one once for each of its dtypes, and again when its bytes have been replaced."""
    base, wide = layer.get_base_layer(), torch.promote_types(W.dtype, torch.float32)
    key = (base.weight.data_ptr(), base.weight._version, W.dtype, W.device)
    known = layer.__dict__.get(_SQUARES)
    if known is None or known[0] != key or not isinstance(base, BaseLinear4bit):  # dense ones are changed unseen
        known = layer.__dict__[_SQUARES] = (key, torch.linalg.vector_norm(W, dim=1, dtype=wide).square_())
    squares: Tensor = known[1]
    return squares


def step_forward(
    x: Tensor, dtype: torch.dtype, unpack: Unpack, bias: Tensor | None, adapters: list[Adapter]
) -> Tensor:
    """The node in the dtype of the product, which the result has too."""
    kind = x.device.type
    with without_autocast(kind):
        given, shared = siblings.shared_input(x, dtype)
        narrow = None if bias is None else bias.to(dtype)
        if adapters[0].magnitude is not None:
            return dora_linear(given, unpack, narrow, adapters[0], shared)
        return lora_linear(given, unpack, narrow, adapters, shared)


def traced_forward(x: Tensor, dtype: torch.dtype, base: Callable[[Tensor], Tensor], adapters: list[Adapter]) -> Tensor:
    """The same in plain operations, for torch.compile; `base` applies the frozen layer."""
    kind = x.device.type
    with without_autocast(kind):
        x = x.to(dtype)
        y = base(x)
        for adapter in adapters:
            dropped = nn.functional.dropout(x, adapter.dropout) if adapter.dropout else x
            s = nn.functional.linear(dropped, adapter.A.to(dtype))
            c = adapter.scaling if adapter.gain is None else adapter.scaling * adapter.gain
            y = y + nn.functional.linear((s * c).to(dtype), adapter.B.to(dtype))
        return y


def _obstacle(layer: LoraLayer, name: str, alone: bool) -> str:
    A, B, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    parts = [A, B, dropout]
    variant = layer.lora_variant.get(name)
    if type(variant) not in (type(None), DepthVariant, DoraLinearVariant):
        return type(variant).__name__
    if _is_dora(layer, name):
        if not alone or _dropout(layer, name):
            return "DoRA with dropout, or beside other adapters"
        parts.append(layer.lora_magnitude_vector[name])
    if type(A) is not nn.Linear or type(B) is not nn.Linear or B.bias is not None:
        return "lora_bias, or other layers than nn.Linear"
    if type(dropout) not in (nn.Identity, nn.Dropout):
        return type(dropout).__name__
    if _dropout(layer, name) and layer.get_base_layer().weight.device.type not in ("cpu", "cuda"):
        return "dropout on a device whose random numbers are not known here"
    if any(is_hooked(part) for part in (*parts, layer.get_base_layer())):
        return "hooks"
    return ""


def is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "_hf_hook" in module.__dict__
    )


def _say_once(layer: Any, why: str) -> None:
    if not layer.__dict__.get(_SAID):
        layer.__dict__[_SAID] = True
        logger.debug("%s takes PEFT's forward: %s.", type(layer).__name__, why)

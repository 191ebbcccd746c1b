"""Output heads whose logits are lazy while they are trained, so that the loss can be computed in chunks.

A head is changed in place to a subclass of its own class: the module object stays, with its parameters, names and
hooks. In training its forward returns `LazyLogits`; in eval, without gradients, when compiled, and where the head is
hooked or sharded, so that its weight may be gone when the loss is computed, it is what it was.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from hf_qlora.kernels.emulated import FEW_ROWS, is_emulated, linear_into
from hf_qlora.layers import rowwise  # noqa: F401  # its rules
from hf_qlora.layers.forward import is_hooked
from hf_qlora.layers.logits import FrozenHead, HeadCall, Recipe, lazy_logits
from hf_qlora.layers.subclassed import Subclassed, restore, subclass
from hf_qlora.quant.linear4bit import Linear4bit
from hf_qlora.validation import ConfigError, check_model


def enable_chunked_loss(model: nn.Module) -> None:
    """Compute a model's cross entropy in chunks from now on, without ever making its full logits in training.

    `outputs.logits` are still there for whoever reads them.

    Args:
        model: a transformers model or a `PeftModel`, with an output head (`get_output_embeddings`).

    Raises:
        ConfigError: the model has no output head, or one that is no linear layer.
    """
    check_model(model)
    head = output_head(model)
    if head is None:
        raise ConfigError(
            f"{type(model).__name__} has no output head over a vocabulary (get_output_embeddings() gives none), so "
            "there is nothing to compute in chunks. Leave enable_chunked_loss out."
        )
    if not try_chunked_loss(model):
        raise ConfigError(
            f"The output head of {type(model).__name__} is a {type(head).__name__}, not a linear layer: its loss "
            "cannot be computed in chunks. Leave enable_chunked_loss out."
        )


def try_chunked_loss(model: nn.Module) -> bool:
    """As `enable_chunked_loss`; whether it was possible."""
    disable_chunked_loss(model)
    layers = _linear_layers(output_head(model))
    for layer in layers:
        subclass(layer, ChunkedHead)
    return bool(layers)


def disable_chunked_loss(model: nn.Module) -> bool:
    """Give heads their classes back; whether there were any to give."""
    check_model(model)
    return restore(model, ChunkedHead)


@contextmanager
def set_aside(model: nn.Module) -> Iterator[None]:
    """Within it heads have their own classes; afterwards those that are there then are as before."""
    was_enabled = disable_chunked_loss(model)
    try:
        yield
    finally:
        if was_enabled:
            try_chunked_loss(model)


def output_head(model: nn.Module) -> nn.Module | None:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    getter = getattr(base, "get_output_embeddings", None)
    found: nn.Module | None = getter() if getter is not None else None
    return found


def refuse_fused(model: nn.Module) -> None:
    """Stop TRL's fused head, which reads `weight` and `bias`, where they are not all that the head computes.

    Raises:
        ConfigError: the head is adapted or packed.
    """
    head = output_head(model)
    if isinstance(head, LoraLayer | bnb.nn.Linear4bit):
        name = next((name for name, module in model.named_modules() if module is head), "the output head")
        raise ConfigError(
            f"TRL's fused head reads the weight of {name} and would ignore that it is adapted or quantized. Leave "
            f"{name.rpartition('.')[2]} out of target_modules and of quantization, or use transformers' Trainer."
        )


def _linear_layers(head: nn.Module | None) -> list[Any]:
    if isinstance(head, ModulesToSaveWrapper):
        return [head.original_module, *head.modules_to_save.values()] if _is_linear(head.original_module) else []
    return [head] if _is_linear(head) else []


def _is_linear(head: nn.Module | None) -> bool:
    return isinstance(head.get_base_layer() if isinstance(head, LoraLayer) else head, nn.Linear)


class ChunkedHead(Subclassed):
    """What is put before a head's own class."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Logits, (..., V), of hidden, (..., K)."""
        apply: Any = super().forward
        learns = self._active and self.training and torch.is_grad_enabled()
        if args or kwargs or torch.compiler.is_compiling() or not learns:
            # `generate` asks for the last position: a slice with gaps, of one sequence too, by its strides. Over those
            # torch multiplies by a frozen weight sequence by sequence, with a copy of the weight for each.
            K = hidden.shape[-1]
            whole = hidden.contiguous().view(hidden.numel() // K, K).view(hidden.shape)
            in_parts = not (args or kwargs) and _is_emulated(self, whole)
            result: Tensor = _logits_in_parts(self, whole) if in_parts else apply(whole, *args, **kwargs)
            return result
        parameters = tuple(parameter for parameter in self.parameters() if parameter.requires_grad)
        if not (hidden.requires_grad or parameters) or _is_bound(self):
            result = apply(hidden)
            return result
        kind = hidden.device.type
        with torch.no_grad():
            packed = _packed(self)
            none = hidden.new_empty(0, hidden.shape[-1])
            empty = none.new_empty(0, packed.out_features) if packed is not None else apply(none)
        autocast = kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        frozen = None if parameters else _frozen_head(self, hidden, empty.dtype)
        call = HeadCall(self, apply, functools.partial(_adapters, self), frozen, parameters, autocast)
        return lazy_logits(Recipe(call), hidden, (*hidden.shape[:-1], empty.shape[-1]), empty.dtype)


def _is_emulated(head: Any, hidden: Tensor) -> bool:
    """Whether a head's own product would be plain loops, and may be made otherwise: where it is nothing but that."""
    many = is_emulated(hidden) and hidden.numel() > FEW_ROWS * hidden.shape[-1]
    plain = many and head._own_class is nn.Linear and hidden.dtype == head.weight.dtype
    kind = hidden.device.type
    return plain and not (torch.is_grad_enabled() or torch.is_autocast_enabled(kind) or _is_bound(head))


def _logits_in_parts(head: Any, hidden: Tensor) -> Tensor:
    logits = hidden.new_empty(*hidden.shape[:-1], len(head.weight))
    linear_into(hidden.view(-1, hidden.shape[-1]), head.weight, head.bias, logits.view(-1, len(head.weight)))
    return logits


def _is_bound(head: nn.Module) -> bool:
    """Whether a head is what it is only while it is called: hooked, sharded, a replica, random, or its adapter off."""
    sharded = any(hasattr(p, "device_mesh") or hasattr(p, "ds_id") for p in head.parameters())
    off = any(isinstance(module, BaseTunerLayer) and module.disable_adapters for module in head.modules())
    random = any(isinstance(m, nn.Dropout) and m.p > 0 for m in head.modules())  # a mask for each reading
    return sharded or off or random or getattr(head, "_is_replica", False) or any(map(is_hooked, head.modules()))


def _adapters(head: nn.Module) -> object:
    """What the adapters of a head do beside their parameters."""
    return [
        (module.disable_adapters, list(module.active_adapters), list(module.merged_adapters))
        for module in head.modules()
        if isinstance(module, BaseTunerLayer)
    ]


def _packed(head: nn.Module) -> Any:
    """The packed layer of a head; its result has the dtype of its input."""
    base = head.get_base_layer() if isinstance(head, LoraLayer) else head
    return base if isinstance(base, Linear4bit) else None


def _frozen_head(head: Any, hidden: Tensor, dtype: torch.dtype) -> FrozenHead | None:
    own_class = head._own_class
    if own_class is Linear4bit:
        dtype = head.product_dtype(hidden)
        return FrozenHead(lambda: head.product_weight(dtype), head.bias, dtype)
    if own_class is nn.Linear:
        return FrozenHead(lambda: head.weight.detach().to(dtype), head.bias, dtype)
    return None

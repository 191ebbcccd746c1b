"""Between the native form of an adapter and the portable one: scales ↔ lora_B.

A stock reader scales B A by `lora_alpha / r`. Where the native scaling is another one (rsLoRA: α/√r, arXiv 2312.03732;
`alpha_pattern`: α of the module), the quotient

    c = native scaling / (lora_alpha / r)

is multiplied into `lora_B` on the way out and divided out on the way in, in float32. c is computed from the layer as
it is, never from `scaling`, which `set_scale` and hot-swap change for a time. Folding does not invert to the bit; what
must (Trainer's checkpoints) keeps the native tensors beside.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from hf_qlora.config import QLoRAConfig


Form = Literal["portable", "native"]


@dataclass(frozen=True)
class Exchange:
    """What is known of tensors that cross between a model and PEFT's state-dict functions.

    Attributes:
        form: the form outside the model; portable unless said otherwise.
        source: the file they come from, which must then fit the adapter exactly; "" for a caller's own tensors.
        any_shape: PEFT's `ignore_mismatched_sizes`.
    """

    form: Form = "portable"
    source: str = ""
    any_shape: bool = False


_CALLERS_OWN = Exchange()
_exchange: ContextVar[Exchange] = ContextVar("hf_qlora_exchange", default=_CALLERS_OWN)


@contextmanager
def exchange(form: Form, source: str = "", any_shape: bool = False) -> Iterator[None]:
    """Say what the tensors are that cross within the context."""
    token = _exchange.set(Exchange(form, source, any_shape))
    try:
        yield
    finally:
        _exchange.reset(token)


def current_exchange() -> Exchange:
    return _exchange.get()


def factors(model: nn.Module, config: LoraConfig, adapter: str) -> dict[str, float]:
    """c of every module of an adapter where it is not 1, by the module's name in `model`."""
    if not isinstance(config, QLoRAConfig) or not config.portable:
        return {}
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and adapter in layer.r:
            c = _native_scaling(layer, adapter) * layer.r[adapter] / config.lora_alpha
            if not math.isclose(c, 1.0, rel_tol=1e-12):
                found[_plain(name)] = c
    return found


def fold(tensors: dict[str, Tensor], by: dict[str, float], adapter: str) -> dict[str, Tensor]:
    """The tensors as they leave the model; those that change are float32."""
    if current_exchange().form == "native":
        return tensors
    return {
        name: t.float() * by[m] if (m := _scaled_module(name, adapter)) in by else t for name, t in tensors.items()
    }


def unfold(tensors: dict[str, Tensor], by: dict[str, float], adapter: str) -> dict[str, Tensor]:
    """The tensors as they enter the model."""
    if current_exchange().form == "native":
        return tensors
    return {
        name: t.float() / by[m] if (m := _scaled_module(name, adapter)) in by else t for name, t in tensors.items()
    }


def become_portable(model: nn.Module, adapter: str, config: LoraConfig) -> None:
    """Give an adapter of a model the scaling of `config`, for tensors that are folded already (hot-swap)."""
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and adapter in layer.r:
            pattern = get_pattern_key(config.alpha_pattern.keys(), _plain(name))
            layer.lora_alpha[adapter] = config.alpha_pattern.get(pattern, config.lora_alpha)
            layer.use_rslora[adapter] = config.use_rslora


def _native_scaling(layer: LoraLayer, adapter: str) -> float:
    r, alpha = layer.r[adapter], layer.lora_alpha[adapter]
    return float(alpha / math.sqrt(r) if layer.use_rslora[adapter] else alpha / r)


def _scaled_module(key: str, adapter: str) -> str:
    """The module whose `lora_B` (weight or bias) is the tensor of that name, or ""."""
    for tail in (f".lora_B.{adapter}.weight", f".lora_B.{adapter}.bias", f".lora_embedding_B.{adapter}"):
        if key.endswith(tail):
            return _plain(key.removesuffix(tail))
    return ""


def _plain(name: str) -> str:
    """A module's name without what torch.compile and FSDP put into it."""
    return name.replace("_orig_mod.", "").replace("_fsdp_wrapped_module.", "")

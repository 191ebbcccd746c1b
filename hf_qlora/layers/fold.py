"""Between the native form of an adapter and the portable one: scales ↔ lora_B.

A stock reader scales B A by `lora_alpha / r`. Where the native scaling is another one (rsLoRA: α/√r, arXiv 2312.03732;
`alpha_pattern`: α of the module; `layers/depth.py`: times f · g · a), the quotient

    c = native scaling / (lora_alpha / r)

is multiplied into `lora_B` on the way out and divided out on the way in, in float32. c is computed from the layer as
it is, never from `scaling`, which `set_scale` and hot-swap change for a time. Folding does not invert to the bit; what
must (Trainer's checkpoints) keeps the native tensors beside.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

from peft import LoraConfig
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils.hotswap import _update_scaling
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from hf_qlora.config import AdaptiveDepthLoRAConfig, QLoRAConfig
from hf_qlora.layers import attention
from hf_qlora.layers.depth import SLOT, scale_of
from hf_qlora.layers.depth_scale import THETA
from hf_qlora.layers.errors import FoldError
from hf_qlora.layers.names import adapted_layers
from hf_qlora.quant.names import plain_name


Form = Literal["portable", "native", "stock"]  # stock: of an adapter that is not ours


@dataclass(frozen=True)
class Exchange:
    """What is known of tensors that cross between a model and PEFT's state-dict functions.

    Attributes:
        form: the form outside the model; portable unless said otherwise.
        source: the file they come from, which must then fit the adapter exactly; "" for a caller's own tensors.
        any_shape: PEFT's `ignore_mismatched_sizes`.
        past_peft: whether a loader that knows no forms will set them, so that the layers must scale as the file says.
    """

    form: Form = "portable"
    source: str = ""
    any_shape: bool = False
    past_peft: bool = False


_CALLERS_OWN = Exchange()
_exchange: ContextVar[Exchange] = ContextVar("hf_qlora_exchange", default=_CALLERS_OWN)


@contextmanager
def exchange(form: Form, source: str = "", any_shape: bool = False, past_peft: bool = False) -> Iterator[None]:
    """Say what the tensors are that cross within the context."""
    token = _exchange.set(Exchange(form, source, any_shape, past_peft))
    try:
        yield
    finally:
        _exchange.reset(token)


def current_exchange() -> Exchange:
    return _exchange.get()


def factors(model: nn.Module, config: LoraConfig, adapter: str, from_file: bool = False) -> dict[str, float]:
    """c of every module of an adapter where it is not 1, by the module's name in `model`.

    Args:
        from_file: for tensors of a file, whose own record says whether they are folded, whatever the config will do.
    """
    if not isinstance(config, QLoRAConfig) or not (config.folds or from_file):
        return {}
    stock = current_exchange().form == "stock"  # whose scaling is the model's, but which has no depth
    found = {
        name: (1.0 if stock else _native_scaling(layer, adapter) * layer.r[adapter] / config.lora_alpha)
        * _depth(layer, adapter)
        for name, layer in adapted_layers(model, adapter)
    }
    return {name: c for name, c in found.items() if not math.isclose(c, 1.0, rel_tol=1e-12)}


def fold(tensors: dict[str, Tensor], by: dict[str, float], adapter: str) -> dict[str, Tensor]:
    """The tensors as they leave the model, without the state of depth scales; those that change are float32."""
    if current_exchange().form == "native" or not tensors:  # none: a process that holds no part of them
        return tensors
    modules = {name: _scaled_module(name, adapter) for name in tensors}
    broken = sorted(name for name, c in by.items() if not math.isfinite(c))
    if broken:
        raise FoldError(
            f"The scale of {broken[0]} is {by[broken[0]]}, so that adapter {adapter!r} would be lost in the file: its "
            "training diverged. Go back to a checkpoint, and lower the learning rate."
        )
    lost = sorted(by.keys() - set(modules.values()))
    if lost:
        raise FoldError(
            f"lora_B of {lost[0]} and {len(lost) - 1} others cannot be found among the tensors to save, so that their "
            "scales cannot be folded into them. Wrap the model after get_peft_model with names that PEFT knows, or "
            f"set portable=False in the config of adapter {adapter!r}."
        )
    of_scales = tuple(f".{SLOT}.{adapter}.{name}" for name in (THETA, "observed"))
    return {
        name: t.float() * by[modules[name]] if modules[name] in by else t
        for name, t in tensors.items()
        if not name.endswith(of_scales)
    }


def unfold(tensors: dict[str, Tensor], by: dict[str, float], adapter: str) -> dict[str, Tensor]:
    """The tensors as they enter the model."""
    if current_exchange().form == "native":
        return tensors
    return {
        name: t.float() / by[m] if (m := _scaled_module(name, adapter)) in by else t for name, t in tensors.items()
    }


def rank_and_scaling(config: LoraConfig, module: str) -> tuple[int, float]:
    """What a config gives the module of that name in the model, its patterns considered."""
    ranks, alphas = config.rank_pattern, config.alpha_pattern
    r = ranks.get(get_pattern_key(ranks.keys(), module), config.r)
    alpha = alphas.get(get_pattern_key(alphas.keys(), module), config.lora_alpha)
    return r, _scaling(r, alpha, config.use_rslora)


def after_hot_swap(model: nn.Module, adapter: str, config: LoraConfig, swapped_in: LoraConfig) -> None:
    """Make layers and config of a hot-swapped adapter say what its tensors, which are folded, now are.

    PEFT has fitted the tensors in, padding ranks that are smaller than the old ones. Its scaling does not see the new
    config's patterns, because it matches them against tensor names, so that it is set here again.
    """
    layers = dict(adapted_layers(model, adapter))
    ranks = {name: _rank(layer, adapter) for name, layer in layers.items()}
    config.r = max(ranks.values(), key=list(ranks.values()).count)
    config.lora_alpha = swapped_in.lora_alpha
    config.use_rslora, config.rank_pattern, config.alpha_pattern = False, {}, {}
    if isinstance(config, AdaptiveDepthLoRAConfig):
        config.depth_profile, config.attention = "constant", "off"
        attention.unwatch(model, adapter)
    for name, layer in layers.items():
        layer.r[adapter], layer.use_rslora[adapter] = ranks[name], False
        if (depth := scale_of(layer, adapter)) is not None:
            depth.neutralise()
        module = _pattern_name(name, layer)
        scaling = rank_and_scaling(swapped_in, module)[1]
        _update_scaling(layer, adapter, scaling)
        layer.lora_alpha[adapter] = scaling * ranks[name]
        key = re.escape(module)
        if ranks[name] != config.r:
            config.rank_pattern[key] = ranks[name]
        if not math.isclose(layer.lora_alpha[adapter], config.lora_alpha, rel_tol=1e-12):
            config.alpha_pattern[key] = layer.lora_alpha[adapter]


def _pattern_name(name: str, layer: LoraLayer) -> str:
    """The name that PEFT matches patterns against; wrappers of one module's parameters are nested in each other."""
    module = name.removeprefix("base_model.model.").replace(".base_layer", "")
    return f"{module}.{layer.parameter_name}" if isinstance(layer, ParamWrapper) else module


def _rank(layer: LoraLayer, adapter: str) -> int:
    A = layer.lora_A[adapter].weight if adapter in layer.lora_A else layer.lora_embedding_A[adapter]
    return int(A.shape[0]) // int(getattr(layer, "num_experts", 1))  # experts in 3-D parameters stack theirs


def _native_scaling(layer: LoraLayer, adapter: str) -> float:
    return _scaling(layer.r[adapter], layer.lora_alpha[adapter], layer.use_rslora[adapter])


def _depth(layer: LoraLayer, adapter: str) -> float:
    scale = scale_of(layer, adapter)
    if scale is None:
        return 1.0
    return scale.value if math.isfinite(scale.theta) else math.nan


def _scaling(r: int, alpha: float, use_rslora: bool) -> float:
    return float(alpha / math.sqrt(r) if use_rslora else alpha / r)


def _scaled_module(key: str, adapter: str) -> str:
    """The module whose `lora_B` (weight or bias) is the tensor of that name, or ""."""
    for tail in (f".lora_B.{adapter}.weight", f".lora_B.{adapter}.bias", f".lora_embedding_B.{adapter}"):
        if key.endswith(tail):
            return plain_name(key.removesuffix(tail))
    return ""

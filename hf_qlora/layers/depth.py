"""The scale of a layer's depth: ΔW = (α/r) · f(l) · g · a · B A.

    f(l)                      a profile over the layers 0 … L−1 of a stack, with mean 1 if normalized; fixed
    g = exp(κ tanh(θ/κ))      learned, one θ for each adapted module; positive, bounded, exactly 1 at the start
    a                         from the layer's attention pattern; 1 until it has been observed

PEFT's `scaling` stays α/r (or α/√r): hot-swap resets it, and a temporary `set_scale` must not end up in a file. The
scale is a module of its own in each LoRA layer, and a `LoraVariant` multiplies by it, which is PEFT's way to give a
layer another forward.

The module stands in the slot `lora_magnitude_vector`, which other variants (DoRA) use and which is free here: PEFT
trains, moves, deletes and hot-swaps what is there, and TRL's cast of trainable parameters to bfloat16 leaves that name
out. θ is called `bias`, because Trainer leaves that name out of weight decay. It is never in an adapter file: folding
(`layers/fold.py`) multiplies the scale into `lora_B`, and the file's JSON remembers θ and a.

With Adam and no clipping, a fixed f is the same as a learning rate per layer: the update of `lora_B` does not depend
on the size of its gradient. What f changes is that ratio, and the weight of the decay.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Linear, LoraVariant
from torch import Tensor, nn

from hf_qlora.config import AdaptiveDepthLoRAConfig
from hf_qlora.layers.depth_scale import DepthScale
from hf_qlora.layers.errors import MergeError
from hf_qlora.layers.names import adapted_layers
from hf_qlora.layers.profile import profile_at
from hf_qlora.validation import ConfigError


logger = logging.getLogger(__name__)

# Layers of PEFT that ask a variant in every path.
SUPPORTED = (Linear, Linear4bit, Linear8bitLt, Conv1d, Conv2d, Conv3d)
SLOT = "lora_magnitude_vector"


class DepthVariant(LoraVariant):
    """LoRA whose product is multiplied by the layer's `DepthScale`."""

    def supports_lora_conversion(self) -> bool:
        """PEFT would convert ΔW without the scale. A saved adapter is plain LoRA already."""
        return False

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        """Nothing: `attach` makes the scale, which needs the module's name."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        dropped = module.lora_dropout[active_adapter](x)
        product: Tensor = module.lora_B[active_adapter](module.lora_A[active_adapter](dropped))
        scale: Tensor = module.scaling[active_adapter] * module.lora_magnitude_vector[active_adapter]()
        return result + product * scale.to(product.dtype)

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        delta = _scaled_delta(module, active_adapter, module.lora_magnitude_vector[active_adapter].value)
        merged: Tensor = orig_weight + delta.to(orig_weight.dtype)
        return merged

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data = DepthVariant.merge_safe(module, active_adapter, orig_weight.data)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        value = module.lora_magnitude_vector[active_adapter].merged_value
        unmerged: Tensor = orig_weight.data - _scaled_delta(module, active_adapter, value).to(orig_weight.dtype)
        return unmerged


def _scaled_delta(module: Any, adapter: str, value: float) -> Tensor:
    refuse_scaled_bias(module, adapter)
    module.lora_magnitude_vector[adapter].merged_value = value
    delta: Tensor = module.get_delta_weight(adapter) * value
    return delta


def refuse_scaled_bias(layer: LoraLayer, adapter: str) -> None:
    """Raise MergeError for an adapter whose bias PEFT would merge without its scale."""
    if layer.lora_bias[adapter] and scale_of(layer, adapter) is not None:
        raise MergeError(
            f"Adapter {adapter!r} has lora_bias=True and a depth scale, and PEFT would merge its bias unscaled. Keep "
            "it unmerged, or save it and merge the saved adapter, which is folded."
        )


def attach(model: nn.Module, config: AdaptiveDepthLoRAConfig, adapter: str) -> None:
    """Give every layer of an adapter its scale.

    Raises:
        ConfigError: a layer without a depth, of a kind that knows no variants, or a profile of another length.
    """
    for name, layer in adapted_layers(model, adapter):
        if not isinstance(layer, SUPPORTED) or not _asks_variants(type(layer)):
            raise ConfigError(
                f"{name} is adapted by {type(layer).__module__}.{type(layer).__name__}, which cannot be scaled by "
                "depth. Name the layers to adapt in target_modules, without it and instead of 'all-linear' (which "
                "takes parameters of experts too), or use QLoRAConfig."
            )
        device = layer.get_base_layer().weight.device
        on = torch.device("cpu") if device.type == "meta" else device  # a file brings no θ that could follow
        scale = DepthScale(profile_at(model, name, config), config, on)
        scale.requires_grad_(layer.lora_B[adapter].weight.requires_grad)
        layer.lora_variant[adapter] = DepthVariant()
        _start_as_its_model(layer, scale, config, model)
        getattr(layer, SLOT)[adapter] = scale


def _start_as_its_model(layer: Any, scale: DepthScale, config: AdaptiveDepthLoRAConfig, model: nn.Module) -> None:
    """Let an adapter made with the very config of another see what that one saw.

    TRL makes its reference adapters so, and copies their parameters, which a is none of.
    """
    configs = getattr(model, "peft_config", {})
    for other, own in getattr(layer, SLOT).items():
        if configs.get(other) is config and isinstance(own, DepthScale):
            scale.see(own.attention, own.concentration, own.observations)


def _asks_variants(cls: type) -> bool:
    """Whether a layer's class computes and merges as one of PEFT's that ask a variant, or as ours do."""

    def is_known(method: str) -> bool:
        definer = next(base for base in cls.__mro__ if method in vars(base))
        return definer in SUPPORTED or any(definer in known.__mro__ for known in SUPPORTED) or _is_ours(definer)

    return all(is_known(method) for method in ("forward", "merge", "unmerge", "_mixed_batch_forward"))


def _is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == __name__.partition(".")[0]


def warn_of_unobserved(model: nn.Module, adapter: str) -> None:
    """Say so where an adapter was trained whose attention should have been observed, and never was."""
    watched = [
        (layer, scale)
        for _, layer in adapted_layers(model, adapter)
        if (scale := scale_of(layer, adapter)) is not None and scale.observed is not None
    ]
    if not watched or any(scale.observations for _, scale in watched):
        return
    if any(bool(layer.lora_B[adapter].weight.detach().any()) for layer, _ in watched):
        logger.warning(
            "Adapter %r has attention='concentration', but no optimizer step was seen after which what its layers saw "
            "could have been used: its scales stayed 1. Is lora_B stepped by a torch optimizer, as it is?",
            adapter,
        )


def scale_of(layer: LoraLayer, adapter: str) -> DepthScale | None:
    """The scale of a layer's adapter; None where it has none."""
    slot = getattr(layer, SLOT)
    return slot[adapter] if adapter in slot and isinstance(slot[adapter], DepthScale) else None


def scales(model: nn.Module, adapter: str) -> dict[str, DepthScale]:
    """The scales of an adapter by the names of its layers."""
    found = ((name, scale_of(layer, adapter)) for name, layer in adapted_layers(model, adapter))
    return {name: scale for name, scale in found if scale is not None}


def learned(model: nn.Module, adapter: str) -> dict[str, dict[str, Any]]:
    """What an adapter's JSON remembers of its scales, by layer."""
    return {
        name: {
            "theta": scale.theta,
            "attention": scale.attention,
            "concentration": scale.concentration,
            "observations": scale.observations,
        }
        for name, scale in scales(model, adapter).items()
    }


def restore(model: nn.Module, adapter: str, values: Mapping[str, Mapping[str, Any]]) -> None:
    """Give an adapter's scales what `learned` returned; those of other layers stay as they are."""
    for name, scale in scales(model, adapter).items():
        if name in values:
            scale.restore(**values[name])


def state_tensors(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """What a model's state dict has of an adapter's scales, and its file has not."""
    return {
        f"{name}.{SLOT}.{adapter}.{key}": tensor.detach()
        for name, scale in scales(model, adapter).items()
        for key, tensor in scale.state_dict().items()
    }


@contextmanager
def in_scaling(model: nn.Module, adapters: list[str]) -> Iterator[None]:
    """Have `scaling` include the depth scales, for what reads ΔW without asking a variant."""
    changed = [
        (layer, adapter, layer.scaling[adapter], scale.value)
        for adapter in adapters
        for _, layer in adapted_layers(model, adapter)
        if (scale := scale_of(layer, adapter)) is not None
    ]
    for layer, adapter, scaling, value in changed:
        layer.scaling[adapter] = scaling * value
    try:
        yield
    finally:
        for layer, adapter, scaling, _ in changed:
            layer.scaling[adapter] = scaling

"""The base that an adapter's config asks for: quantized, checked, or left as it is."""

from __future__ import annotations

import logging
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from hf_qlora.config import NF4Config, QLoRAConfig
from hf_qlora.layers.linear import Linear4bit
from hf_qlora.layers.loftq import loftq_factors
from hf_qlora.quant.base import is_quantized, quantize_model, take_over
from hf_qlora.quant.checks import BaseModelError
from hf_qlora.quant.footprint import footprint
from hf_qlora.quant.selection import is_named, warn_of_other_layers
from hf_qlora.validation import ConfigError


logger = logging.getLogger(__name__)

Factors = dict[str, tuple[Tensor, Tensor]]  # lora_A and lora_B to start from, by the layer's name


def prepare_base(config: QLoRAConfig, model: nn.Module, shadow: nn.Module | None) -> Factors:
    """Quantize the base, or check one that is 4-bit; the LoftQ factors of the layers to adapt.

    Args:
        shadow: the copy on which adding the adapter was tried.

    Raises:
        BaseModelError, ConfigError: the base is not what the config asks for, and cannot become it.
    """
    merged = {module for module in model.modules() if getattr(module, "merged", False) is True}
    ours = {module for module in merged if isinstance(module, Linear4bit)}  # whose packed base is intact
    if config.quantization is not None and merged - ours:
        raise BaseModelError("Adapters are merged into the base; call unmerge_adapter() before adding another.")
    if ours:
        return {}
    if config.quantization is None:
        if is_quantized(model):
            take_over(model, None)
        return {}
    assert isinstance(config.quantization, NF4Config)
    wants_loftq = config.init_lora_weights == "loftq"
    if wants_loftq and config.layer_replication:
        raise ConfigError("init_lora_weights='loftq' is not supported with layer_replication; use True.")
    names = [name for name, _ in model.named_modules()]
    skip = [part for part in config.modules_to_save or () if any(is_named(name, [part]) for name in names)]
    if is_quantized(model):
        if wants_loftq:
            raise ConfigError(
                "init_lora_weights='loftq' needs the dense weights, but the base is already quantized. Load the base "
                "dense and let get_peft_model quantize it, or use init_lora_weights=True."
            )
        take_over(model, config.quantization, skip=skip)
        if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            warn_of_other_layers(model, config.quantization, skip)
        return {}
    return _quantize(config, config.quantization, model, skip, shadow)


def _quantize(
    config: QLoRAConfig, quantization: NF4Config, model: nn.Module, skip: list[str], shadow: nn.Module | None
) -> Factors:
    factors: Factors = {}
    targets = None
    if shadow is not None:
        targets = {name for name, module in shadow.named_modules() if isinstance(module, LoraLayer)}

    def keep_factors(name: str, weight: Tensor, layer: Any) -> None:
        if targets is None or name in targets:
            factors[name] = loftq_factors(weight, layer.wide_weight(), config, name)

    before = footprint(model)
    on_layer = keep_factors if config.init_lora_weights == "loftq" else None
    quantize_model(model, quantization, skip=skip, on_layer=on_layer)
    if config.from_file:
        logger.warning(
            "The adapter was trained on an NF4 base: quantized the dense base in place, %s, was %s. For the dense "
            "base, pass config=QLoRAConfig.from_pretrained(..., quantization=None).",
            footprint(model),
            before,
        )
    return factors

"""The quantizer that transformers finds on an NF4 base: how it is saved, and how it becomes dense again."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from functools import reduce
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.bitsandbytes import Bnb4bitDeserialize
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from hf_qlora.quant.checks import BaseModelError
from hf_qlora.quant.linear4bit import Linear4bit


logger = logging.getLogger(__name__)


class NF4Quantizer(Bnb4BitHfQuantizer):
    """transformers' quantizer, which also gives `Conv1D` back on dequantizing and does not save a merged base."""

    quantization_config: Any

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """Called by transformers when the base is saved."""
        if not getattr(model, "_hf_peft_config_loaded", False):
            merged = _merged_layers(model)
            if merged:
                raise BaseModelError(
                    f"The base has adapters merged into {len(merged)} layers ({merged[0]}, …), which then hold dense "
                    "weights; saving it would write neither the base nor a loadable model. Call unmerge_adapter() "
                    "first, or save the result of merge_and_unload()."
                )
            self._name_compute_dtype(model)
        return None, {}

    def _name_compute_dtype(self, model: PreTrainedModel) -> None:
        """That of the layers: the config was made before the model was cast, and says float32 where none chose."""
        found = compute_dtype_of(module for module in model.modules() if isinstance(module, Linear4bit))
        if found is not None:
            config = copy.copy(self.quantization_config)  # the user's, who may load another model by it
            config.bnb_4bit_compute_dtype = found
            self.quantization_config = model.config.quantization_config = config

    def remove_quantization_config(self, model: PreTrainedModel) -> None:
        """Called by transformers when the base has become dense."""
        super().remove_quantization_config(model)
        model.is_loaded_in_4bit = False
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config.__dict__.pop("_is_quantized", None)
        # A model read from a 4-bit checkpoint remembers how to read 4-bit weights, which saving would try to undo.
        conversions = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [c for c in conversions if not _reads_4bit(c)] or None

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> nn.Module:
        merged = _merged_layers(model)
        if merged:
            raise BaseModelError(
                f"{len(merged)} layers have adapters merged into them ({merged[0]}, …), and their packed weights wait "
                "for unmerge_adapter(); call that before dequantize(), or merge_and_unload() instead of it."
            )
        # transformers passes model.config.dtype, a string after a config was read from a file
        dense = dequantize_layers(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        for module in model.modules():
            if isinstance(module, BaseTunerLayer) and hasattr(module, "follow_base"):  # ours (layers/linear.py)
                module.follow_base()
        return dense


def compute_dtype_of(layers: Iterable[Linear4bit]) -> torch.dtype | None:
    """What all of them can compute in without loss, as a checkpoint names one; None where there are none."""
    found = {layer.compute_dtype for layer in layers}
    widest = reduce(torch.promote_types, found) if found else None
    if len(found) > 1:
        logger.warning(
            "The layers compute in %s; a checkpoint names one dtype for all: %s.", sorted(map(str, found)), widest
        )
    return widest


def _merged_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if getattr(module, "merged", False) is True]


def _reads_4bit(conversion: Any) -> bool:
    return any(isinstance(operation, Bnb4bitDeserialize) for operation in getattr(conversion, "operations", ()))


def dequantize_layers(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Turn every NF4 layer into a dense one of the class it was made from, in place."""
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.become_dense(module.dequantize(dtype))
    return model

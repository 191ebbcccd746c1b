"""The quantized base: a loaded model converted in place, a 4-bit one checked and taken over, and the way back.

Heads, embeddings, tied weights, routers, `modules_to_save` and `skip_modules` stay dense. Everything that could fail
is checked before the first weight is touched. Layers are converted one at a time and each dense weight is freed before
the next, so that the peak is the dense model and one layer.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from hf_qlora.config import NF4Config
from hf_qlora.config.nf4 import bitsandbytes_config
from hf_qlora.quant.calibrate.group import Packed
from hf_qlora.quant.calibrate.run import calibrate, checked_calibration, forget_calibration
from hf_qlora.quant.checks import BaseModelError, check_compute_dtype, check_layers, check_settings
from hf_qlora.quant.footprint import footprint
from hf_qlora.quant.linear4bit import Linear4bit, adopt_linear, become_linear4bit, dense_weight
from hf_qlora.quant.packing import quantize_weight
from hf_qlora.quant.quantizer import NF4Quantizer
from hf_qlora.quant.selection import (
    is_named,
    name_dense_experts,
    pretrained_parts,
    quantizable_layers,
    warn_of_unknown_names,
)
from hf_qlora.validation import ConfigError, check_model


logger = logging.getLogger(__name__)

PROGRESS_DELAY_S = 3.0

_INTERRUPTED = "_hf_qlora_interrupted"  # on a model while its layers are being converted, and after a failure there

OnLayer = Callable[[str, Tensor, Linear4bit], None]


def quantize_model(
    model: nn.Module,
    config: NF4Config | None = None,
    *,
    skip: Collection[str] = (),
    on_layer: OnLayer | None = None,
    calibration: Any = None,
    base: Mapping[str, Packed] | None = None,
) -> nn.Module:
    """Quantize the linear layers of a loaded model to NF4, in place.

    `get_peft_model(model, QLoRAConfig(...))` does this by itself; call it alone to have just the quantized base. A
    model that is 4-bit already is checked against `config` and kept.

    Args:
        model: a model with its weights loaded, on any device that bitsandbytes serves.
        config: how; `NF4Config()` by default.
        skip: names of further modules to leave dense, matched like `modules_to_save`.
        on_layer: called with (name, dense weight (out_features, in_features), quantized layer) after each layer, while
            the dense weight still exists.
        calibration: rows to calibrate on, so that the model loses less than by rounding each weight to its nearest
            level: whatever `calibration_rows` takes, or a `Calibration`. `calibration_report(model)` then says what
            was gained. Takes minutes.
        base: for merges, the packed weights that the model's dense ones came from, by name; used in calibration alone.

    Returns:
        the same model.

    Raises:
        BaseModelError: weights on the meta device, not finite, or of another dtype; no linear layer to quantize; a
            base that has adapters, or is quantized by another method or with other settings; a compute dtype that the
            device cannot do.
        CalibrationError: rows that cannot be used, of which nothing has been changed; or inputs that turn NaN on the
            way, after which the model is to be loaded anew.
        ConfigError: arguments of another type.
    """
    check_model(model)
    config = checked_config(config)
    if isinstance(skip, str):
        raise ConfigError(f"skip={skip!r} must be a list of names, as [{skip!r}].")
    refuse_interrupted(model)
    if is_quantized(model):
        if calibration is not None:
            raise BaseModelError(
                "The model is 4-bit already, and its dense weights, which calibration needs, are gone. Load it dense."
            )
        take_over(model, config, skip=skip)
        return model
    adapted = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if adapted:
        raise BaseModelError(
            f"The base is dense and {len(adapted)} of its layers have adapters already ({adapted[0]}, …); quantizing "
            "it would change what they compute. Add adapters with quantization=None, or load the base anew and "
            "quantize it first."
        )
    layers, dense = quantizable_layers(model, config, skip)
    check_layers(model, layers, config)
    warn_of_unknown_names(model, config, skip)
    before = footprint(model)
    asked = None if calibration is None else checked_calibration(calibration, model, config)
    setattr(model, _INTERRUPTED, True)
    try:
        if asked is None:
            _convert(layers, config, on_layer)
        else:
            calibrate(model, layers, config, asked, base=base, on_layer=on_layer, delay=PROGRESS_DELAY_S)
    except BaseException:
        if not any(isinstance(layer, Linear4bit) for layer in layers.values()):
            delattr(model, _INTERRUPTED)  # before it began
        raise
    _mark(model, config, dense)
    delattr(model, _INTERRUPTED)
    logger.info("Quantized %d linear layers to NF4 in place: %s, was %s.", len(layers), footprint(model), before)
    if torch.cuda.is_available() and next(iter(layers.values())).weight.device.type == "cpu":
        logger.warning(
            "The model was quantized on the CPU although CUDA is available. Trainer leaves 4-bit models where they "
            "are: call model.to('cuda') before training, or before quantizing."
        )
    name_dense_experts(model)
    return model


def checked_config(config: Any) -> NF4Config:
    """An NF4Config, of what may be one, its dict, or None for the default; else ConfigError."""
    found = NF4Config() if config is None else NF4Config.from_dict(config) if isinstance(config, Mapping) else config
    if not isinstance(found, NF4Config):
        raise ConfigError(f"config={config!r} must be an NF4Config, its dict, or None.")
    return found


def is_quantized(model: nn.Module) -> bool:
    """Whether the model holds weights of any quantization method."""
    if getattr(model, "quantization_method", None) is not None or getattr(model, "is_loaded_in_4bit", False):
        return True  # also while adapters are merged into all of its layers, which are dense then
    return any(isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt) for module in model.modules())


def is_interrupted(model: nn.Module) -> bool:
    """Whether converting the model began and did not end."""
    return bool(getattr(model, _INTERRUPTED, False))


def refuse_interrupted(model: nn.Module) -> None:
    """Raise BaseModelError where `is_interrupted`."""
    if is_interrupted(model):
        raise BaseModelError("Quantizing this model was interrupted, and it is neither dense nor NF4. Load it anew.")


def take_over(model: nn.Module, config: NF4Config | None, *, skip: Collection[str] = ()) -> None:
    """Make a base that is 4-bit already safe to train on, after checking it against `config` (None: no check).

    Args:
        skip: names of modules that are to be trained, as `modules_to_save`; they must be dense.

    Raises:
        BaseModelError: another method, quantization type, nesting or block size; both sides are named.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)]
    if config is not None:
        check_settings(model, config)
        check_compute_dtype(config, layers[0][1].weight.device)
    packed = [name for name, _ in layers if is_named(name, skip)]
    if packed:
        raise BaseModelError(
            f"modules_to_save={sorted(skip)} asks to train {packed[0]}, which is 4-bit in this base and cannot be "
            f"trained. Load the base with llm_int8_skip_modules={packed}, or dense."
        )
    for name, module in layers:
        if type(module) is bnb.nn.Linear4bit:
            adopt_linear(module, name, config.compute_dtype if config else None)
    if layers:
        _mark_4bit(model, True)
    for part in pretrained_parts(model).values():
        quantizer = getattr(part, "hf_quantizer", None)
        if type(quantizer) is Bnb4BitHfQuantizer:
            quantizer.__class__ = NF4Quantizer


def forget_quantization(model: nn.Module) -> None:
    """Remove the marks of a quantized base from a model that has become dense."""
    forget_calibration(model)
    for part in pretrained_parts(model).values():
        if isinstance(quantizer := getattr(part, "hf_quantizer", None), NF4Quantizer):
            quantizer.remove_quantization_config(part)
    if getattr(model, "is_loaded_in_4bit", False):
        _mark_4bit(model, False)


def _convert(layers: dict[str, nn.Linear | Conv1D], config: NF4Config, on_layer: OnLayer | None) -> None:
    counts = Counter(id(layer.weight) for layer in layers.values())
    # Modules that share one parameter (layer replication) share its packed weight; the parameter is kept for its id.
    done: dict[int, tuple[Tensor, tuple[Tensor, QuantState]]] = {}
    for name, layer in tqdm(
        layers.items(), desc="Quantizing to NF4", unit="layer", delay=PROGRESS_DELAY_S, leave=False
    ):
        parameter, weight = layer.weight, dense_weight(layer)
        _, data = done.get(id(parameter)) or (None, quantize_weight(weight, config))
        if counts[id(parameter)] > 1:
            done[id(parameter)] = (parameter, data)
        quantized = become_linear4bit(layer, *data, config.compute_dtype)
        if on_layer is not None:
            on_layer(name, weight, quantized)


def _mark_4bit(model: Any, is_4bit: bool) -> None:
    """What PEFT and Trainer ask; plain modules have no such attribute of their own."""
    model.is_loaded_in_4bit = is_4bit


def _mark(model: nn.Module, config: NF4Config, dense: list[str]) -> None:
    """Set what transformers, Trainer and PEFT look for on a model that from_pretrained has quantized."""
    _mark_4bit(model, True)
    for prefix, part in pretrained_parts(model).items():
        names = [name.removeprefix(prefix) for name in dense if name.startswith(prefix)]
        quantizer = AutoHfQuantizer.from_config(bitsandbytes_config(config, names), pre_quantized=True)
        quantizer.__class__ = NF4Quantizer
        quantizer.modules_to_not_convert = names
        part.hf_quantizer = quantizer
        part.is_loaded_in_4bit = part.is_quantized = True
        part.quantization_method = quantizer.quantization_config.quant_method
        quantizer.postprocess_model(part)

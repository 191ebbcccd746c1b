"""The dense model that a base was made of: loaded, checked, and its weights taken.

What is dense in both is the same, and what is packed in the base is what the model's layer becomes when it is
quantized so. Layers are compared one by one, and loosely: the model may be in another dtype than was quantized.
"""

from __future__ import annotations

import os
from dataclasses import replace

from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_qlora.config import NF4Config
from hf_qlora.layers.errors import MergeError
from hf_qlora.merge.names import first_sentence, is_of_adapter, wrapped_name
from hf_qlora.quant.base import is_quantized
from hf_qlora.quant.comparison import compare
from hf_qlora.quant.fingerprint import take_fingerprint
from hf_qlora.quant.linear4bit import Linear4bit, become_linear4bit, dense_weight
from hf_qlora.quant.packing import quantize_weight


def load_original(original: str | os.PathLike[str] | nn.Module, base: nn.Module) -> nn.Module:
    """The dense model to merge onto, checked against the base."""
    dense = original
    if not isinstance(dense, nn.Module):
        if not isinstance(base, PreTrainedModel):
            raise MergeError(f"original={original!r}: the base is no model of transformers; pass the model itself.")
        try:
            dense = type(base).from_pretrained(str(original), dtype=base.dtype)
        except (OSError, ValueError, RuntimeError) as error:
            raise MergeError(f"The original {original!r} cannot be loaded: {first_sentence(error)}") from error
    if is_quantized(dense):
        raise MergeError(f"original {name_of(original)} is quantized; name the dense model that the base was made of.")
    misfit = _misfit(dense, base)
    if misfit:
        raise MergeError(f"original {name_of(original)} is not what the base was made of: {misfit}.")
    return dense


def name_of(original: str | os.PathLike[str] | nn.Module | None) -> str:
    if isinstance(original, nn.Module):
        return str(getattr(original, "name_or_path", "") or type(original).__name__)
    return str(original)


def other_weights(dense: nn.Module, base: nn.Module) -> str:
    """What tells the original from the base that an adapter was put on, which has its architecture; "" if nothing."""
    expected, found = take_fingerprint(base, hashed=False), take_fingerprint(dense, hashed=False)
    if expected is None or found is None:  # not all there
        return ""
    saved = tuple(  # with the adapter, which replaces the original's; a classifier's head is new at every load
        f"{wrapped_name(name)}." for name, module in base.named_modules() if isinstance(module, ModulesToSaveWrapper)
    )
    dense_prints = {name: tensor for name, tensor in expected.dense.items() if not name.startswith(saved)}
    result = compare(replace(expected, dense=dense_prints), found, only_dense=True)
    if result.verdict == "differs":
        return result.found
    packed = {
        wrapped_name(name): module
        for name, module in base.named_modules()
        if isinstance(module, Linear4bit) and not is_of_adapter(name) and module.state.quant_type == "nf4"
    }
    for name, layer in packed.items():
        trained = take_fingerprint(layer, hashed=False)
        made = take_fingerprint(_quantized(dense.get_submodule(name), layer), hashed=False)
        if trained is None or made is None:
            continue
        result = compare(trained, made)
        if result.verdict == "differs":
            return f"{name}, quantized as the base is, has other codes: {result.found}"
    return ""


def take_weights(base: nn.Module, dense: nn.Module, biases: set[str]) -> None:
    """Give a wrapped base the weights of another model, but for biases that were trained.

    What is packed and adapted keeps its packed weight: merging takes the other one.
    """
    for name, module in list(base.named_modules()):
        adapted = name.endswith(".base_layer")
        trained = "all" in biases or ("lora_only" in biases and adapted)
        source = _source(dense, name)
        if source is None:
            continue
        if isinstance(module, Linear4bit) and not adapted:
            module.become_dense(dense_weight(source).clone())
        for key, parameter in module.named_parameters(recurse=False):
            kept = trained if key == "bias" else isinstance(module, Linear4bit)
            if not kept:
                parameter.data = getattr(source, key).detach().to(parameter.device, copy=True)


def _misfit(dense: nn.Module, base: nn.Module) -> str:
    """The first difference between a dense model and a wrapped base, or ""."""
    own = {name: tuple(parameter.shape) for name, parameter in dense.named_parameters(remove_duplicate=False)}
    for name, module in base.named_modules(remove_duplicate=False):
        for key, parameter in module.named_parameters(recurse=False):
            plain = wrapped_name(f"{name}.{key}")
            if is_of_adapter(f"{name}.{key}"):
                continue
            shape = tuple(parameter.shape)
            if isinstance(module, Linear4bit) and key == "weight":
                shape = tuple(module.state.shape)
                shape = shape[::-1] if issubclass(module.source_cls, Conv1D) else shape
            if plain not in own:
                return f"it has no {plain}"
            if own[plain] != shape:
                return f"{plain} is {own[plain]}, not {shape}"
    return ""


def _quantized(layer: nn.Module, like: Linear4bit) -> nn.Module:
    """The layer's weight in a layer of its own, quantized as another is."""
    state = like.state
    config = NF4Config(double_quant=state.nested, block_size=state.blocksize)
    weight = dense_weight(layer).to(like.weight.device, state.dtype)
    alone = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    become_linear4bit(alone, *quantize_weight(weight, config), config.compute_dtype)
    return alone


def _source(dense: nn.Module, name: str) -> nn.Module | None:
    """The module that a module of a wrapped base stands for."""
    try:
        return dense.get_submodule(wrapped_name(name))
    except AttributeError:  # an adapter's own
        return None

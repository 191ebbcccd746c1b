"""A model out of a folder or a Hub id, of the class that its config names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedModel

from hf_qlora.merge.names import first_sentence
from hf_qlora.merge.skeleton import class_named
from hf_qlora.merge.sources import base_source
from hf_qlora.validation import ConfigError


class LoadError(ValueError):
    """A model that cannot be loaded; the message says why."""


def load_model(model: str, dtype: str | None) -> PreTrainedModel:
    """A model at a local path or Hub id, with all of its weights.

    Args:
        dtype: to load the weights in; by default what the model's config says.

    Raises:
        LoadError, MergeError: no such model, or not to be loaded.
    """
    folder = base_source(model, None)
    try:
        cls, _ = _class_and_config(model, folder)
        loaded, found = cls.from_pretrained(
            folder, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True
        )
    except (ImportError, OSError, RuntimeError, KeyError, SafetensorError) as error:
        raise LoadError(f"{model} cannot be loaded: {first_sentence(error)}") from error
    lacking = sorted(found["missing_keys"])
    if lacking:
        raise LoadError(f"{model} lacks {len(lacking)} of its weights: {lacking[0]}, …")
    result: PreTrainedModel = loaded.eval()
    return result


def without_weights(model: str) -> PreTrainedModel:
    """A dense model on the meta device, in a moment.

    Raises:
        LoadError, MergeError: no such model, not to be made, or a quantized one.
    """
    folder = base_source(model, None)
    try:
        cls, config = _class_and_config(model, folder)
        if getattr(config, "quantization_config", None) is not None:
            raise LoadError(f"{model} is quantized already; name the dense model that it was made from.")
        with torch.device("meta"):
            made: PreTrainedModel = cls._from_config(config)
    except (ImportError, OSError, RuntimeError, KeyError) as error:
        raise LoadError(f"{model} cannot be made into a model: {first_sentence(error)}") from error
    made.name_or_path = str(folder)
    return made.eval()


def _class_and_config(model: str, folder: Path) -> tuple[Any, Any]:
    config = AutoConfig.from_pretrained(folder)
    cls = class_named(config.architectures or ())
    if cls is None:
        raise LoadError(f"The config of {model} names no class of transformers in 'architectures'.")
    return cls, config


def checked_device(device: str | None) -> torch.device:
    """The device of a name; without one, CUDA where there is some.

    Raises:
        ConfigError: no device, or one that is not there.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device={device!r} is not known; choose cpu, cuda, or cuda:0 and so on.") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={device!r} is asked for, and there is no CUDA; choose cpu.")
    return found

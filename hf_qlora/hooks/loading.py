"""Reading an adapter from its files, into a model that is made for it or one that is there."""

from __future__ import annotations

import copy
import inspect
import json
import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, PeftType
from torch import Tensor, nn

from hf_qlora import files, identity
from hf_qlora.config import AdaptiveDepthLoRAConfig, NF4Config, QLoRAConfig
from hf_qlora.config.record import RECORD_KEY
from hf_qlora.layers import attention, depth, fold
from hf_qlora.quant.checks import check_settings
from hf_qlora.rehearsal import after, is_real_step, rehearse
from hf_qlora.tuner import AdapterError, undone_on_error
from hf_qlora.validation import ConfigError


logger = logging.getLogger(__name__)


def from_json_file(original: Callable[..., Any], cls: type, path_json_file: str, **kwargs: Any) -> Any:
    if Path(path_json_file).is_file():
        files.check_size(Path(path_json_file))
    try:
        values = original(cls, path_json_file, **kwargs)
    except json.JSONDecodeError as error:
        raise json.JSONDecodeError(f"{path_json_file} is not JSON: {error.msg}", error.doc, error.pos) from error
    except (ValueError, RecursionError) as error:  # not text, or past the parser's limits
        raise ConfigError(f"{path_json_file} is not JSON that can be read: {error}.") from error
    except TypeError as error:  # null or a number, which PEFT has looked into
        raise ConfigError(f"{path_json_file} is not an adapter config: it holds a value, not an object.") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path_json_file} is not an adapter config: it holds {type(values).__name__}, not an object."
        )
    if isinstance(values.get(RECORD_KEY), dict):  # what is ours is read from there alone
        values = {name: value for name, value in values.items() if name not in QLoRAConfig.own_fields()}
    if RECORD_KEY in values:
        if values.get("peft_type") != PeftType.LORA:
            raise ConfigError(f"{path_json_file}: peft_type={values.get('peft_type')!r} must be 'LORA'.")
        try:
            QLoRAConfig.from_portable_dict(values)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path_json_file}: {error}") from error
        files.check_beside(Path(path_json_file), values[RECORD_KEY])
    return values


def load_peft_weights(
    original: Callable[..., dict[str, Tensor]], model_id: str, device: str | None = None, *args: Any, **kwargs: Any
) -> dict[str, Tensor]:
    folder = files.adapter_folder(model_id, **kwargs)
    if folder is None:
        form: fold.Form = "stock" if files.has_config(model_id, **kwargs) else "portable"
        return files.AdapterTensors(original(model_id, device, *args, **kwargs), str(model_id), form)
    folder.check()
    return folder.tensors(lambda: original(model_id, device, *args, **kwargs), device)


def set_peft_model_state_dict(
    original: Callable[..., Any],
    model: Any,
    peft_model_state_dict: dict[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    **kwargs: Any,
) -> Any:
    config, tensors = model.peft_config[adapter_name], peft_model_state_dict
    if not isinstance(tensors, files.AdapterTensors) or not isinstance(config, QLoRAConfig):
        return original(model, tensors, adapter_name, ignore_mismatched_sizes, **kwargs)
    identity.check(model, config, adapter_name, tensors.record, tensors.source)
    _warn_of_other_scales(model, config, adapter_name, tensors)
    before = depth.learned(model, adapter_name)
    depth.restore(model, adapter_name, tensors.depth)
    attention.forget_step(model, adapter_name)
    given, form = tensors.for_model(fold.factors(model, config, adapter_name, from_file=True))
    with fold.exchange(form, tensors.source, ignore_mismatched_sizes):
        try:
            return original(model, given, adapter_name, ignore_mismatched_sizes, **kwargs)
        except Exception as error:  # whatever it is, it is raised again
            depth.restore(model, adapter_name, before)
            _explain(error, tensors.source)
            raise


def _warn_of_other_scales(
    model: nn.Module, config: QLoRAConfig, adapter_name: str, tensors: files.AdapterTensors
) -> None:
    """The function is the file's all the same: what a gain is not, `lora_B` is."""
    if not tensors.depth or not isinstance(config, AdaptiveDepthLoRAConfig):
        return
    here = dict(depth.scales(model, adapter_name)).keys()
    for names, what in (
        (tensors.depth.keys() - here, "for modules that are not adapted; they are ignored"),
        (here - tensors.depth.keys(), "for all but some adapted modules, which start from 1"),
    ):
        if names:
            logger.warning("%s has depth scales %s: %r.", tensors.source, what, sorted(names)[:3])


def _explain(error: Exception, source: str) -> None:
    """Raise an error of ours in the place of one of PEFT's or torch's that says less."""
    if isinstance(error, KeyError):
        raise AdapterError(f"{source} lacks {error}, which the config's modules_to_save asks for.") from error
    if isinstance(error, RuntimeError) and "size mismatch" in str(error):
        raise AdapterError(f"{source} does not fit the model: {error}") from error


def from_pretrained(
    original: Callable[..., PeftModel], cls: type[PeftModel], model: nn.Module, *args: Any, **kwargs: Any
) -> PeftModel:
    bound = inspect.signature(original).bind(cls, model, *args, **kwargs)
    bound.apply_defaults()
    given = {name: value for name, value in bound.arguments.items() if name not in ("cls", "model", "kwargs")}
    options = bound.arguments["kwargs"]
    folder = files.adapter_folder(given["model_id"], **options)
    if folder is None or not isinstance(model, nn.Module):
        return original(cls, model, *args, **kwargs)
    folder.check()
    name = given["adapter_name"]
    with_others = hasattr(model, "peft_config")
    given |= {"model_id": str(folder.weights.parent), "low_cpu_mem_usage": False}
    given["config"] = copy.deepcopy(given["config"])  # PEFT writes to it
    elsewhere = {name: value for name, value in options.items() if name not in files.HUB_OPTIONS}
    elsewhere["torch_device"] = "cpu"
    with after(None):
        shadow = rehearse(model, name, lambda copied: original(cls, copied, **given, **elsewhere))
    with nullcontext() if with_others else undone_on_error(model, name), after(shadow):
        return original(cls, model, *args, **kwargs)


def auto_from_pretrained(original: Callable[..., Any], cls: type, *args: Any, **kwargs: Any) -> Any:
    """A classifier's base is made with the adapter's classes: their number is that of the head in the file."""
    on_base_mismatch = kwargs.pop("on_base_mismatch", None)  # transformers' models would not take it
    given = inspect.signature(original).bind(cls, *args, **kwargs).arguments
    options = {**given.get("kwargs", {}), "revision": given.get("revision")}
    folder = files.adapter_folder(given["pretrained_model_name_or_path"], **options)
    if folder is not None and folder.record.get("labels") and not {"id2label", "num_labels"} & kwargs.keys():
        names = dict(enumerate(folder.record["labels"]))
        kwargs |= {"id2label": names, "label2id": {name: i for i, name in names.items()}}
    with identity.asking(on_base_mismatch):
        return original(cls, *args, **kwargs)


def load_adapter(
    original: Callable[..., Any], model: PeftModel, model_id: str, adapter_name: str, *args: Any, **kwargs: Any
) -> Any:
    config, on_base_mismatch = model.peft_config.get(adapter_name), kwargs.pop("on_base_mismatch", None)
    if isinstance(config, QLoRAConfig) and not is_real_step():
        folder = files.adapter_folder(model_id, **kwargs)
        if folder is not None:
            _check_trained_alike(config, folder)
    try:
        with identity.asking(on_base_mismatch):
            return original(model, model_id, adapter_name, *args, **kwargs)
    except Exception:  # whatever it is, it is raised again
        if config is None and isinstance(model.peft_config.get(adapter_name), QLoRAConfig):
            model.delete_adapter(adapter_name)
        raise


# Checked above, or without effect on what is learned.
_OF_NO_FILE = ("quantization", "portable", "chunked_loss", "on_base_mismatch")


def _check_trained_alike(config: QLoRAConfig, folder: files.AdapterFolder) -> None:
    """An adapter that is loaded under a name that exists, as Trainer does on resuming, brings no config."""
    trained, ours = folder.record["quantization"], config.to_dict()["quantization"]
    if trained != ours:
        raise ConfigError(
            f"{folder.source} was trained on a base with quantization {trained}, but this model's adapter is on one "
            f"with {ours}. Make the model with the same config, or load the adapter under another name."
        )
    now = config.to_dict()
    names = [name for name in config.own_fields() if name in folder.record and name not in _OF_NO_FILE]
    changed = [
        f"{name}={now[name]!r}, was {folder.record[name]!r}" for name in names if now[name] != folder.record[name]
    ]
    if changed:
        logger.warning(
            "%s goes on with other settings than it was trained with: %s.", folder.source, "; ".join(changed)
        )


def load_into_transformers(
    original: Callable[..., Any],
    model: Any,
    peft_model_id: str | None = None,
    adapter_name: str | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    options = kwargs.get("adapter_kwargs") or {}
    folder = None if peft_model_id is None else files.adapter_folder(peft_model_id, **options)
    labels = _classes(model, folder)
    name = adapter_name or "default"
    there = getattr(model, "peft_config", {}).get(name)  # to swap for; one that is added compares in the tuner
    if folder is not None and isinstance(there, QLoRAConfig):
        folder.check()
        files.check_tensors(files.read_tensors(folder.weights), str(folder.weights))
        identity.check(model, there, name, folder.record, folder.source)
    elif folder is not None and kwargs.get("hotswap") is not True:
        folder.check()
        files.check_tensors(files.read_tensors(folder.weights), str(folder.weights))
        place = str(folder.weights.parent)
        rehearse(model, name, lambda copied: PeftModel.from_pretrained(copied, place, name, torch_device="cpu"))
    with fold.exchange("portable", past_peft=True):
        result = original(model, peft_model_id, adapter_name, *args, **kwargs)
    if labels:
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {name: i for i, name in enumerate(labels)}
    return result


def _classes(model: Any, folder: files.AdapterFolder | None) -> list[str]:
    """The adapter's classes, for a classifier that transformers has made from the base's config alone.

    Raises:
        ConfigError: the adapter's head has another number of classes.
    """
    labels: list[str] = folder.record.get("labels", []) if folder is not None else []
    if folder is None or not labels or not type(model).__name__.endswith("Classification"):
        return []
    if len(labels) != model.config.num_labels:
        raise ConfigError(
            f"{folder.source} has {len(labels)} classes and the base {model.config.num_labels}. Load it with "
            f"num_labels={len(labels)}, or by PEFT's AutoPeftModelForSequenceClassification or the like."
        )
    return labels


def _portable(config: Any) -> Any:
    return config.portable_form() if isinstance(config, QLoRAConfig) else config


def check_hotswap_configs_compatible(original: Callable[..., None], config0: Any, config1: Any) -> None:
    original(_portable(config0), _portable(config1))


def hotswap_adapter_from_state_dict(
    original: Callable[..., None],
    model: Any,
    state_dict: dict[str, Tensor],
    adapter_name: str,
    config: LoraConfig,
    *args: Any,
    **kwargs: Any,
) -> None:
    portable = _portable(config)
    if isinstance(config, QLoRAConfig) and isinstance(config.quantization, NF4Config):
        check_settings(model, config.quantization)
    if isinstance(config, QLoRAConfig):
        identity.check(model, config, adapter_name, config.record, "The adapter to swap in")
    original(model, state_dict, adapter_name, portable, *args, **kwargs)
    ours = model.peft_config.get(adapter_name)
    if isinstance(ours, QLoRAConfig):
        fold.after_hot_swap(model, adapter_name, ours, portable)

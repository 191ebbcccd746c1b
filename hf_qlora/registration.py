"""The only writer to PEFT: how its public functions come to know our configs.

`peft_type` stays `LORA`, in memory and on disk, because PEFT, transformers, TRL, vLLM and llama.cpp all know that type
and refuse others. So two registry entries are replaced by supersets, and ten functions for which PEFT has no seam
are wrapped. For a stock `LoraConfig` each of them does what PEFT did.

| hook | why there is no other way |
| --- | --- |
| `PEFT_TYPE_TO_TUNER_MAPPING[LORA]` | the tuner quantizes and folds; `register_peft_method` refuses a taken name |
| `PEFT_TYPE_TO_CONFIG_MAPPING[LORA]` | a JSON with the `hf_qlora` key is a `QLoRAConfig` |
| `BaseTuner.inject_adapter` | a tuner of another class (`PeftMixedModel`, a bare `LoraModel`) must refuse our config |
| `PeftConfigMixin.from_json_file` | a broken JSON is named before PEFT stumbles over it |
| `load_peft_weights` in `peft_model`, `hotswap` | the file is checked; a checkpoint has exact tensors beside |
| `peft_model.set_peft_model_state_dict` | says in which form the tensors are; misfits are errors, not warnings |
| `PeftModel.from_pretrained` | files that do not fit are refused before the base is quantized |
| `PeftModel.load_adapter` | an adapter whose file is refused does not stay, without its weights |
| `PeftModel.save_pretrained` | whole or not at all; hash and fold factors are written |
| `hotswap.check_hotswap_configs_compatible`, `hotswap_adapter_from_state_dict` | both sides in portable form |

Everything private of PEFT, transformers and bitsandbytes that the package leans on is in `PRIVATE`, each with a
contract test.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import peft.config
import peft.peft_model
import peft.utils.hotswap
from packaging.version import Version
from peft import LoraConfig, PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from hf_qlora import files
from hf_qlora.config import QLoRAConfig
from hf_qlora.config.record import RECORD_KEY
from hf_qlora.layers import depth, fold
from hf_qlora.quant.base import is_quantized
from hf_qlora.rehearsal import rehearse
from hf_qlora.tuner import AdapterError, QLoRAModel
from hf_qlora.validation import ConfigError


PEFT_RANGE = ("0.21.0", "0.22")

# (module, attribute path): what is private, or public but replaced or subclassed here, and where it is used.
PRIVATE = {
    "peft.mapping:PEFT_TYPE_TO_TUNER_MAPPING": "registration",
    "peft.mapping:PEFT_TYPE_TO_CONFIG_MAPPING": "registration",
    "peft.tuners.tuners_utils:BaseTuner.inject_adapter": "registration, tuner",
    "peft.config:PeftConfigMixin.from_json_file": "registration",
    "peft.peft_model:load_peft_weights": "registration",
    "peft.peft_model:set_peft_model_state_dict": "registration",
    "peft.peft_model:PeftModel.from_pretrained": "registration",
    "peft.peft_model:PeftModel.load_adapter": "registration",
    "peft.peft_model:PeftModel.save_pretrained": "registration",
    "peft.utils.hotswap:load_peft_weights": "registration",
    "peft.utils.hotswap:check_hotswap_configs_compatible": "registration",
    "peft.utils.hotswap:hotswap_adapter_from_state_dict": "registration",
    "peft.tuners.tuners_utils:BaseTuner._unload_and_optionally_merge": "tuner",
    "peft.tuners.tuners_utils:BaseTuner._remap_adapter_state_dict_for_load": "tuner",
    "peft.tuners.tuners_utils:BaseTuner._get_adapter_state_dict": "tuner",
    "peft.tuners.trainable_tokens.layer:TrainableTokensLayer": "rehearsal",
    "peft.tuners.lora.bnb:Linear4bit": "layers.linear",
    "peft.tuners.tuners_utils:check_adapters_to_merge": "layers.linear",
    "peft.tuners.lora.layer:LoraVariant": "layers.depth",
    "peft.tuners.lora.layer:LoraVariant.merge_safe": "layers.linear, layers.depth",
    "peft.utils.other:get_pattern_key": "layers.fold",
    "peft.utils.hotswap:_update_scaling": "layers.fold",
    "bitsandbytes.functional:_convert_weight_packed_for_cpu_inverse": "quant.linear4bit",
    "transformers.quantizers.base:get_keys_to_not_convert": "quant.selection",
    "transformers.modeling_utils:PreTrainedModel._keep_in_fp32_modules": "quant.selection",
    "transformers.integrations.peft:PeftAdapterMixin._hf_peft_config_loaded": "quant.base",
    "transformers.quantizers.quantizer_bnb_4bit:Bnb4BitHfQuantizer.get_state_dict_and_metadata": "quant.base",
    "transformers.quantizers.quantizer_bnb_4bit:Bnb4BitHfQuantizer._dequantize": "quant.base",
    "transformers.quantizers.quantizer_bnb_4bit:Bnb4BitHfQuantizer.remove_quantization_config": "quant.base",
    "transformers.integrations.bitsandbytes:Bnb4bitDeserialize": "quant.base",
}


def register() -> None:
    """Let PEFT know our configs. Importing `hf_qlora` calls this; calling it again does nothing.

    Raises:
        ImportError: a PEFT outside the range this version knows how to extend; the versions are named.
    """
    found = version("peft")
    release = Version(Version(found).base_version)  # a pre-release of the upper bound has what that will have
    if Version(found) < Version(PEFT_RANGE[0]) or release >= Version(PEFT_RANGE[1]):
        raise ImportError(
            f"hf-qlora extends peft >= {PEFT_RANGE[0]}, < {PEFT_RANGE[1]}, but peft {found} is installed: "
            f"pip install 'peft>={PEFT_RANGE[0]},<{PEFT_RANGE[1]}', or upgrade hf-qlora."
        )
    for name in PRIVATE:
        resolve(name)
    if PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] is QLoRAModel:
        return
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = QLoRAModel
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] = _LoraConfig
    _wrap(BaseTuner, "inject_adapter", _inject_adapter)
    _wrap(peft.config.PeftConfigMixin, "from_json_file", _from_json_file)
    _wrap(peft.peft_model, "load_peft_weights", _load_peft_weights)
    _wrap(peft.peft_model, "set_peft_model_state_dict", _set_peft_model_state_dict)
    _wrap(PeftModel, "from_pretrained", _from_pretrained)
    _wrap(PeftModel, "load_adapter", _load_adapter)
    _wrap(PeftModel, "save_pretrained", _save_pretrained)
    _wrap(peft.utils.hotswap, "load_peft_weights", _load_peft_weights)
    _wrap(peft.utils.hotswap, "check_hotswap_configs_compatible", _check_hotswap_configs_compatible)
    _wrap(peft.utils.hotswap, "hotswap_adapter_from_state_dict", _hotswap_adapter_from_state_dict)


def resolve(name: str) -> Any:
    """The object that a key of `PRIVATE` names.

    Raises:
        ImportError: it is gone; the installed version cannot be extended.
    """
    module, _, path = name.partition(":")
    try:
        return functools.reduce(getattr, path.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"hf-qlora needs {name}, which {package} {version(package)} does not have; install a version in "
            "hf-qlora's range."
        ) from error


class _Dispatch(type):
    """Calling the class that PEFT knows as LORA's config makes ours where the JSON has our key."""

    def __call__(cls, *args: Any, **kwargs: Any) -> LoraConfig:
        if kwargs.get(RECORD_KEY) is not None:
            return QLoRAConfig.from_portable_dict(kwargs)
        return LoraConfig(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, LoraConfig)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, LoraConfig)


class _LoraConfig(LoraConfig, metaclass=_Dispatch):
    """`LoraConfig` as the registry has it; its instances are plain `LoraConfig`s or ours."""


_LoraConfig.__name__ = _LoraConfig.__qualname__ = "LoraConfig"  # PEFT's warnings name the class
_LoraConfig.__annotations__ = LoraConfig.__annotations__  # PEFT looks keyword arguments up there


def _wrap(owner: Any, name: str, hook: Callable[..., Any]) -> None:
    original = owner.__dict__[name]
    function = original.__func__ if isinstance(original, classmethod) else original

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return hook(function, *args, **kwargs)

    setattr(owner, name, classmethod(wrapper) if isinstance(original, classmethod) else wrapper)


def _inject_adapter(
    original: Callable[..., None], tuner: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
) -> None:
    config = tuner.peft_config[adapter_name]
    if isinstance(config, QLoRAConfig) and not isinstance(tuner, QLoRAModel):
        raise ConfigError(
            f"{type(config).__name__} cannot be used with {type(tuner).__name__}, which would leave the base "
            "unquantized. Use get_peft_model(model, config) without mixed=True, after importing hf_qlora."
        )
    original(tuner, model, adapter_name, *args, **kwargs)


def _from_json_file(original: Callable[..., Any], cls: type, path_json_file: str, **kwargs: Any) -> Any:
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
    if RECORD_KEY in values:
        if values.get("peft_type") != PeftType.LORA:
            raise ConfigError(f"{path_json_file}: peft_type={values.get('peft_type')!r} must be 'LORA'.")
        try:
            QLoRAConfig.from_portable_dict(values)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path_json_file}: {error}") from error
        files.check_beside(Path(path_json_file), values[RECORD_KEY])
    return values


def _load_peft_weights(
    original: Callable[..., dict[str, Tensor]], model_id: str, device: str | None = None, *args: Any, **kwargs: Any
) -> dict[str, Tensor]:
    folder = files.adapter_folder(model_id, **kwargs)
    if folder is None:
        form: fold.Form = "native" if files.has_config(model_id, **kwargs) else "portable"
        return files.AdapterTensors(original(model_id, device, *args, **kwargs), str(model_id), form)
    folder.check()
    return folder.tensors(lambda: original(model_id, device, *args, **kwargs), device)


def _set_peft_model_state_dict(
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
    depth.restore(model, adapter_name, tensors.depth)
    given, form = tensors.for_model(fold.factors(model, config, adapter_name, from_file=True))
    with fold.exchange(form, tensors.source, ignore_mismatched_sizes):
        try:
            return original(model, given, adapter_name, ignore_mismatched_sizes, **kwargs)
        except KeyError as error:
            raise AdapterError(
                f"{tensors.source} lacks {error}, which the config's modules_to_save asks for."
            ) from error
        except RuntimeError as error:
            if "size mismatch" not in str(error):
                raise
            raise AdapterError(f"{tensors.source} does not fit the model: {error}") from error


def _from_pretrained(
    original: Callable[..., PeftModel], cls: type[PeftModel], model: nn.Module, *args: Any, **kwargs: Any
) -> PeftModel:
    bound = inspect.signature(original).bind(cls, model, *args, **kwargs)
    bound.apply_defaults()
    given = {name: value for name, value in bound.arguments.items() if name not in ("cls", "model", "kwargs")}
    options = bound.arguments["kwargs"]
    folder = files.adapter_folder(given["model_id"], **options)
    if folder is not None:
        folder.check()
        given |= {"model_id": str(folder.weights.parent), "low_cpu_mem_usage": True}
        given["config"] = copy.deepcopy(given["config"])  # PEFT writes to it
        elsewhere = {name: value for name, value in options.items() if name not in files.HUB_OPTIONS}
        if isinstance(model, nn.Module) and not is_quantized(model):
            rehearse(model, lambda copied: original(cls, copied, **given, **{**elsewhere, "torch_device": "cpu"}))
    return original(cls, model, *args, **kwargs)


def _load_adapter(
    original: Callable[..., Any], model: PeftModel, model_id: str, adapter_name: str, *args: Any, **kwargs: Any
) -> Any:
    is_new = adapter_name not in model.peft_config
    try:
        return original(model, model_id, adapter_name, *args, **kwargs)
    except Exception:
        if is_new and isinstance(model.peft_config.get(adapter_name), QLoRAConfig):
            model.delete_adapter(adapter_name)
        raise


def _save_pretrained(
    original: Callable[..., None], model: PeftModel, save_directory: str, *args: Any, **kwargs: Any
) -> None:
    write = original.__get__(model)
    if any(isinstance(config, QLoRAConfig) for config in model.peft_config.values()):
        files.save(write, save_directory, model, *args, **kwargs)
    else:
        write(save_directory, *args, **kwargs)


def _portable(config: Any) -> Any:
    return config.portable_form() if isinstance(config, QLoRAConfig) else config


def _check_hotswap_configs_compatible(original: Callable[..., None], config0: Any, config1: Any) -> None:
    original(_portable(config0), _portable(config1))


def _hotswap_adapter_from_state_dict(
    original: Callable[..., None],
    model: Any,
    state_dict: dict[str, Tensor],
    adapter_name: str,
    config: LoraConfig,
    *args: Any,
    **kwargs: Any,
) -> None:
    portable = _portable(config)
    original(model, state_dict, adapter_name, portable, *args, **kwargs)
    ours = model.peft_config.get(adapter_name)
    if isinstance(ours, QLoRAConfig):
        fold.after_hot_swap(model, adapter_name, ours, portable)

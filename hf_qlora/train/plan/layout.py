"""A model without its weights, quantized and adapted: what `plan_memory` runs a step of.

It is made as the real one is. The base comes from its config, or is a copy of one in memory with its tensors on the
meta device; the layers that the config quantizes are packed ones without bytes; PEFT attaches the adapter. Then each
tensor becomes a `FakeTensor`, which says that it is on the CPU and has no data: code that asks for a device, for
autocast's dtype there or for a kernel that serves it gets the answer it would get.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import warnings
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import AutoConfig
from transformers.utils import CONFIG_NAME

from hf_qlora.config import NF4Config, QLoRAConfig
from hf_qlora.config.nf4 import COMPUTE_DTYPES
from hf_qlora.merge.names import first_sentence
from hf_qlora.merge.skeleton import CLASSES, class_named, modules_to_save
from hf_qlora.quant.base import take_over
from hf_qlora.quant.linear4bit import Linear4bit
from hf_qlora.quant.scheme import Scheme
from hf_qlora.quant.selection import quantizable_layers
from hf_qlora.quant.without_bytes import WithoutBytes
from hf_qlora.rehearsal import make_dense, without_weights
from hf_qlora.validation import ConfigError


Base = Callable[[], nn.Module]  # makes the dense base on the meta device


def base_of(model: Any, config: LoraConfig | None, dtype: str | torch.dtype | None) -> tuple[Base, str]:
    """How to make the base without weights, as often as needed, and its name.

    Args:
        model: a folder, a Hub id, a config or a model of transformers, or a `PeftModel`.

    Raises:
        ConfigError: none of these, or not to be made into a model.
    """
    if config is not None and not isinstance(config, LoraConfig):
        raise ConfigError(f"config={config!r:.100} must be a QLoRAConfig, or a LoraConfig of PEFT.")
    if isinstance(model, nn.Module):
        if dtype is not None:
            raise ConfigError("dtype= is for a folder or a Hub id; the model that was given has one.")
        return lambda: _copied(model), type(model).__name__
    chosen = dtype_named(dtype, "dtype")
    base_config, name = _config_of(model)
    _check_dense(base_config, name)
    cls = _class_of(config, base_config)

    def make() -> nn.Module:
        factory = cls.from_config if cls.__name__.startswith("Auto") else cls._from_config
        try:
            with torch.device("meta"):
                made: nn.Module = factory(
                    copy.deepcopy(base_config), dtype=chosen or base_config.dtype or torch.float32
                )
        except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
            raise ConfigError(f"{name} cannot be made into a model: {first_sentence(error)}") from error
        return made

    return make, name


def _copied(model: nn.Module) -> nn.Module:
    """A model in memory without its weights; what was packed is packed again."""
    if any(getattr(module, "merged", False) is True for module in model.modules()):
        raise ConfigError("Adapters are merged into the model; call unmerge_adapter() before planning.")
    packed = {name: m for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    copied = without_weights(model)
    make_dense(copied)
    packers: dict[NF4Config, WithoutBytes] = {}
    for name, layer in packed.items():
        scheme, dtype = Scheme.of(layer.quant_state), layer.compute_dtype
        if scheme.quant_type != "nf4":
            raise ConfigError(f"{name} is in {scheme.quant_type}; memory is planned for nf4 and dense bases alone.")
        nf4 = NF4Config(block_size=scheme.block_size, double_quant=scheme.double_quant, compute_dtype=dtype)
        packers.setdefault(nf4, WithoutBytes(nf4)).pack(copied.get_submodule(name))
    if packed:
        take_over(copied.get_base_model() if isinstance(copied, PeftModel) else copied, None)
    return copied


def dtype_named(dtype: str | torch.dtype | None, setting: str) -> torch.dtype | None:
    """Raise ConfigError for one that nothing is computed in."""
    name = str(dtype).removeprefix("torch.")
    if dtype is not None and name not in COMPUTE_DTYPES:
        raise ConfigError(f"{setting}={dtype!r} is not known; choose one of {tuple(COMPUTE_DTYPES)}.")
    return None if dtype is None else COMPUTE_DTYPES[name]


def _config_of(model: Any) -> tuple[Any, str]:
    if isinstance(model, transformers.PreTrainedConfig):
        return copy.deepcopy(model), str(model.model_type)
    if not isinstance(model, str) and not hasattr(model, "__fspath__"):
        raise ConfigError(f"model={model!r:.100} must be a folder, a Hub id, a model or a config of transformers.")
    name = str(model)
    if (name.startswith(".") or os.path.isabs(name)) and not os.path.exists(name):
        raise ConfigError(f"The model {name} is not there.")
    if os.path.exists(name) and not os.path.isfile(os.path.join(name, CONFIG_NAME)):
        raise ConfigError(f"{name} is no model: it has no {CONFIG_NAME}.")
    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=False), name
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"The config of {name!r} cannot be read, from a folder or from the Hub: {first_sentence(error)}"
        ) from error


def _check_dense(base_config: Any, name: str) -> None:
    quantized = base_config.__dict__.get("quantization_config")
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized.quant_method
        raise ConfigError(
            f"{name} is stored quantized ({getattr(method, 'value', method)}); what is planned from a name is a dense "
            "model. Name the dense one that it was made from, or load an NF4 model and give it instead of its name."
        )


def _class_of(config: LoraConfig | None, base_config: Any) -> Any:
    task = getattr(config, "task_type", None)
    if task is not None:
        return getattr(transformers, CLASSES[str(getattr(task, "value", task))])
    found = class_named(base_config.architectures or ())
    if found is None:
        raise ConfigError(
            "Neither the config's task_type nor the model's config names a model class; give QLoRAConfig a task_type."
        )
    return found


def adapted(base: nn.Module, config: LoraConfig | None) -> PeftModel:
    """The base, made by `base_of` and packed if it is to be, with the adapter, on the meta device.

    Raises:
        ConfigError: no config for a model without adapters, or one beside adapters that are there.
    """
    if isinstance(base, PeftModel):
        if config is not None:
            raise ConfigError("The model has adapters already; pass config=None to plan with these.")
        return base
    if config is None:
        raise ConfigError("The model has no adapters; give a QLoRAConfig, or a LoraConfig of PEFT.")
    given = copy.deepcopy(config)
    if isinstance(given, QLoRAConfig):
        # An initialization changes no shape, and what it changes them by is not there; the plan checkpoints by itself.
        unset: dict[str, Any] = {"init_lora_weights": True, "loftq_config": {}, "record": None, "checkpointing": None}
        given = dataclasses.replace(given, **unset)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(base, given, low_cpu_mem_usage=True)


def pack(base: nn.Module, config: QLoRAConfig) -> tuple[dict[str, torch.Size], torch.dtype]:
    """Pack the layers that `config` quantizes, in place; the shapes of their weights by name, and their dtype."""
    assert isinstance(config.quantization, NF4Config)
    layers, _ = quantizable_layers(base, config.quantization, modules_to_save(base, config))
    if not layers:
        raise ConfigError(
            f"{type(base).__name__} has no linear layer to quantize; set quantization=None to plan plain LoRA."
        )
    shapes = {name: layer.weight.shape for name, layer in layers.items()}
    dtype = next(iter(layers.values())).weight.dtype
    maker = WithoutBytes(config.quantization)
    for layer in layers.values():
        maker.pack(layer)
    take_over(base, None)
    return shapes, dtype


def make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace each tensor of a model on the meta device by a fake one on the CPU; those that are one stay one."""
    made: dict[int, tuple[Tensor, Tensor]] = {}  # with the old one, so that no id is used twice

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            plain = tensor.detach().to("meta").as_subclass(Tensor)
            found: Tensor = FakeTensor(mode, plain, torch.device("cpu"))
            if isinstance(tensor, nn.Parameter):
                found = nn.Parameter(found, requires_grad=tensor.requires_grad)
            made[id(tensor)] = tensor, found
        return made[id(tensor)][1]

    for module in model.modules():
        if isinstance(module, Linear4bit):
            # The layer's own: a parameter that is fake has none.
            for state in filter(None, (module.quant_state, module.quant_state.state2)):
                state.absmax, state.code = fake(state.absmax), fake(state.code)
        held: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module.__dict__)
        for tensors in held:
            for name, tensor in list(tensors.items()):
                if isinstance(tensor, Tensor):
                    tensors[name] = fake(tensor)

"""Making a PEFT model of a model, and writing it down."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel, TaskType
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from hf_qlora import saving
from hf_qlora.config import QLoRAConfig
from hf_qlora.quant.linear4bit import Linear4bit
from hf_qlora.rehearsal import after, is_real_step, is_rehearsal, try_config
from hf_qlora.tuner import QLoRAModel
from hf_qlora.validation import ConfigError


def inject_adapter(
    original: Callable[..., None], tuner: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
) -> None:
    config = tuner.peft_config[adapter_name]
    if isinstance(config, QLoRAConfig) and not isinstance(tuner, QLoRAModel):
        if config.quantization is not None or not config.is_stock():
            wrong = "leave the base unquantized" if config.quantization else "not scale as the config says"
            raise ConfigError(
                f"{type(config).__name__} cannot be used with {type(tuner).__name__}, which would {wrong}. Use "
                "get_peft_model(model, config), without mixed=True or an XLoraConfig, after importing hf_qlora."
            )
        tuner.peft_config[adapter_name] = config.portable_form()
    original(tuner, model, adapter_name, *args, **kwargs)


def init(
    original: Callable[..., None],
    peft_model: PeftModel,
    model: nn.Module,
    peft_config: Any,
    adapter_name: str = "default",
    *args: Any,
    **kwargs: Any,
) -> None:
    if not isinstance(peft_config, QLoRAConfig):
        original(peft_model, model, peft_config, adapter_name, *args, **kwargs)
        return
    with _heads_spared(peft_config):
        if is_rehearsal(model) or is_real_step():
            original(peft_model, model, peft_config, adapter_name, *args, **kwargs)
            return
        with after(try_config(model, peft_config, adapter_name, type(peft_model))):
            original(peft_model, model, peft_config, adapter_name, *args, **kwargs)


# Of the tasks whose heads PEFT saves whole, but names only when it has put adapters on all linear layers.
_HEADS = {TaskType.TOKEN_CLS: ("classifier", "score"), TaskType.QUESTION_ANS: ("qa_outputs",)}


@contextmanager
def _heads_spared(config: QLoRAConfig) -> Iterator[None]:
    """Name the heads to PEFT before, so that "all-linear" leaves them out; else they cannot be saved whole."""
    every = str(config.target_modules).lower() == "all-linear"  # as PEFT reads it
    heads = _HEADS.get(config.task_type, ()) if every else ()
    added = [name for name in heads if name not in (config.modules_to_save or ())]
    if not added:
        yield
        return
    config.modules_to_save = [*(config.modules_to_save or ()), *added]
    try:
        yield
    finally:  # PEFT adds them next
        config.modules_to_save = [name for name in config.modules_to_save or () if name not in added] or None


def dequantize_module_weight(original: Callable[[nn.Module], Tensor], module: nn.Module) -> Tensor:
    return module.wide_weight() if isinstance(module, Linear4bit) else original(module)


def save_pretrained(
    original: Callable[..., None], model: PeftModel, save_directory: str, *args: Any, **kwargs: Any
) -> None:
    write = original.__get__(model)
    if any(isinstance(config, QLoRAConfig) for config in model.peft_config.values()):
        saving.save(write, save_directory, model, *args, **kwargs)
    else:
        write(save_directory, *args, **kwargs)

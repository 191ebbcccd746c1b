"""Optimizers that cannot step on this device, said before training; and LoRA-FA beside gains and biases.

bitsandbytes' optimizers have kernels for some devices and not for others, which differ by its version, and show in the
first step: a step of a parameter that is thrown away is tried first.

PEFT's LoRA-FA takes whatever has "lora" in its name for A and B in turn. A bias, a gain (`lora_magnitude_vector`) or a
magnitude makes the pairs slip: it would pair a gain with the next layer's A. Where the model has an adapter of ours,
these go into a group of their own, under names without "lora", where LoRA-FA is AdamW; without decay, as in
`create_optimizer`. The optimizer is not given the model, and `create_lorafa_optimizer`, which has it, may have been
imported before it could be replaced: so its frame is looked into.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from peft.optimizers.lorafa import LoraFAOptimizer, create_lorafa_optimizer
from torch import nn
from transformers import Trainer

from hf_qlora.config import QLoRAConfig
from hf_qlora.validation import ConfigError


logger = logging.getLogger(__name__)

_LARGE = 2**13  # parameters of fewer weights keep their state in float32
_LORAFA = inspect.unwrap(create_lorafa_optimizer).__code__
# What versions of bitsandbytes raise where a kernel, or a function of their library, is not there for the device.
_NO_KERNELS = (NotImplementedError, RuntimeError, ValueError, AttributeError, TypeError, NameError)
_PAIRED = (".lora_A.", ".lora_B.", ".lora_embedding_A", ".lora_embedding_B")


def check_optimizer(trainer: Trainer) -> None:
    """Refuse an optimizer of bitsandbytes that has no kernels for the device, or nothing to train.

    Raises:
        ConfigError: with what can be used instead.
    """
    name = getattr(trainer.args.optim, "value", str(trainer.args.optim))
    if trainer.optimizer is not None or not any(kind in name for kind in ("8bit", "bnb", "paged", "_32bit")):
        return
    cls, kwargs = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    if not cls.__module__.startswith("bitsandbytes."):
        return
    device = next((p.device for p in trainer.model.parameters() if p.requires_grad), None)
    if device is None:
        raise ConfigError(
            "Nothing in the model is trainable: its adapters are frozen. Load them with "
            "PeftModel.from_pretrained(..., is_trainable=True), or switch one on with model.set_adapter(name)."
        )
    trial = nn.Parameter(torch.zeros(_LARGE, device=device))
    trial.grad = torch.ones_like(trial)
    try:
        cls([trial], **kwargs).step()
    except torch.OutOfMemoryError:
        raise
    except _NO_KERNELS as error:
        raise ConfigError(
            f"optim={name!r} cannot step on {device}, says bitsandbytes ({type(error).__name__}: {error}). It is for "
            "NVIDIA GPUs in this version; use optim='adamw_torch_fused'."
        ) from error
    if "paged" in name and device.type == "cpu":
        logger.warning(
            "optim=%r pages only between a GPU and its host; on the CPU it is %r.", name, name.removeprefix("paged_")
        )


def init_lorafa(
    original: Callable[..., None], optimizer: LoraFAOptimizer, params: Any, *args: Any, **kwargs: Any
) -> None:
    groups = params
    if _is_grouped(params) and _has_ours(_model_of_caller()):
        groups = [split for group in params for split in _split(group)]
    original(optimizer, groups, *args, **kwargs)


def _model_of_caller() -> Any:
    """The model that `create_lorafa_optimizer` is making this optimizer for, if it is."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not _LORAFA:
        frame = frame.f_back
    return None if frame is None else frame.f_locals["model"]


def _has_ours(model: Any) -> bool:
    return any(isinstance(config, QLoRAConfig) for config in getattr(model, "peft_config", {}).values())


def _is_grouped(params: Any) -> bool:
    return isinstance(params, list) and all(isinstance(group, dict) and "names" in group for group in params)


def _split(group: dict[str, Any]) -> list[dict[str, Any]]:
    """A group without what is of LoRA and neither A nor B; and that by itself, where there is any."""
    alone = [_is_alone(name) for name in group["names"]]
    if not any(alone):
        return [group]
    parts: list[dict[str, Any]] = []
    for wanted in (False, True):
        part = dict(group)
        for key in {"params", "names", "scaling_factors"} & set(group):
            part[key] = [value for value, is_alone in zip(group[key], alone, strict=True) if is_alone is wanted]
        parts.append(part)
    parts[1]["names"] = [name.replace("lora", "l_o_r_a") for name in parts[1]["names"]]
    parts[1]["weight_decay"] = 0.0
    return parts


def _is_alone(name: str) -> bool:
    return "lora" in name and not (any(part in name for part in _PAIRED) and not name.endswith(".bias"))

"""Optimizers that cannot step on this device, said before training; and LoRA-FA beside gains and biases.

bitsandbytes' optimizers have kernels for some devices and not for others, which differ by its version, and show in the
first step: a step of a parameter that is thrown away is tried first.

PEFT's LoRA-FA takes whatever has "lora" in its name for A and B in turn. A bias, a gain (`lora_magnitude_vector`) or a
magnitude makes the pairs slip: it would pair a gain with the next layer's A. Here these go into a group of their own,
under names without "lora", where LoRA-FA is AdamW; without decay, as in `create_optimizer`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from peft.optimizers.lorafa import LoraFAOptimizer
from torch import nn
from transformers import Trainer

from hf_qlora.validation import ConfigError


logger = logging.getLogger(__name__)

_LARGE = 2**13  # parameters of fewer weights keep their state in float32
_PAIRED = (".lora_A.", ".lora_B.", ".lora_embedding_A", ".lora_embedding_B")


def check_optimizer(trainer: Trainer) -> None:
    """Refuse an optimizer of bitsandbytes that has no kernels for the device.

    Raises:
        ConfigError: with what can be used instead.
    """
    name = getattr(trainer.args.optim, "value", str(trainer.args.optim))
    if trainer.optimizer is not None or not any(kind in name for kind in ("8bit", "bnb", "paged", "_32bit")):
        return
    cls, kwargs = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    if not cls.__module__.startswith("bitsandbytes."):
        return
    device = next(p.device for p in trainer.model.parameters() if p.requires_grad)
    trial = nn.Parameter(torch.zeros(_LARGE, device=device))
    trial.grad = torch.ones_like(trial)
    try:
        cls([trial], **kwargs).step()
    except Exception as error:
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
    groups = [split for group in params for split in _split(group)] if _is_grouped(params) else params
    original(optimizer, groups, *args, **kwargs)


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

"""Optimizers that cannot step on this device, said before training; and LoRA-FA beside gains and biases.

bitsandbytes' optimizers have kernels for some devices and not for others, which differ by its version, and show in the
first step: a step of a parameter that is thrown away is tried first.

PEFT's LoRA-FA takes whatever has "lora" in its name for A and B in turn. A bias, a gain (`lora_magnitude_vector`) or a
magnitude makes the pairs slip: it would pair a gain with the next layer's A, which has no gradient, and fail in the
first step. Where the model has an adapter of ours, `create_lorafa_optimizer` puts these into a group of their own,
under names without "lora", where LoRA-FA is AdamW; without decay, as in `create_optimizer`. Whoever imported PEFT's
function before this package has the one that does not: Trainer says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from peft.optimizers.lorafa import LoraFAOptimizer
from torch import nn
from transformers import Trainer

from hf_qlora.config import QLoRAConfig
from hf_qlora.validation import ConfigError


logger = logging.getLogger(__name__)

_LARGE = 2**13  # parameters of fewer weights keep their state in float32
# What versions of bitsandbytes raise where a kernel, or a function of their library, is not there for the device.
_NO_KERNELS = (NotImplementedError, RuntimeError, ValueError, AttributeError, TypeError, NameError)
_OF_EACH = ("params", "names", "scaling_factors")  # lists, in a group of LoRA-FA's, with an entry for each parameter
_PAIRED = (".lora_A.", ".lora_B.", ".lora_embedding_A", ".lora_embedding_B")


def check_optimizer(trainer: Trainer) -> None:
    """Refuse an optimizer of bitsandbytes that has no kernels for the device, or nothing to train; and a LoRA-FA that
    would pair a gain or a bias with an A.

    Raises:
        ConfigError: with what can be used instead.
    """
    if isinstance(trainer.optimizer, LoraFAOptimizer):
        _check_pairs(trainer.optimizer)
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


def create_lorafa_optimizer(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """PEFT's; what is of LoRA and neither A nor B goes into a group of its own."""
    optimizer = original(model, *args, **kwargs)
    if any(isinstance(config, QLoRAConfig) for config in model.peft_config.values()):
        for group in list(optimizer.param_groups):
            _split_off(optimizer, group)
    return optimizer


def _split_off(optimizer: LoraFAOptimizer, group: dict[str, Any]) -> None:
    alone = [_is_alone(name) for name in group["names"]]
    if not any(alone):
        return
    apart = {name: value for name, value in group.items() if name not in _OF_EACH} | {"weight_decay": 0.0}
    for key in _OF_EACH:
        both = list(zip(group[key], alone, strict=True))
        group[key] = [value for value, is_alone in both if not is_alone]
        apart[key] = [value for value, is_alone in both if is_alone]
    apart["names"] = [name.replace("lora", "l_o_r_a") for name in apart["names"]]
    optimizer.add_param_group(apart)


def _check_pairs(optimizer: LoraFAOptimizer) -> None:
    names = [name for group in optimizer.param_groups for name in group.get("names", ())]
    alone = next(filter(_is_alone, names), None)
    if alone is not None:
        raise ConfigError(
            f"LoRA-FA would take {alone} for an A or a B of LoRA: its create_lorafa_optimizer was imported before "
            "hf_qlora. Import hf_qlora first, or call peft.optimizers.create_lorafa_optimizer(...) by its full name."
        )


def _is_alone(name: str) -> bool:
    return "lora" in name and not (any(part in name for part in _PAIRED) and not name.endswith(".bias"))

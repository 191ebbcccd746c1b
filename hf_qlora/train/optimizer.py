"""Parameter groups: no weight decay for what is no matrix, and a learning rate of its own for the gains."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hf_qlora.config import AdaptiveDepthLoRAConfig
from hf_qlora.layers import depth
from hf_qlora.validation import ConfigError


def create_optimizer(
    model: Any,
    optimizer_cls: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    *,
    lr: float,
    gain_lr_ratio: float | None = None,
    weight_decay: float = 0.0,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """An optimizer over what a model trains, for `Trainer(optimizers=(optimizer, None))`.

    The gains of `AdaptiveDepthLoRAConfig` learn with `lr * gain_lr_ratio`. Gains, biases and norms do not decay.

    Args:
        model: a `PeftModel`, or a transformers model that has adapters.
        lr: learning rate of the adapters and of everything else.
        gain_lr_ratio: by default that of the active adapters' configs, 1 where they have none.
        weight_decay: of the matrices.
        kwargs: for `optimizer_cls`.

    Raises:
        ConfigError: nothing to train, or a ratio that is not positive.
    """
    if not getattr(model, "peft_config", None):
        raise ConfigError(f"This {type(model).__name__} has no adapter. Add one with get_peft_model first.")
    gains = {id(scale.bias) for name in model.peft_config for scale in depth.scales(model, name).values()}
    ratio = _ratio(model) if gain_lr_ratio is None else gain_lr_ratio
    if not isinstance(ratio, int | float) or not 0 < ratio < math.inf:
        raise ConfigError(f"gain_lr_ratio={ratio!r} must be a positive finite number.")
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "vectors": [], "gains": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = "vectors" if parameter.ndim < 2 or "bias" in name else "matrices"
            groups["gains" if id(parameter) in gains else plain].append(parameter)
    if not any(groups.values()):
        raise ConfigError(
            "The model has nothing to train: no parameter requires a gradient. Load the adapter with "
            "is_trainable=True, or activate one with set_adapter."
        )
    settings = {
        "matrices": {"lr": lr, "weight_decay": weight_decay},
        "vectors": {"lr": lr, "weight_decay": 0.0},
        "gains": {"lr": lr * ratio, "weight_decay": 0.0},
    }
    filled = [{"params": found, **settings[kind]} for kind, found in groups.items() if found]
    return optimizer_cls(filled, lr=lr, **kwargs)


def _ratio(model: Any) -> float:
    active = model.active_adapters
    configs = [
        model.peft_config[name] for name in (active() if callable(active) else active)
    ]  # transformers' or PEFT's
    ratios = {config.gain_lr_ratio for config in configs if isinstance(config, AdaptiveDepthLoRAConfig)}
    if len(ratios) > 1:
        raise ConfigError(f"The active adapters' configs have gain_lr_ratio {sorted(ratios)}; pass one gain_lr_ratio.")
    return ratios.pop() if ratios else 1.0

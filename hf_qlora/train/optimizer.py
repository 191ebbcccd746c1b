"""Parameter groups: no weight decay for what is no matrix, and a learning rate of its own for the gains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from hf_qlora.config import AdaptiveDepthLoRAConfig
from hf_qlora.layers import depth
from hf_qlora.validation import ConfigError


def create_optimizer(
    model: PeftModel,
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
        lr: learning rate of the adapters and of everything else.
        gain_lr_ratio: by default that of the active adapters' configs, 1 where they have none.
        weight_decay: of the matrices.
        kwargs: for `optimizer_cls`.

    Raises:
        ConfigError: nothing to train, or a ratio that is not positive.
    """
    gains = {id(scale.bias) for name in model.peft_config for scale in depth.scales(model, name).values()}
    ratio = _ratio(model) if gain_lr_ratio is None else gain_lr_ratio
    if not ratio > 0:
        raise ConfigError(f"gain_lr_ratio={ratio!r} must be positive.")
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


def _ratio(model: PeftModel) -> float:
    configs = [model.peft_config[name] for name in model.active_adapters]
    ratios = {config.gain_lr_ratio for config in configs if isinstance(config, AdaptiveDepthLoRAConfig)}
    if len(ratios) > 1:
        raise ConfigError(f"The active adapters' configs have gain_lr_ratio {sorted(ratios)}; pass one gain_lr_ratio.")
    return ratios.pop() if ratios else 1.0

"""What is compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from hf_qlora.config import AdaptiveDepthLoRAConfig, QLoRAConfig
from hf_qlora.layers.profile import profile_at
from hf_qlora.train.optimizer import create_optimizer


@dataclass(frozen=True)
class Arm:
    """One way to adapt.

    Attributes:
        settings: of the config, beside those that all arms share.
        layer_rates: a depth profile for the learning rates of `lora_B`, instead of a scale.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    layer_rates: str = ""

    def config(self, **shared: Any) -> QLoRAConfig:
        scaled = {"depth_profile", "learn_gain", "attention"} & self.settings.keys()
        return (AdaptiveDepthLoRAConfig if scaled else QLoRAConfig)(**shared, **self.settings)

    def optimizer(self, model: PeftModel, lr: float) -> torch.optim.Optimizer:
        if not self.layer_rates:
            return create_optimizer(model, lr=lr)
        return torch.optim.AdamW(list(self._groups(model, lr)), lr=lr, weight_decay=0.0)

    def _groups(self, model: PeftModel, lr: float) -> Iterator[dict[str, Any]]:
        profile = AdaptiveDepthLoRAConfig(depth_profile=self.layer_rates)
        base: nn.Module = model.get_base_model()
        for name, parameter in base.named_parameters():
            if parameter.requires_grad:
                module, B, _ = name.partition(".lora_B.")
                factor = profile_at(base, module, profile) if B else 1.0
                yield {"params": [parameter], "lr": lr * factor}


ARMS = {
    arm.name: arm
    for arm in (
        Arm("LoRA"),
        Arm("DoRA", {"use_dora": True}),
        Arm("layer rates, linear", layer_rates="linear"),
        Arm("fixed linear", {"learn_gain": False, "depth_profile": "linear"}),
        Arm("fixed reverse", {"learn_gain": False, "depth_profile": "reverse"}),
        Arm("gain", {"depth_profile": "constant"}),
        Arm("gain + linear", {"depth_profile": "linear"}),
        Arm("gain + linear + concentration", {"depth_profile": "linear", "attention": "concentration"}),
    )
}
REFERENCE = "LoRA"  # also "fixed constant": with f = 1 and no gain they are one

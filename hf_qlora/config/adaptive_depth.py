"""The config of LoRA that is scaled by depth."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig

from hf_qlora.config.qlora import QLoRAConfig
from hf_qlora.config.record import RECORD_KEY
from hf_qlora.validation import CHANGES_BASE, ConfigError


DEPTH_PROFILES = ("linear", "constant", "reverse", "cosine", "rsqrt")
LARGEST_BOUND = 10.0
LARGEST_FACTOR = 1e6  # beyond, lora_B cannot hold the fold in float32 with the precision it has
ATTENTION = ("off", "concentration")


@dataclass
class AdaptiveDepthLoRAConfig(QLoRAConfig):
    """QLoRA whose contribution is scaled per layer: ΔW = (α/r) · f(l) · g · a · B A.

    f is a profile over the depth l of the layer, g a learned gain for each adapted module, and a comes from the
    layer's attention pattern (`layers/depth.py` has the formulas). All three are folded into `lora_B` on saving, so
    that the file is an ordinary LoRA adapter.

    Raises:
        ConfigError: a value out of range, a LoRA variant that has a forward of its own, or a setting with which the
            adapter could not be folded.
    """

    depth_profile: str | list[float] = field(
        default="linear",
        metadata={
            "help": "f over the layers 0 to L-1 of a stack: 'linear' 1 - l/L, 'reverse' (l+1)/L, 'cosine' "
            "(1 + cos(πl/L))/2, 'rsqrt' 1/√(l+1), 'constant' 1, or a list of L positive numbers."
        },
    )
    normalize_depth: bool = field(
        default=True, metadata={"help": "Divide f by its mean over all layers of the stack."}
    )
    learn_gain: bool = field(default=True, metadata={"help": "Learn g, one number for each adapted module."})
    gain_bound: float = field(
        default=1.0, metadata={"help": "κ: g = exp(κ tanh(θ/κ)) stays between exp(-κ) and exp(κ)."}
    )
    gain_lr_ratio: float = field(
        default=10.0,
        metadata={"help": "Learning rate of θ over that of the adapter, in `hf_qlora.create_optimizer`."},
    )
    attention: str = field(
        default="off",
        metadata={
            "help": "'concentration': scale by how concentrated the layer's attention is, against the other layers."
        },
    )

    def __post_init__(self) -> None:
        _check_depth(self)
        pattern: list[str] | str | None = self.__dict__["layers_pattern"]
        if self.layers_to_transform is None:  # PEFT takes the one with the other only; here it says what a layer is
            self.layers_pattern = None
        super().__post_init__()
        self.layers_pattern = pattern
        _check_composes(self)

    def to_portable_dict(self) -> dict[str, Any]:
        values = super().to_portable_dict()
        if self.layers_to_transform is None:
            values[RECORD_KEY]["layers_pattern"] = values["layers_pattern"]
            values["layers_pattern"] = None
        return values

    def without_depth(self) -> QLoRAConfig:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(QLoRAConfig)}
        if self.layers_to_transform is None:
            values["layers_pattern"] = None
        return QLoRAConfig(**values)


def _check_depth(config: AdaptiveDepthLoRAConfig) -> None:
    profile = config.depth_profile
    if isinstance(profile, str) and profile not in DEPTH_PROFILES:
        raise ConfigError(
            f"depth_profile={profile!r} is not known; choose one of {DEPTH_PROFILES}, or a list of positive numbers, "
            "one for each layer."
        )
    if not isinstance(profile, str | list | tuple):
        raise ConfigError(
            f"depth_profile={profile!r} must be one of {DEPTH_PROFILES}, or a list of Python numbers, one for each "
            "layer."
        )
    pattern: Any = config.layers_pattern
    if pattern is not None and not isinstance(pattern, str | list):
        raise ConfigError(f"layers_pattern={pattern!r} must be the name of a list of layers, or a list of such names.")
    if isinstance(profile, list | tuple):
        config.depth_profile = list(profile)
        if not profile or not all(_is_positive(v) and 1 / LARGEST_FACTOR <= v <= LARGEST_FACTOR for v in profile):
            raise ConfigError(
                f"depth_profile={profile} must hold positive numbers, one for each layer, between "
                f"{1 / LARGEST_FACTOR:g} and {LARGEST_FACTOR:g}, as Python's int or float."
            )
    for name in ("gain_bound", "gain_lr_ratio"):
        if not _is_positive(getattr(config, name)):
            raise ConfigError(f"{name}={getattr(config, name)!r} must be a positive finite number.")
    if config.gain_bound > LARGEST_BOUND:
        bound = config.gain_bound
        raise ConfigError(f"gain_bound={bound} lets a gain reach e^{bound:g}; choose at most {LARGEST_BOUND:g}.")
    if config.attention not in ATTENTION:
        raise ConfigError(f"attention={config.attention!r} is not known; choose one of {ATTENTION}.")


def _check_composes(config: AdaptiveDepthLoRAConfig) -> None:
    variants = [f.name for f in dataclasses.fields(LoraConfig) if f.metadata.get("is_lora_variant")]
    chosen = sorted(name for name in (*variants, "target_parameters") if getattr(config, name))
    if chosen:
        raise ConfigError(
            f"{chosen} cannot be combined with AdaptiveDepthLoRAConfig: it computes its product in a forward of its "
            "own, which knows no depth. Use QLoRAConfig with it, or leave it out."
        )
    init = config.init_lora_weights
    if isinstance(init, str) and init.startswith(CHANGES_BASE):
        raise ConfigError(
            f"init_lora_weights={init!r} subtracts the adapter from the base, which a scaled adapter would not give "
            "back. Use True, 'gaussian' or 'loftq'."
        )
    if not config.portable:
        raise ConfigError(
            "portable=False is not possible with AdaptiveDepthLoRAConfig: a reader that knows no depth could not "
            "compute the adapter. Leave it at True."
        )


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf

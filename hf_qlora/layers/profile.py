"""Where in the model's depth a module is, and the profile f(l) there."""

from __future__ import annotations

import math

from torch import nn

from hf_qlora.config import AdaptiveDepthLoRAConfig
from hf_qlora.validation import ConfigError


LAYER_LISTS = ("layers", "layer", "h", "block", "blocks")  # as transformers' families call them


def profile_at(model: nn.Module, name: str, config: AdaptiveDepthLoRAConfig) -> float:
    """f of the module called `name`."""
    profile = config.depth_profile
    if profile == "constant":
        return 1.0
    found = layer_index(model, name, config.layers_pattern)
    if found is None:
        raise ConfigError(
            f"{name} is in no numbered layer, so it has no depth. Name it in exclude_modules, name the list of layers "
            "with layers_pattern, or use depth_profile='constant'."
        )
    stack, index, L = found
    values = _values(profile, L) if isinstance(profile, str) else profile
    if len(values) != L:
        raise ConfigError(
            f"depth_profile has {len(values)} numbers, but {stack} has {L} layers; give one for each, also for those "
            "that are not adapted."
        )
    return values[index] / (sum(values) / L if config.normalize_depth else 1.0)


def _values(profile: str, L: int) -> list[float]:
    formulas = {
        "linear": lambda i: 1 - i / L,
        "reverse": lambda i: (i + 1) / L,
        "cosine": lambda i: (1 + math.cos(math.pi * i / L)) / 2,
        "rsqrt": lambda i: 1 / math.sqrt(i + 1),
    }
    return [formulas[profile](i) for i in range(L)]


def layer_index(model: nn.Module, name: str, pattern: str | list[str] | None = None) -> tuple[str, int, int] | None:
    """The stack that a module belongs to, its layer's index there, and the number of layers; None without one.

    Args:
        pattern: names of lists of layers; by default those of `LAYER_LISTS`, or else the outermost list.
    """
    parts = name.split(".")
    lists = [
        (stack, int(part), len(container))
        for i, part in enumerate(parts)
        if part.isdecimal()
        and isinstance(container := model.get_submodule(stack := ".".join(parts[:i])), nn.ModuleList | nn.Sequential)
    ]
    wanted = [pattern] if isinstance(pattern, str) else pattern or LAYER_LISTS
    named = [found for found in lists if found[0].rpartition(".")[2] in wanted]
    found = named or (lists if pattern is None else [])
    return found[0] if found else None


def split_name(model: nn.Module, name: str, pattern: str | list[str] | None = None) -> tuple[str, str]:
    """A module's numbered layer, as "model.layers.3", and its name in it; the first is "" without one."""
    found = layer_index(model, name, pattern)
    if found is None:
        return "", name
    layer = f"{found[0]}.{found[1]}"
    return layer, name.removeprefix(f"{layer}.")

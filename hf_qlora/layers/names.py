"""The layers that an adapter has, by their plain names."""

from __future__ import annotations

import re
from collections.abc import Iterator

from peft.tuners.lora import LoraLayer
from torch import nn


_WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def adapted_layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, LoraLayer]]:
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and adapter in layer.r:
            yield plain_name(name), layer


def plain_name(name: str) -> str:
    """A module's name without what torch.compile, FSDP and activation checkpointing put into it."""
    return _WRAPPERS.sub("", name)

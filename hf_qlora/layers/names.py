"""The layers that an adapter has, by their plain names."""

from __future__ import annotations

from collections.abc import Iterator

from peft.tuners.lora import LoraLayer
from torch import nn

from hf_qlora.quant.names import plain_name


def adapted_layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, LoraLayer]]:
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and adapter in layer.r:
            yield plain_name(name), layer

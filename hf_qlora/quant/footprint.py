"""What a model's weights take, counted: every storage once, quantized weights apart from dense ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from bitsandbytes.functional import QuantState
from torch import Tensor, nn


@dataclass(frozen=True)
class Footprint:
    """Bytes that the parameters of a model take, every storage counted once.

    Attributes:
        code_bytes, scale_bytes, table_bytes: packed weights, their scales at both levels, shared code tables.
        dense_bytes: all other parameters and buffers.
        quantized_params, dense_params: numbers of weights.
    """

    code_bytes: int = 0
    scale_bytes: int = 0
    table_bytes: int = 0
    dense_bytes: int = 0
    quantized_params: int = 0
    dense_params: int = 0

    @property
    def total_bytes(self) -> int:
        return self.code_bytes + self.scale_bytes + self.table_bytes + self.dense_bytes

    @property
    def bits_per_quantized_param(self) -> float:
        """Codes and scales, without the constant tables."""
        return 8 * (self.code_bytes + self.scale_bytes) / max(self.quantized_params, 1)

    def __str__(self) -> str:
        text = f"{self.total_bytes / 2**20:.1f} MiB"
        if self.quantized_params:
            text += (
                f" ({self.quantized_params / 1e6:.1f}M weights at {self.bits_per_quantized_param:.3f} bits, "
                f"{self.dense_params / 1e6:.1f}M dense)"
            )
        return text


def footprint(model: nn.Module) -> Footprint:
    """Count the bytes of a model's parameters and buffers; storage that several hold is counted once."""
    seen: set[tuple[torch.device, int]] = set()
    sizes = dict.fromkeys(("code", "scale", "table", "dense"), 0)
    params = {"code": 0, "dense": 0}

    def count(kind: str, tensor: Tensor, numel: int = 0) -> None:
        key = (tensor.device, tensor.data_ptr() or tensor.untyped_storage()._cdata)  # those on meta have no address
        if tensor.numel() and key not in seen:
            seen.add(key)
            sizes[kind] += tensor.numel() * tensor.element_size()
            if kind in params:
                params[kind] += numel

    for tensor in (*model.parameters(), *model.buffers()):
        state: QuantState | None = getattr(tensor, "quant_state", None)
        if state is None:
            count("dense", tensor, tensor.numel())
            continue
        count("code", tensor, state.shape.numel())
        for kind, part in _state_tensors(state):
            count(kind, part)
    return Footprint(sizes["code"], sizes["scale"], sizes["table"], sizes["dense"], params["code"], params["dense"])


def _state_tensors(state: QuantState) -> Iterator[tuple[str, Tensor]]:
    yield "scale", state.absmax
    yield "table", state.code
    if state.nested:
        yield "scale", state.offset
        yield "scale", state.state2.absmax
        yield "table", state.state2.code

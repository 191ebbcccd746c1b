"""Packed layers that have shapes and dtypes but no bytes: for models that are only laid out, not loaded."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor, nn

from hf_qlora.config import NF4Config
from hf_qlora.quant.linear4bit import become_linear4bit
from hf_qlora.quant.scheme import NESTED_BLOCK_SIZE


class _WithoutBytes(bnb.nn.Params4bit):
    """A packed weight without data, which bitsandbytes' copying cannot make; PEFT copies it for DoRA."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _WithoutBytes:
        return self


class WithoutBytes:
    """Makes dense layers packed ones without bytes, which share their constant tables as real ones do.

    Args:
        nf4: how the layers are packed.
        device: of the tensors: "meta", or another one within a mode that gives tensors without data.
    """

    def __init__(self, nf4: NF4Config, device: torch.device | str = "meta") -> None:
        self.nf4, self.device = nf4, device
        self.levels, self.scales = self._empty(16), self._empty(256)

    def pack(self, layer: Any) -> None:
        """Change a dense layer in place; the weight's values need not exist."""
        nf4, weight = self.nf4, layer.weight
        shape = torch.Size(weight.shape if isinstance(layer, nn.Linear) else weight.shape[::-1])
        blocks = -(-weight.numel() // nf4.block_size)
        state = QuantState(
            absmax=self._empty(blocks, torch.uint8 if nf4.double_quant else torch.float32),
            shape=shape,
            dtype=weight.dtype,
            blocksize=nf4.block_size,
            code=self.levels,
            quant_type=nf4.quant_type,
        )
        if nf4.double_quant:
            state.offset, state.nested = torch.zeros(()), True  # real, because naming a layer's tensors reads it
            groups = self._empty(-(-blocks // NESTED_BLOCK_SIZE))
            state.state2 = QuantState(
                absmax=groups, blocksize=NESTED_BLOCK_SIZE, code=self.scales, dtype=torch.float32
            )
        packed = self._empty(-(-weight.numel() // 2), torch.uint8)[:, None]
        become_linear4bit(layer, packed, state, nf4.compute_dtype)
        layer.weight.__class__ = _WithoutBytes

    def _empty(self, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, device=self.device, dtype=dtype)

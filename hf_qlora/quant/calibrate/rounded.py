"""A layer between its rounding and its last call: what it multiplies by, and how wrong that is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_qlora.kernels.functional import frozen_linear
from hf_qlora.quant.calibrate.group import Packed
from hf_qlora.quant.calibrate.report import LayerCalibration
from hf_qlora.quant.dequantize import product_weight


@dataclass
class RoundedLayer:
    """Rounded in three ways.

    Attributes:
        bias: of the layer.
        own, nearest: packed by calibration, and by rounding to nearest.
        base: what the weight came from, for merges.
        compute_dtype: of the products, else that of the weights.
    """

    bias: Tensor | None
    own: Packed
    nearest: Packed
    base: Packed | None
    compute_dtype: Any  # torch.dtype or None
    # of squares on the rows that were measured: the error's, nearest's, that of the base alone, and the output's
    _sums: Tensor = field(init=False, default_factory=lambda: torch.zeros(4, dtype=torch.float64))

    def product(self, x: Tensor, packed: Packed | None = None) -> Tensor:
        """As `Linear4bit` will make it, (..., in_features) → (..., out_features), in x's dtype."""
        dtype = self.product_dtype(x)
        bias = None if self.bias is None else self.bias.to(dtype)
        return frozen_linear(x.to(dtype), lambda: self.product_weight(dtype, packed), bias).to(x.dtype)

    def product_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype that x is multiplied in."""
        kind = x.device.type
        dtype: Any = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.compute_dtype
        found: torch.dtype = dtype or self.own[1].dtype
        return found

    def product_weight(self, dtype: torch.dtype, packed: Packed | None = None) -> Tensor:
        """What x is multiplied by, (out_features, in_features)."""
        return product_weight(*(packed or self.own), dtype)

    def measure(self, x: Tensor, expected: Tensor, found: Tensor) -> None:
        """Take in tokens: their inputs in the quantized model, the outputs in the dense one, and those found."""
        y = expected.float()
        outputs = [found, self.product(x, self.nearest)]
        if self.base is not None:
            outputs.append(self.product(x, self.base))
        squares = [(output.float() - y).double().square().sum() for output in outputs]
        squares += [torch.zeros_like(squares[0])] * (3 - len(squares))
        self._sums += torch.stack([*squares, y.double().square().sum()]).cpu()

    def report(self, name: str) -> LayerCalibration:
        error, nearest, dropped = (self._sums[:3] / self._sums[3].clamp(min=1e-300)).sqrt().tolist()
        # FP4's codes are of another table.
        before = self.base if self.base is not None and self.base[1].quant_type == "nf4" else self.nearest
        changed = _changed(self.own[0], before[0])
        return LayerCalibration(name, error, nearest, None if self.base is None else dropped, changed)


def _changed(packed: Tensor, before: Tensor) -> float:
    """The share of codes that differ."""
    differ = packed.view(-1) ^ before.view(torch.uint8).view(-1)
    return float(((differ >> 4) != 0).sum() + ((differ & 15) != 0).sum()) / (2 * differ.numel())

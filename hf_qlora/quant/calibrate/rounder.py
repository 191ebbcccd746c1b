"""Groups of layers, rounded: as an earlier run left them, as layers that hold the same weights were, or anew."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_qlora.config import NF4Config
from hf_qlora.quant.calibrate.errors import CalibrationError
from hf_qlora.quant.calibrate.grams import Grams, full_float32
from hf_qlora.quant.calibrate.group import Packed, round_group
from hf_qlora.quant.calibrate.rounded import RoundedLayer
from hf_qlora.quant.calibrate.settings import Calibration
from hf_qlora.quant.linear4bit import dense_weight
from hf_qlora.quant.packing import quantize_weight


class Rounder:
    """Arguments as for `Streams`; `resumed` counts the groups of an earlier run."""

    def __init__(
        self,
        layers: Mapping[str, nn.Linear | Conv1D],
        config: NF4Config,
        calibration: Calibration,
        base: Mapping[str, Packed],
        kept: Any,
    ) -> None:
        self.layers, self.config, self.calibration = layers, config, calibration
        self.base, self.kept = base, kept
        self.holders = Counter(id(layer.weight) for layer in layers.values())
        self.shared: dict[int, tuple[Tensor, Packed]] = {}  # by the parameter's id, which is kept for it
        self.nearest: dict[str, Packed] = {}
        self.resumed = 0

    def known(self, names: list[str], device: torch.device) -> dict[str, RoundedLayer] | None:
        """A group that need not be rounded."""
        kept: list[Packed] | None = self.kept.get(self._like(names), device) if self.kept else None
        if kept is not None:
            self.resumed += 1
            return self._layers(names, kept)
        found = [packed for name in names if (packed := self._shared(name)) is not None]
        return self._layers(names, found) if len(found) == len(names) else None

    def round(self, names: list[str], grams: Grams) -> dict[str, RoundedLayer]:
        """Round a group, and keep it for a later run.

        Raises:
            CalibrationError: its inputs are not finite.
        """
        found = {name: self._shared(name) for name in names}
        new = [name for name in names if found[name] is None]
        if new:  # else all hold weights of layers that other batches came to first
            found.update(zip(new, self._rounded(new, grams), strict=True))
        packed = [own for own in found.values() if own is not None]
        if self.kept:
            self.kept.put(names, packed)
        return self._layers(names, packed)

    def forget(self, name: str) -> None:
        """A layer that is not rounded after all."""
        self.nearest.pop(name, None)

    def _rounded(self, names: list[str], grams: Grams) -> list[Packed]:
        if not grams.are_finite():
            when = "after the layers before it were rounded" if grams.finite else "in some rows"
            raise CalibrationError(
                f"The inputs of {names[0]} have NaN or infinite values {when}. Leave out the rows that do this, or "
                "load the model in a wider dtype."
            )
        weights = [dense_weight(self.layers[name]) for name in names]
        with torch.autocast(grams.gram.device.type, enabled=False), full_float32():
            return round_group(
                weights,
                grams.gram,
                grams.take_cross(),
                self.config,
                self.calibration,
                dtype=weights[0].dtype,
                scales=[self.base[name][1] for name in names] if self.calibration.scales == "base" else None,
            )

    def _layers(self, names: list[str], packed: Iterable[Packed]) -> dict[str, RoundedLayer]:
        found = {}
        for name, own in zip(names, packed, strict=True):
            layer = self.layers[name]
            found[name] = RoundedLayer(
                layer.bias, own, self._nearest(name), self.base.get(name), self.config.compute_dtype
            )
            if self.holders[id(layer.weight)] > 1:
                self.shared.setdefault(id(layer.weight), (layer.weight, own))
        return found

    def _shared(self, name: str) -> Packed | None:
        """As a layer that holds the same weight was rounded."""
        return self.shared.get(id(self.layers[name].weight), (None, None))[1]

    def _like(self, names: list[str]) -> dict[str, Packed]:
        """What is packed as the group will be."""
        if self.calibration.scales == "base":
            return {name: self.base[name] for name in names}
        return {name: self._nearest(name) for name in names}

    def _nearest(self, name: str) -> Packed:
        if name not in self.nearest:
            self.nearest[name] = quantize_weight(dense_weight(self.layers[name]), self.config)
        return self.nearest[name]

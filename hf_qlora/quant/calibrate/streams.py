"""One forward with two streams: the model as it is, and the model as it is being quantized.

Every row goes in twice. A layer multiplies the first half of what it gets, X₀, by its own weight, and the second half,
X, by the rounded one; everything between the layers treats rows apart, so that the halves stay what two models would
make of them. When the first of the layers that read the same inputs is called, all of these are rounded, from exactly
the inputs that the quantized model produces; then the forward goes on. So one forward calibrates any architecture
whose layers see the rows of a batch in their order. The memory is that of the model, of one group's Gram matrices, and
of the activations of all rows at once, so that it grows with rows × length. The codes rounded to nearest are kept
beside the calibrated ones to the end, for the loss with them: a second model in 4 bits. Since dense weights go as
their layers are rounded, it makes no higher peak than the dense model did.

The last rows are held out: they go through the layers too and are in no Gram matrix, and the errors are theirs.

Rejected: block after block, each run again for each of its layers, as most implementations of GPTQ do. It takes less
memory for very many rows, and has to know every architecture's blocks and what they are called with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_qlora.config import NF4Config
from hf_qlora.quant.calibrate.errors import CalibrationError
from hf_qlora.quant.calibrate.group import Packed, round_group
from hf_qlora.quant.calibrate.report import LayerCalibration
from hf_qlora.quant.calibrate.rows import CalibrationRows
from hf_qlora.quant.calibrate.settings import Calibration
from hf_qlora.quant.calibrate.siblings import Forward, Heard, in_rows, replaced_forwards
from hf_qlora.quant.dequantize import dequantize_weight
from hf_qlora.quant.linear4bit import Linear4bit, become_linear4bit, dense_weight
from hf_qlora.quant.packing import quantize_weight


OnLayer = Callable[[str, Tensor, Linear4bit], None]

TOKENS_AT_A_TIME = 4096  # in the products of a Gram matrix


class _Finished(BaseException):
    """The last layer has been called; heads and losses are not needed."""


@dataclass
class _Rounded:
    """A layer after its group was rounded, until its last call."""

    packed: Packed
    nearest: Packed
    sums: Tensor  # of squares on the held-out rows: error, nearest's, dropped's, and the output's
    changed: float


class Streams:
    """The layers of a dense model, rounded one group after another while it runs.

    Args:
        layers: to be rounded, by name.
        heard: what `siblings.listen` heard.
        masks: for each layer that reads rows with padding, where there is none, bool, (rows, tokens).
        base: packed weights that the layers' weights came from, for merges, by name.
        on_layer: as for `quantize_model`.
        kept: rounded groups of an earlier run, and where to keep these.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Linear | Conv1D],
        heard: Heard,
        config: NF4Config,
        calibration: Calibration,
        rows: CalibrationRows,
        *,
        masks: Mapping[str, Tensor] | None = None,
        base: Mapping[str, Packed] | None = None,
        on_layer: OnLayer | None = None,
        kept: Any = None,
        progress: Any = None,
    ) -> None:
        self.layers, self.config, self.calibration, self.rows = dict(layers), config, calibration, rows
        self.masks, self.base, self.on_layer, self.kept = masks or {}, base or {}, on_layer, kept
        self.group_of = {name: group for group in heard.groups for name in group}
        self.left = Counter({name: n for name, n in heard.calls.items() if name not in heard.scattered})
        self.names = [name for group in heard.groups for name in group if name in self.left]
        self.rounded: dict[str, _Rounded] = {}
        self.holders = Counter(id(layer.weight) for layer in layers.values())
        self.shared: dict[int, tuple[Tensor, Packed]] = {}  # by the parameter's id, which is kept for it
        self.nearest: dict[str, Packed] = {}
        self.found: list[LayerCalibration] = []
        self.singular: list[str] = []
        self.resumed = 0
        self.scattered = sorted(heard.scattered)
        self.guards: list[Any] = []
        self.progress = progress

    def run(self, model: Callable[..., Any], inputs: Mapping[str, Tensor]) -> None:
        """Round the layers in one forward.

        Args:
            inputs: what the forward takes, the held-out rows last; each tensor is doubled here.
        """
        if not self.names:
            return
        twice = {name: torch.cat([tensor, tensor]) for name, tensor in inputs.items()}
        self.count = len(next(iter(twice.values())))
        self.lengths = {1, *(tensor.shape[1] for tensor in twice.values() if tensor.ndim > 1)}
        with replaced_forwards({name: self.layers[name] for name in self.names}, self._in_place_of) as self.restore:
            try:
                with torch.no_grad(), suppress(_Finished):
                    model(**twice)
                for name in list(self.rounded):  # called less often than it was heard
                    self._convert(name)
            finally:
                for guard in self.guards:
                    guard.remove()

    def _in_place_of(self, name: str, forward: Forward) -> Forward:
        def both(x: Tensor) -> Tensor:
            if not in_rows(x, self.count, self.lengths):
                self._give_up(name)
                if not +self.left:
                    raise _Finished
                alone: Tensor = forward(x)
                return alone
            teacher, student = x.chunk(2)
            if name not in self.rounded:
                self._round(self.group_of[name], teacher, student)
            expected, found = forward(teacher), self._product(name, student)
            self._measure(name, expected, found, student)
            self.left[name] -= 1
            if not self.left[name]:
                self._convert(name)
            if not +self.left:
                raise _Finished
            return torch.cat([expected, found])

        return both

    def _give_up(self, name: str) -> None:
        """A layer that does not see the rows in their order, though it seemed to, is left as it is."""
        del self.left[name]
        self.rounded.pop(name, None)
        self.nearest.pop(name, None)
        self.scattered.append(name)
        self.restore(name)

    def _round(self, group: list[str], teacher: Tensor, student: Tensor) -> None:
        names = [name for name in group if name in self.left]
        weights = {name: dense_weight(self.layers[name]) for name in names}
        if len(self._tokens(names[0], student)) < student.shape[-1]:
            self.singular.append(names[0])
        packed = self.kept.get(names, student.device) if self.kept else None
        self.resumed += packed is not None
        if packed is None:
            packed = self._packed(names, weights, teacher, student)
            if self.kept:
                self.kept.put(names, packed)
        for name, own in zip(names, packed, strict=True):
            nearest = quantize_weight(weights[name], self.config)
            before = self.base.get(name, nearest)
            self.rounded[name] = _Rounded(
                own, nearest, torch.zeros(4, dtype=torch.float64), _changed(own[0], before[0])
            )
            weight = self.layers[name].weight
            if self.holders[id(weight)] > 1:
                self.shared.setdefault(id(weight), (weight, own))
            self.nearest[name] = nearest

    def _packed(
        self, names: list[str], weights: Mapping[str, Tensor], teacher: Tensor, student: Tensor
    ) -> list[Packed]:
        found = {name: self.shared.get(id(self.layers[name].weight), (None, None))[1] for name in names}
        new = [name for name in names if found[name] is None]
        if new:
            gram, cross = self._grams(names[0], teacher, student)
            if not (gram.isfinite().all() and (cross is None or cross.isfinite().all())):
                when = "after the layers before it were rounded" if teacher.isfinite().all() else "in some rows"
                raise CalibrationError(
                    f"The inputs of {new[0]} have NaN or infinite values {when}. Leave out the rows that do this, or "
                    "load the model in a wider dtype."
                )
            scales = [self.base[name][1] for name in new] if self.calibration.scales == "base" else None
            with torch.autocast(student.device.type, enabled=False):
                packed = round_group(
                    [weights[name] for name in new],
                    gram,
                    cross,
                    self.config,
                    self.calibration,
                    dtype=weights[new[0]].dtype,
                    scales=scales,
                )
            found.update(zip(new, packed, strict=True))
        return [packed for packed in found.values() if packed is not None]

    def _grams(self, name: str, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor | None]:
        """H and D; D is None where both streams are one."""
        X0, X = self._tokens(name, teacher), self._tokens(name, student)
        same = torch.equal(X0, X)
        K = X.shape[-1]
        gram = torch.zeros(K, K, device=X.device)
        cross = None if same or not self.calibration.correction else torch.zeros_like(gram)
        with torch.autocast(X.device.type, enabled=False):
            for part, part0 in zip(X.split(TOKENS_AT_A_TIME), X0.split(TOKENS_AT_A_TIME), strict=True):
                part = part.float()
                gram.addmm_(part.t(), part)
                if cross is not None:
                    cross.addmm_(part.t(), part0.float())
        return gram, cross

    def _tokens(self, name: str, x: Tensor) -> Tensor:
        """The calibration rows' inputs, (tokens, K), without padding."""
        return self._unpadded(name, x, slice(None, -self.rows.held_out or None))

    def _held_out(self, name: str, x: Tensor) -> Tensor:
        return self._unpadded(name, x, slice(-self.rows.held_out, None))

    def _unpadded(self, name: str, x: Tensor, rows: slice) -> Tensor:
        count, mask = self.count // 2, self.masks.get(name)
        x = x.reshape(count, -1, x.shape[-1])[rows]
        if mask is not None and x.shape[1] == mask.shape[1]:
            return x[mask[rows].to(x.device)]
        return x.reshape(-1, x.shape[-1])

    def _product(self, name: str, x: Tensor, packed: Packed | None = None) -> Tensor:
        """As `Linear4bit` will make it."""
        codes, state = packed or self.rounded[name].packed
        dtype: Any = self.config.compute_dtype or state.dtype
        bias = self.layers[name].bias
        weight = dequantize_weight(codes, state, dtype)
        return nn.functional.linear(x.to(dtype), weight, None if bias is None else bias.to(dtype)).to(x.dtype)

    def _measure(self, name: str, expected: Tensor, found: Tensor, student: Tensor) -> None:
        rounded, x = self.rounded[name], self._held_out(name, student)
        y = self._held_out(name, expected).float()
        others = [self._product(name, x, rounded.nearest)]
        if name in self.base:
            others.append(self._product(name, x, self.base[name]))
        outputs = [self._held_out(name, found), *others]
        squares = [(output.float() - y).double().square().sum() for output in outputs]
        squares += [torch.zeros_like(squares[0])] * (3 - len(squares))
        rounded.sums += torch.stack([*squares, y.double().square().sum()]).cpu()

    def _convert(self, name: str) -> None:
        """The layer becomes NF4; its dense weight goes."""
        layer, rounded = self.layers[name], self.rounded.pop(name)
        weight = dense_weight(layer)
        self.restore(name)
        quantized = become_linear4bit(layer, *rounded.packed, self.config.compute_dtype)
        self.guards.append(quantized.register_forward_pre_hook(partial(_refuse, name)))
        if self.on_layer is not None:
            self.on_layer(name, weight, quantized)
        error, nearest, dropped = (rounded.sums[:3] / rounded.sums[3].clamp(min=1e-300)).sqrt().tolist()
        self.found.append(
            LayerCalibration(name, error, nearest, dropped if name in self.base else None, rounded.changed)
        )
        if self.progress is not None:
            self.progress.set_postfix_str(f"{name}: {error:.2%}, nearest {nearest:.2%}", refresh=False)
            self.progress.update()


def _refuse(name: str, *_: Any) -> None:
    """A layer that both streams would now go through in NF4."""
    raise CalibrationError(
        f"{name} is called more often for all rows than it was for the first ones; add it to skip_modules, and load "
        "the model anew."
    )


def _changed(packed: Tensor, before: Tensor) -> float:
    """The share of codes that differ."""
    differ = packed.view(-1) ^ before.view(torch.uint8).view(-1)
    return float(((differ >> 4) != 0).sum() + ((differ & 15) != 0).sum()) / (2 * differ.numel())

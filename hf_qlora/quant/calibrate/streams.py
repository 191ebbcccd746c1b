"""One forward with two streams: the model as it is, and the model as it is being quantized.

Every row goes in twice. A layer multiplies the first half of what it gets, X₀, by its own weight, and the second half,
X, by the rounded one; everything between the layers treats rows apart, so that the halves stay what two models would
make of them. When the first of the layers that read the same inputs is called, all of these are rounded, from exactly
the inputs that the quantized model produces; then the forward goes on. So one forward calibrates any architecture
whose layers see the rows of a batch in their order.

The rows go in some at a time, in forwards that wait for each other (`turns.py`) before a group of layers that is not
rounded: each adds to its Gram matrices, and all go on when it is. The memory is that of the model, its codes (those of
rounding to nearest too, of which the loss is reported), one group's Gram matrices, what one forward takes, and what a
waiting one holds, of all rows: the hidden states and the group's inputs, twice. So it grows with rows × length. Since
dense weights go as their layers are rounded, two models in 4 bits make no higher peak than the dense one did.

The last rows are held out: they go through the layers too and are in no Gram matrix, and the errors are theirs.

Rejected: block after block, each run again for each of its layers, as most implementations of GPTQ do. It holds the
hidden states alone, and has to know every architecture's blocks and what they are called with. All rows in one
forward: it held all that an MLP makes of all of them, several times the inputs of its widest layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_qlora.config import NF4Config
from hf_qlora.kernels.emulated import linear_into
from hf_qlora.quant.calibrate.errors import CalibrationError
from hf_qlora.quant.calibrate.grams import TOKENS_AT_A_TIME, Grams
from hf_qlora.quant.calibrate.group import Packed
from hf_qlora.quant.calibrate.report import LayerCalibration
from hf_qlora.quant.calibrate.rounded import RoundedLayer
from hf_qlora.quant.calibrate.rounder import Rounder
from hf_qlora.quant.calibrate.rows import CalibrationRows
from hf_qlora.quant.calibrate.settings import Calibration
from hf_qlora.quant.calibrate.siblings import Forward, Heard, in_rows, replaced_forwards
from hf_qlora.quant.calibrate.turns import Turn
from hf_qlora.quant.linear4bit import Linear4bit, become_linear4bit, dense_weight


OnLayer = Callable[[str, Tensor, Linear4bit], None]

# Of the calibration in one forward, where they have no more than TOKENS_AT_A_TIME; each is there twice.
ROWS_AT_A_TIME = 8  # with twice as many a CPU maps their tensors anew each time, and took 1.15 times as long
MOST_FORWARDS = 32  # that wait: each has a stack of its own


class _Finished(BaseException):
    """The last layer has been called; heads and losses are not needed."""


@dataclass(eq=False)
class _Batch:
    """Rows that go in together.

    Attributes:
        rows: which.
        inputs: of the forward, each row twice.
        held_out: they are in no Gram matrix.
        left: how often each layer is still to be called.
        turn: the forward.
        waits_for: a group of layers, by its first.
    """

    rows: slice
    inputs: dict[str, Tensor]
    held_out: bool
    left: Counter[str]
    turn: Any = None
    waits_for: str = ""

    @property
    def count(self) -> int:
        """Of rows, as the forward has them."""
        return len(next(iter(self.inputs.values())))


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
        self.masks, self.on_layer = masks or {}, on_layer
        self.rounder = Rounder(self.layers, config, calibration, base or {}, kept)
        self.group_of = {name: group for group in heard.groups for name in group}
        self.order = {group[0]: number for number, group in enumerate(heard.groups)}
        self.calls = Counter({name: n for name, n in heard.calls.items() if name not in heard.scattered})
        self.names = [name for group in heard.groups for name in group if name in self.calls]
        self.batches: list[_Batch] = []
        self.grams: dict[str, Grams] = {}  # by the name of the group's first layer
        self.rounded: dict[str, RoundedLayer] = {}
        self.found: list[LayerCalibration] = []
        self.singular: list[str] = []
        self.scattered = sorted(heard.scattered)
        self.guards: list[Any] = []
        self.progress = progress

    def run(self, model: Callable[..., Any], inputs: Mapping[str, Tensor]) -> None:
        """Round the layers.

        Args:
            inputs: what the forward takes, the held-out rows last.
        """
        if not self.names:
            return
        self.lengths = {1, *(tensor.shape[1] for tensor in inputs.values() if tensor.ndim > 1)}
        self.batches = list(self._in_batches(model, inputs))
        with replaced_forwards({name: self.layers[name] for name in self.names}, self._in_place_of) as self.restore:
            try:
                self._take_turns()
                for name in list(self.rounded):  # called less often than it was heard
                    self._convert(name)
            finally:
                for batch in self.batches:
                    batch.turn.abandon()
                for guard in self.guards:
                    guard.remove()

    def _in_batches(self, model: Callable[..., Any], inputs: Mapping[str, Tensor]) -> Iterator[_Batch]:
        first = next(iter(inputs.values()))
        rows, held_out = len(first), self.rows.held_out
        at_once = max(1, min(ROWS_AT_A_TIME, TOKENS_AT_A_TIME // max(self.lengths)), -(-rows // MOST_FORWARDS))
        for start, end in ((0, rows - held_out), (rows - held_out, rows)):
            for n in range(start, end, at_once):
                part = slice(n, min(n + at_once, end))
                twice = {name: torch.cat([tensor[part], tensor[part]]) for name, tensor in inputs.items()}
                batch = _Batch(part, twice, start > 0, Counter(self.calls))
                batch.turn = Turn(partial(_forward, model, batch), first.device.type)
                yield batch

    def _take_turns(self) -> None:
        """Each batch goes on to the next group that is not rounded; when all wait for one, it is, and they go on."""
        going = waiting = self.batches
        while waiting:
            for self.batch in going:
                self.batch.turn.go_on()
            waiting = [batch for batch in waiting if not batch.turn.ended]
            # Where a model treats rows differently they may wait for different groups; the first goes first.
            group = min((batch.waits_for for batch in waiting), key=self.order.__getitem__, default="")
            going = [batch for batch in waiting if batch.waits_for == group]
            if going:
                self._round(group)

    def _in_place_of(self, name: str, forward: Forward) -> Forward:
        first = self.group_of[name][0]

        def both(x: Tensor) -> Tensor:
            batch = self.batch
            if not in_rows(x, batch.count, self.lengths):
                self._give_up(name)
            elif name not in self.rounded:
                self._wait_for(first, batch, x)
            if name not in self.calls:  # given up, here or by another batch
                if not +batch.left:
                    raise _Finished
                alone: Tensor = forward(x)
                return alone
            if not batch.left[name]:
                _refuse(name)
            result = self._both_products(name, forward, x)
            if batch.held_out or not self.rows.held_out:
                tokens = partial(self._unpadded, name, batch)
                self.rounded[name].measure(tokens(x.chunk(2)[1]), *map(tokens, result.chunk(2)))
            batch.left[name] -= 1
            if not any(other.left[name] for other in self.batches):
                self._convert(name)
            if not +batch.left:
                raise _Finished
            return result

        return both

    def _both_products(self, name: str, forward: Forward, x: Tensor) -> Tensor:
        """What the layer makes of the first half of x, and what its rounded weight makes of the second."""
        (teacher, student), layer, rounded = x.chunk(2), self.layers[name], self.rounded[name]
        plain = type(layer) in (nn.Linear, Conv1D) and getattr(forward, "__func__", None) is type(layer).forward
        if not plain or x.dtype != layer.weight.dtype or torch.is_autocast_enabled(x.device.type):
            return torch.cat([forward(teacher), rounded.product(student)])
        W, bias = dense_weight(layer), None if layer.bias is None else layer.bias.detach()
        result = x.new_empty(*x.shape[:-1], len(W))  # a copy of both products would take a twentieth longer
        expected, found = (half.view(-1, len(W)) for half in result.chunk(2))
        linear_into(teacher.reshape(-1, x.shape[-1]), W, bias, expected)
        if rounded.product_dtype(x) == x.dtype:
            linear_into(student.reshape(-1, x.shape[-1]), rounded.product_weight(x.dtype), bias, found)
        else:
            found.copy_(rounded.product(student).view_as(found))
        return result

    def _give_up(self, name: str) -> None:
        """A layer that does not see the rows in their order, though it seemed to, is left as it is."""
        del self.calls[name]
        for batch in self.batches:
            batch.left.pop(name, None)
        self.rounded.pop(name, None)
        self.rounder.forget(name)
        self.scattered.append(name)
        self.restore(name)

    def _wait_for(self, first: str, batch: _Batch, x: Tensor) -> None:
        """Until the group of this first layer is rounded, by what all batches feed it."""
        teacher, student = x.chunk(2)
        if first not in self.grams:
            names = self._names(first)
            if self._tokens_in_all(names[0], batch, student) < x.shape[-1]:
                self.singular.append(names[0])
            known = self.rounder.known(names, x.device)
            if known is not None:
                self.rounded |= known
                return
            gram = torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float32, device=x.device)
            cross = torch.zeros_like(gram) if self.calibration.correction else None
            self.grams[first] = Grams(gram, cross, self.calibration.cap)
        if not batch.held_out:
            tokens = partial(self._unpadded, first, batch)
            self.grams[first].add(tokens(teacher), tokens(student))
        batch.waits_for = first
        batch.turn.wait()

    def _names(self, first: str) -> list[str]:
        return [name for name in self.group_of[first] if name in self.calls]

    def _round(self, first: str) -> None:
        names, grams = self._names(first), self.grams.pop(first)
        if names:
            grams.finish()
            self.rounded |= self.rounder.round(names, grams)

    def _unpadded(self, name: str, batch: _Batch, x: Tensor) -> Tensor:
        """One stream's inputs or outputs of a layer, (tokens, features), without padding."""
        x = x.reshape(batch.count // 2, -1, x.shape[-1])
        mask = self._mask(name, x.shape[1])
        return x.reshape(-1, x.shape[-1]) if mask is None else x[mask[batch.rows].to(x.device)]

    def _tokens_in_all(self, name: str, batch: _Batch, x: Tensor) -> int:
        """How many tokens the Gram matrix will have, with the rows of the other batches."""
        rows = self.batches[-1].rows.stop - self.rows.held_out
        tokens = x.numel() // x.shape[-1] // (batch.count // 2)
        mask = self._mask(name, tokens)
        return rows * tokens if mask is None else int(mask[:rows].sum())

    def _mask(self, name: str, tokens: int) -> Tensor | None:
        mask = self.masks.get(name)
        return mask if mask is not None and mask.shape[1] == tokens else None

    def _convert(self, name: str) -> None:
        """The layer becomes NF4; its dense weight goes."""
        layer, rounded = self.layers[name], self.rounded.pop(name)
        weight = dense_weight(layer)
        self.restore(name)
        quantized = become_linear4bit(layer, *rounded.own, self.config.compute_dtype)
        self.guards.append(quantized.register_forward_pre_hook(partial(_refuse, name)))
        if self.on_layer is not None:
            self.on_layer(name, weight, quantized)
        found = rounded.report(name)
        self.found.append(found)
        if self.progress is not None:
            self.progress.set_postfix_str(f"{name}: {found.error:.2%}, nearest {found.nearest:.2%}", refresh=False)
            self.progress.update()


def _forward(model: Callable[..., Any], batch: _Batch) -> None:
    with torch.no_grad(), suppress(_Finished):
        model(**batch.inputs)


def _refuse(name: str, *_: Any) -> None:
    """A layer that both streams would now go through in NF4."""
    raise CalibrationError(
        f"{name} is called more often for all rows than it was for the first ones; add it to skip_modules, and load "
        "the model anew."
    )

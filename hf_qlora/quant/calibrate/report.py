"""What a calibrated rounding did: the report, as a table, a dict and JSON.

A layer's error is that of its outputs on the held-out rows, ‖X Q̂ᵀ − X₀ Tᵀ‖ / ‖X₀ Tᵀ‖, with X what the quantized model
feeds it and X₀ what the model that it stands for does; nearest's is measured on the same X. What rounding to nearest
loses in a layer depends on what came before it, so that a layer may be worse than nearest and the model better: the
losses decide.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from hf_qlora.config.record import json_text


LEGEND = (  # of a base, and of a merge
    "error, nearest: of the layers' outputs, as rounded and rounded to nearest. codes changed: of nearest's. worse: "
    "layers with more error than nearest.",
    "error, nearest, dropped: of the layers' outputs, as rounded, rounded to nearest, and without the adapter. codes "
    "changed: of the base's, or of nearest's where that is not in NF4. worse: layers with more error than nearest.",
)
CLEAR_GAP = 0.002  # nats a token, of which a share can be taken
CLEAR_LOSS = 0.02  # nats a token: where models are less apart on some held-out rows, their outputs are looked at
UNCUT = 200  # columns where no terminal says how many


@dataclass(frozen=True)
class LayerCalibration:
    """One layer, measured on the held-out rows, or on all where there are none.

    Attributes:
        error: of its outputs, relative, as it was rounded.
        nearest: the same rounded to nearest.
        dropped: the same with the base's weights, without the adapter; None where nothing was merged.
        changed: the share of codes that are other than the base's, or, where nothing was merged or the base is in
            FP4, than nearest's.
    """

    name: str
    error: float
    nearest: float
    dropped: float | None
    changed: float


@dataclass(frozen=True)
class CalibrationReport:
    """A calibrated rounding, and what it loses.

    Attributes:
        rows: what it was calibrated on, in words.
        tokens: how many, without padding and without the held-out rows; 0 for models that read no text.
        count, held_out: rows calibrated on, and further ones to measure on; where none are held out, it is measured
            on those calibrated on.
        fingerprint: a sha256 of all rows.
        method: as `Method` has it.
        layers: in the order of the forward.
        losses: nats a token on the held-out rows, of the model before ("dense"), "nearest" and "calibrated"; empty for
            models other than causal language models.
        seconds: to the last layer, with what is measured of the model before: its loss, and what its layers read.
        notes: what else a reader must know.
    """

    rows: str
    tokens: int
    count: int
    held_out: int
    fingerprint: str
    method: dict[str, Any]
    layers: list[LayerCalibration]
    losses: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def measured_on(self) -> str:
        """The rows that losses and outputs are of, in words."""
        return "held-out rows" if self.held_out else "the rows calibrated on"

    @property
    def closed(self) -> float | None:
        """The share of what rounding to nearest loses that is not lost; None where that is less than `CLEAR_GAP`."""
        gap = self.losses.get("nearest", math.nan) - self.losses.get("dense", math.nan)
        return (self.losses["nearest"] - self.losses["calibrated"]) / gap if gap > CLEAR_GAP else None

    @property
    def is_worse(self) -> bool:
        """Whether it is worse than rounding to nearest on the held-out rows.

        By loss, where that of nearest is lower by over `CLEAR_LOSS`; where it is lower by less, which a few rows do
        not decide, if the layers' outputs have more error too. A loss that is NaN is worse.
        """
        own, nearest = self.losses.get("calibrated", -math.inf), self.losses.get("nearest", math.inf)
        beyond = own - nearest
        return math.isnan(own) or beyond > CLEAR_LOSS or (beyond > CLEAR_GAP and self.error > self.nearest)

    @property
    def error(self) -> float:
        """The mean of the layers' errors."""
        return sum(layer.error for layer in self.layers) / max(len(self.layers), 1)

    @property
    def nearest(self) -> float:
        """The mean of the layers' errors, rounded to nearest."""
        return sum(layer.nearest for layer in self.layers) / max(len(self.layers), 1)

    def card_rows(self) -> dict[str, str]:
        """What a model card says of it."""
        found = {name.capitalize(): line for name, line in self.lines()[1:] if name != "note"}
        return found | {f"Note {number}": note for number, note in enumerate(self.notes, 1)}

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON types."""
        return {**dataclasses.asdict(self), "closed": self.closed, "error": self.error, "nearest": self.nearest}

    def to_json(self) -> str:
        return json_text(self.to_dict(), ensure_ascii=False)

    def lines(self) -> list[tuple[str, str]]:
        """Headings and sentences."""
        on = f", {self.tokens:,} tokens" if self.tokens else ""
        found = [("calibrated", f"on {self.rows}{on}, in {self.seconds:.0f} s")]
        if self.losses:
            losses = ", ".join(f"{name} {loss:.4f}" for name, loss in self.losses.items())
            closed = (
                "" if self.closed is None else f": {self.closed:.0%} of what rounding to nearest loses is won back"
            )
            found.append(("loss", f"{losses} nats a token on {self.measured_on}{closed}"))
        found.append(("outputs", f"error {self.error:.2%} a layer on {self.measured_on}; nearest {self.nearest:.2%}"))
        return found + [("note", note) for note in self.notes]

    def show(self, console: Console | None = None) -> None:
        """Print the lines, and a table by kind of layer."""
        to = console or Console(width=UNCUT)
        for name, line in self.lines():
            to.print(f"{name:<10} {line}", highlight=False, markup=False, soft_wrap=True)
        self.show_layers(to)

    def show_layers(self, console: Console) -> None:
        """Print the table by kind of layer."""
        merged = any(layer.dropped is not None for layer in self.layers)
        console.print(_table(self.layers, merged))
        console.print(LEGEND[merged], highlight=False, markup=False, soft_wrap=True)

    def __str__(self) -> str:
        console = Console(width=UNCUT, no_color=True)
        with console.capture() as captured:
            self.show(console)
        return captured.get().rstrip("\n")


def _table(layers: list[LayerCalibration], merged: bool) -> Table:
    kinds: dict[str, list[LayerCalibration]] = defaultdict(list)
    for layer in layers:
        kinds[layer.name.rpartition(".")[2]].append(layer)
    table = Table(box=None, pad_edge=False)
    table.add_column("mean of", no_wrap=True)
    for column in ("layers", "error", "nearest", *(["dropped"] if merged else []), "codes changed", "worse"):
        table.add_column(column, justify="right", no_wrap=True)
    for kind, found in kinds.items():
        n = len(found)
        cells = [f"{sum(layer.error for layer in found) / n:.2%}", f"{sum(layer.nearest for layer in found) / n:.2%}"]
        if merged:
            cells.append(f"{sum(layer.dropped or 0 for layer in found) / n:.2%}")
        cells.append(f"{sum(layer.changed for layer in found) / n:.1%}")
        cells.append(str(sum(layer.error > layer.nearest for layer in found)))
        table.add_row(kind, str(n), *cells)
    return table

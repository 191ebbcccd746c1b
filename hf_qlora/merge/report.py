"""What a merge did: the report that `merge` returns, as a table, a dict, and JSON."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hf_qlora.config.record import json_text
from hf_qlora.layers.errors import MergeError
from hf_qlora.merge.folder import CARD, whole_folder
from hf_qlora.merge.held_out import OutputError
from hf_qlora.merge.measure import LayerMerge
from hf_qlora.merge.probe import Divergence
from hf_qlora.merge.record import describe
from hf_qlora.quant.calibrate.report import CLEAR_LOSS, CalibrationReport


WORST = 5
UNCUT = 200  # columns where no terminal says how many

MEANING = {  # by onto, and by whether the adapter was trained on a base in NF4
    ("dequantized", True): "the base that the adapter was trained on, dense, plus ΔW",
    ("dequantized", False): "the dense base that the adapter was trained on, plus ΔW",
    ("original", True): "the original dense base plus ΔW: the quantization error comes back",
    ("original", False): "the original dense base plus ΔW",
    ("nf4", True): "rounded to NF4, each weight to its nearest level",
    ("nf4", False): "rounded to NF4, each weight to its nearest level",
}
NOT_IN_A_CARD = ("merged", "compared", "saved", "note")
CALIBRATED = "rounded to NF4 so that the layers' outputs stay right, calibrated on rows"
ASSUMED = "the base as it is stored, plus ΔW"
ANOTHER = "another base than the adapter was trained on, dense, plus ΔW"
LEGEND = (
    "ΔW/step: ΔW in steps between NF4's levels. error: of the merged weight, against W + ΔW. signal: the share of ΔW "
    "that is in it."
)


class MergeRefused(MergeError):
    """A merge that loses the adapter; `report` has what was measured."""

    def __init__(self, message: str, report: MergeReport) -> None:
        super().__init__(message)
        self.report = report


@dataclass
class MergeReport:
    """A merge, and how far it is from the model that was trained.

    Attributes:
        onto: "dequantized", "original" or "nf4".
        base, original: names of the base and, for `onto="original"`, of what ΔW was added to.
        adapters: what was merged.
        dtype: of the merged weights.
        layers: one entry for each adapted layer, measured against the base as trained plus ΔW.
        text: what the logits were compared on, or why they were not.
        logits: KL to the unmerged model; None where it was not measured.
        quantized: whether the adapter was trained on a base in NF4.
        assumed: whether that is not known, and was taken from how the base is stored.
        another_base: whether it is known not to be the one that the adapter was trained on.
        notes: what else a reader must know.
        model: the merged model; None if it was written to files alone.
        output: the folder it was written to.
        calibration: what calibrated rounding did, layer by layer; None where there was none.
        losses: nats a token on the calibration's held-out rows: "base", "unmerged", "nearest", "merged"; empty for
            models other than causal language models.
        outputs: errors of the outputs on the same rows; None where nothing was calibrated.
    """

    onto: str
    base: str
    adapters: list[str]
    dtype: str
    layers: list[LayerMerge]
    text: str
    logits: Divergence | None = None
    original: str | None = None
    quantized: bool = True
    assumed: bool = False
    another_base: bool = False
    notes: list[str] = field(default_factory=list)
    model: Any = field(default=None, repr=False, compare=False)
    output: str | None = None
    calibration: CalibrationReport | None = None
    losses: dict[str, float] = field(default_factory=dict)
    outputs: OutputError | None = None

    @property
    def error(self) -> float:
        """‖M − T‖ / ‖ΔW‖ over all layers: 1 is as far from the trained weights as the base without the adapter."""
        wrong = sum((layer.noise or 0) ** 2 * layer.delta_norm**2 for layer in self.layers)
        return math.sqrt(wrong / self._squared_delta) if self._squared_delta else 0.0

    @property
    def kept(self) -> float:
        """The share of the adapter that is kept: of logits 1 − KL / KL without it, or else of weights, as signal.

        Calibrated, it is measured on the held-out rows: as the share of the loss that the adapter gains there, where
        that is over `CLEAR_LOSS`, or else of outputs, 1 − (error / error without it)². Onto the original always of
        weights: its logits differ because the base does, which has no share in the adapter. An adapter that changes
        nothing is kept.
        """
        if self.kept_by == "loss":
            return (self.losses["base"] - self.losses["merged"]) / (self.losses["base"] - self.losses["unmerged"])
        if self.outputs is not None and self.kept_by == "outputs":
            return self.outputs.kept
        if self.logits is not None and self.kept_by == "logits":
            return 1 - self.logits.merged / self.logits.without if self.logits.without else 1.0
        found = sum((layer.signal or 0) * layer.delta_norm**2 for layer in self.layers)
        return found / self._squared_delta if self._squared_delta else 1.0

    @property
    def kept_by(self) -> str:
        """What `kept` is measured by: "loss" or "outputs" on a calibration's rows; else "logits" or "weights"."""
        if self.losses and self.losses["base"] - self.losses["unmerged"] > CLEAR_LOSS:
            return "loss"
        if self.outputs is not None:
            return "outputs"
        return "logits" if self.logits is not None and self.onto != "original" else "weights"

    @property
    def _squared_delta(self) -> float:
        return sum(layer.delta_norm**2 for layer in self.layers)

    @property
    def _is_of_nothing(self) -> bool:
        """Whether the adapter makes no difference in anything that was compared."""
        without = [found.without for found in (self.logits, self.outputs) if found is not None]
        return not (self._squared_delta or any(without)) and self.kept_by != "loss"

    def worst(self, count: int = WORST) -> list[LayerMerge]:
        """The layers with the largest relative error."""
        return sorted(self.layers, key=lambda layer: layer.error, reverse=True)[:count]

    def card_rows(self) -> dict[str, str]:
        """What a model card says of it: no path, and no note but the calibration's.

        What is kept by weights is not said: their rounding to a narrow dtype takes a large share of it, and hardly
        moves the logits.
        """
        unsaid = {"logits": self.logits is None, "kept": self.kept_by == "weights"}
        left_out = {*NOT_IN_A_CARD, *(name for name, is_unsaid in unsaid.items() if is_unsaid)}
        found = {name.capitalize(): line for name, line in self._lines() if name not in left_out}
        notes = [] if self.calibration is None else self.calibration.notes
        base = {"Base": "another one than the adapter was trained on"} if self.another_base else {}
        return {
            "Weights are": self._meaning,
            **base,
            **found,
            **{f"Note {number}": note for number, note in enumerate(notes, 1)},
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything but the model, as JSON types."""
        values: dict[str, Any] = {
            item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "model"
        }
        values["layers"] = [dataclasses.asdict(layer) for layer in self.layers]
        values["calibration"] = None if self.calibration is None else self.calibration.to_dict()
        values["logits"] = None if self.logits is None else dataclasses.asdict(self.logits)
        values["outputs"] = None if self.outputs is None else dataclasses.asdict(self.outputs)
        return {**values, "error": self.error, "kept": self.kept, "kept_by": self.kept_by}

    def to_json(self) -> str:
        return json_text(self.to_dict(), ensure_ascii=False)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, tokenizer: Any = None, overwrite: bool = False, **kwargs: Any
    ) -> None:
        """Save the merged model in a folder that is there whole or not at all.

        Args:
            tokenizer: saved beside the model.
            overwrite: replace a model that is there; of its card, what a user wrote is kept.
            kwargs: for the model's own `save_pretrained`, as `max_shard_size`.

        Raises:
            MergeError: nothing to save, or a folder with other things in it.
            OSError: the disk is full or read-only; what was there is unchanged.
        """
        if self.model is None:
            raise MergeError(f"The merged model is in {self.output} already, and not in memory.")
        target = Path(save_directory)
        with whole_folder(target, overwrite, CARD) as stage:
            self.model.save_pretrained(stage, **kwargs)
            if tokenizer is not None:
                tokenizer.save_pretrained(stage)
            describe(stage, self, type(self.model).__name__, Path(self.original or self.base), None, target)
        self.output = os.fspath(save_directory)

    def show(self, console: Console | None = None) -> None:
        """Print the lines and the table of the worst layers."""
        to = console or Console(width=UNCUT)
        for name, line in self._lines():
            to.print(f"{name:<10} {line}", highlight=False, markup=False, soft_wrap=True)
        if self.calibration is not None:
            self.calibration.show_layers(to)
        elif self.layers:
            to.print(_table(self.worst()))
            rest = len(self.layers) - WORST
            if rest > 0:
                to.print(f"… and {rest} layers whose error is no larger.", highlight=False, markup=False)
            to.print(LEGEND, highlight=False, markup=False, soft_wrap=True)

    def __str__(self) -> str:
        console = Console(width=UNCUT, no_color=True)
        with console.capture() as captured:
            self.show(console)
        return captured.get().rstrip("\n")

    @property
    def measure(self) -> str:
        """`kept_by` in words, with the rows that it is of."""
        return f"{self.kept_by} on {self._rows}" if self.kept_by in ("loss", "outputs") else self.kept_by

    @property
    def _rows(self) -> str:
        return "held-out rows" if self.calibration is None else self.calibration.measured_on

    @property
    def _meaning(self) -> str:
        if self.calibration is not None:
            return CALIBRATED
        if self.onto == "dequantized" and (self.assumed or self.another_base):
            return ASSUMED if self.assumed else ANOTHER
        return MEANING[self.onto, self.quantized]

    def _lines(self) -> Sequence[tuple[str, str]]:
        where = self.original or self.base
        what = "with" if self.logits is not None else "as weights, with"
        trained = "with the adapter as it was trained"
        if self.assumed or self.another_base:
            trained = "as stored, with the adapter" if self.assumed else "with the adapter"
        lines = [
            ("merged", f"{', '.join(self.adapters)} onto {where}, in {self.dtype}: {self._meaning}"),
            ("compared", f"{what} the unmerged model, {self.base} {trained}"),
        ]
        if self.logits is not None:
            found = f"KL {self.logits.merged:.2g} nats; without the adapter {self.logits.without:.2g}"
            lines.append(("logits", f"{found} ({self.text}, {self.logits.positions} positions)"))
        else:
            lines.append(("logits", self.text))
        if self.calibration is not None:
            lines.append(("calibrated", f"on {self.calibration.rows}, sha256 {self.calibration.fingerprint[:16]}…"))
            lines += [line for line in self.calibration.lines() if line[0] == "outputs"]
        elif self.layers:
            lines.append(("weights", f"error {self.error:.3g} of ‖ΔW‖ over {len(self.layers)} layers"))
        if self.losses:
            losses = ", ".join(f"{name} {loss:.4f}" for name, loss in self.losses.items())
            lines.append(("loss", f"{losses} nats a token on {self._rows}"))
        if self.outputs is not None:
            found = f"error {self.outputs.merged:.2%}; without the adapter {self.outputs.without:.2%}"
            lines.append(("model", f"{found}, of its outputs on {self._rows} ({self.outputs.rows})"))
        kept = f"{self.kept:.1%} of the adapter, by {self.measure}"
        lines.append(("kept", "nothing was to be kept: the adapter changes nothing" if self._is_of_nothing else kept))
        lines += [("note", note) for note in self.notes]
        if self.output:
            lines.append(("saved", f"in {self.output}"))
        return lines


def _table(layers: Sequence[LayerMerge]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("worst layers", no_wrap=True)
    for column in ("‖ΔW‖/‖W‖", "ΔW/step", "error/‖W‖", "error/‖ΔW‖", "signal"):
        table.add_column(column, justify="right", no_wrap=True)
    for layer in layers:
        numbers = (layer.relative_delta, layer.steps, layer.error, layer.noise, layer.signal)
        table.add_row(layer.name, *("" if number is None else f"{number:.3g}" for number in numbers))
    return table

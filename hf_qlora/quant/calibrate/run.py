"""Calibrated rounding of a model's layers, from rows to the report."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from hf_qlora.config import NF4Config
from hf_qlora.data.errors import counted
from hf_qlora.quant.calibrate.batches import LABELS, NO_LABEL
from hf_qlora.quant.calibrate.errors import CalibrationError, explained
from hf_qlora.quant.calibrate.group import Packed
from hf_qlora.quant.calibrate.kept import Kept, key_of
from hf_qlora.quant.calibrate.loss import evaluating, mean_loss
from hf_qlora.quant.calibrate.report import CalibrationReport
from hf_qlora.quant.calibrate.rows import CalibrationRows, calibration_rows, plausible
from hf_qlora.quant.calibrate.settings import Calibration, asdict
from hf_qlora.quant.calibrate.siblings import Heard, listen
from hf_qlora.quant.calibrate.streams import OnLayer, Streams
from hf_qlora.quant.linear4bit import Linear4bit, become_linear4bit, dense_weight, set_packed
from hf_qlora.quant.packing import quantize_weight
from hf_qlora.validation import ConfigError


logger = logging.getLogger(__name__)

LISTENED_ROWS = 2
MASKS = ("attention_mask", "decoder_attention_mask")
_REPORT = "_hf_qlora_calibration"


def checked_calibration(given: Any, model: nn.Module, config: NF4Config) -> Calibration:
    """A Calibration with rows that fit the model and that it can make sense of.

    Raises:
        CalibrationError: rows that cannot be used.
        ConfigError: a base in FP4, whose levels are not sought here.
    """
    if config.quant_type != "nf4":
        raise ConfigError(f"calibration= rounds to NF4 alone; quant_type is {config.quant_type!r}. Leave it out.")
    calibration = planned(given, model)
    plausible(model, calibration.rows, calibration.force)
    return calibration


def planned(
    given: Any, model: nn.Module, tokenizer: Any = None, resume: Path | None = None, **size: int
) -> Calibration:
    """A Calibration, of one or of whatever `calibration_rows` takes, with its rows read and held against the model.

    Args:
        model: it need not have its weights yet.
        tokenizer: unless the calibration has one.
        resume: where rounded layers are kept, unless the calibration says.
        size: of the rows, as for `calibration_rows`.

    Raises:
        CalibrationError: rows that cannot be used.
    """
    calibration = given if isinstance(given, Calibration) else Calibration(given)
    rows = calibration_rows(calibration.rows, model, calibration.tokenizer or tokenizer, **size)
    return dataclasses.replace(calibration, rows=rows, resume=calibration.resume or resume)


def calibration_report(model: nn.Module) -> CalibrationReport | None:
    """What the calibrated rounding of this model did; None where there was none since it was loaded."""
    return getattr(model, _REPORT, None)


def forget_calibration(model: nn.Module) -> None:
    """For a model that has other weights now."""
    model.__dict__.pop(_REPORT, None)


@torch.inference_mode(False)  # whose tensors know no gradients; the layers that are made here are trained through
@torch.no_grad()
@explained()
def calibrate(
    model: nn.Module,
    layers: Mapping[str, nn.Linear | Conv1D],
    config: NF4Config,
    calibration: Calibration,
    *,
    base: Mapping[str, Packed] | None = None,
    on_layer: OnLayer | None = None,
    delay: float = 0.0,
) -> CalibrationReport:
    """Turn dense layers into NF4 ones, calibrated.

    Args:
        layers: of the model, by name.
        calibration: as `checked_calibration` gave it.
        base: packed weights that the layers' weights came from, for merges, by name.
        on_layer: as for `quantize_model`.
        delay: seconds before a progress bar is shown.

    Raises:
        CalibrationError: inputs, or a loss, that are not finite; out of memory.
        ConfigError: scales of a base that is not in NF4.
    """
    rows, started = calibration.rows, time.monotonic()
    alone = [name for name in layers if calibration.scales == "base" and name not in (base or {})]
    if alone:
        raise ConfigError(
            f"scales='base' keeps the scales of an NF4 base, which {alone[0]} has none of; take scales='own'."
        )
    inputs = forward_inputs(model, rows)
    losses = {"dense": mean_loss(model, measured_inputs(rows))}
    for name, (_, state) in (base or {}).items():
        if calibration.scales == "base" and state.quant_type != "nf4":
            raise ConfigError(f"scales='base' keeps the scales of an NF4 base; {name} is in {state.quant_type}.")
    run = partial(model, use_cache=False) if "use_cache" in inspect.signature(model.forward).parameters else model
    with evaluating(model), torch.compiler.set_stance("force_eager"):
        few = _few(inputs)
        heard = listen(run, layers, few)
        _refuse_broken(run, layers, inputs, rows, losses["dense"])
        kept = None
        if calibration.resume is not None:
            settings = (config, asdict(calibration), list(layers))
            scales = base if calibration.scales == "base" else None
            kept = Kept(calibration.resume, key_of(model, rows.fingerprint, settings, scales))
        with tqdm(total=len(layers), desc="Calibrating NF4", unit="layer", delay=delay, leave=False) as bar:
            streams = Streams(
                layers,
                heard,
                config,
                calibration,
                rows,
                masks=_masks(heard, inputs, few),
                base=base,
                on_layer=on_layer,
                kept=kept,
                progress=bar,
            )
            try:
                with explained():
                    streams.run(run, inputs)
            except CalibrationError as error:
                if not streams.found:
                    raise
                raise CalibrationError(f"{error} Some layers are NF4 already: load the model anew.") from error
    uncalibrated = _round_the_rest(layers, config, on_layer)
    seconds = time.monotonic() - started
    losses["nearest"] = _nearest_loss(model, layers, streams.rounder.nearest, rows)
    losses["calibrated"] = mean_loss(model, measured_inputs(rows))
    report = CalibrationReport(
        rows=rows.source,
        tokens=rows.tokens,
        count=rows.count - rows.held_out,
        held_out=rows.held_out,
        fingerprint=rows.fingerprint,
        method=asdict(calibration),
        layers=streams.found,
        losses={name: loss for name, loss in losses.items() if loss is not None},
        seconds=seconds,
        notes=_notes(rows, streams, heard, uncalibrated),
    )
    if report.is_worse and base is None:  # rounded to nearest, a merge may lose less because it has lost the adapter
        report.notes.append(f"Rounding to nearest loses less on {report.measured_on}: give other rows, or more.")
    setattr(model, _REPORT, report)
    for note in report.notes:
        logger.warning("%s", note)
    return report


def measured_inputs(rows: CalibrationRows) -> dict[str, Tensor]:
    """The held-out rows, or all where none are held out."""
    return rows.measured if rows.held_out else rows.inputs


def forward_inputs(model: Any, rows: CalibrationRows) -> dict[str, Tensor]:
    """What the forward takes, all rows; a decoder beside an encoder reads the labels, or else the same text."""
    device = next(model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in rows.inputs.items()}
    labels = inputs.pop(LABELS, None)
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False) or "decoder_input_ids" in inputs:
        return inputs
    if labels is not None and hasattr(model, "prepare_decoder_input_ids_from_labels"):
        decoded = model.prepare_decoder_input_ids_from_labels(labels=labels)
        found = {"decoder_input_ids": decoded, "decoder_attention_mask": (labels != NO_LABEL).long()}
    elif labels is not None:
        found = {LABELS: labels}
    elif rows.text:
        found = {"decoder_input_ids": inputs["input_ids"]}
        if "attention_mask" in inputs and "decoder_attention_mask" in inspect.signature(model.forward).parameters:
            found["decoder_attention_mask"] = inputs["attention_mask"]
    else:
        raise CalibrationError(
            f"{type(model).__name__} has a decoder, and the rows have {sorted(inputs)} alone; give decoder_input_ids "
            "or labels too."
        )
    return inputs | found


def _refuse_broken(
    run: Callable[..., Any],
    layers: Mapping[str, nn.Module],
    inputs: Mapping[str, Tensor],
    rows: CalibrationRows,
    loss: float | None,
) -> None:
    """Where the loss on the held-out rows is no number, or the model has none, name the first layer that it comes by.

    Raises:
        CalibrationError: inputs that are not finite; a loss that is none.
    """
    if loss is not None and math.isfinite(loss):
        return
    for row in range(rows.count - rows.held_out if rows.held_out else 0, rows.count):
        listen(run, layers, {name: tensor[row : row + 1] for name, tensor in inputs.items()})
    if loss is None:
        return
    raise CalibrationError(
        f"The model's loss on the rows to measure on is {loss}, though the inputs of all layers to round are finite: "
        "its head, or what else comes after them, gives NaN or infinite values, or no row has two tokens that are no "
        "padding. Check the checkpoint, its dtype and the rows."
    )


def _few(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A few rows; those of a decoder are of other lengths than its encoder's, so that what reads which can be told."""
    few = {name: tensor[:LISTENED_ROWS] for name, tensor in inputs.items()}
    decoded, read = few.get("decoder_input_ids"), few.get("input_ids")
    if decoded is not None and read is not None and 1 < decoded.shape[1] == read.shape[1]:
        few |= {name: tensor[:, :-1] for name, tensor in few.items() if name.startswith("decoder_")}
    return few


def _masks(heard: Heard, inputs: Mapping[str, Tensor], few: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """For each layer the mask of the tokens that it reads, by how many of them it read in `few` rows."""
    found = {few[name].shape[1]: inputs[name].bool() for name in reversed(MASKS) if name in inputs}
    return {name: found[length] for name, length in heard.lengths.items() if length in found}


def _round_the_rest(
    layers: Mapping[str, nn.Linear | Conv1D], config: NF4Config, on_layer: OnLayer | None
) -> list[str]:
    """Round to nearest what the rows did not reach; the names."""
    names = [name for name, layer in layers.items() if not isinstance(layer, Linear4bit)]
    for name in names:
        weight = dense_weight(layers[name])
        quantized = become_linear4bit(layers[name], *quantize_weight(weight, config), config.compute_dtype)
        if on_layer is not None:
            on_layer(name, weight, quantized)
    return names


def _nearest_loss(
    model: nn.Module, layers: Mapping[str, Any], nearest: Mapping[str, Packed], rows: CalibrationRows
) -> float | None:
    """The loss with all layers rounded to nearest, which they are for the time of this call."""
    own = {name: (layers[name].weight.data, layers[name].state) for name in nearest}
    try:
        for name, packed in nearest.items():
            set_packed(layers[name], *packed)
        return mean_loss(model, measured_inputs(rows))
    finally:
        for name, packed in own.items():
            set_packed(layers[name], *packed)


def _notes(rows: CalibrationRows, streams: Streams, heard: Heard, uncalibrated: list[str]) -> list[str]:
    notes = list(rows.notes)
    if not rows.held_out:
        notes.append("No rows were held out: the errors are of the rows calibrated on, and say too little.")
    if streams.singular:
        notes.append(
            f"There are more inputs than there are tokens in {counted(len(streams.singular), 'group')} of layers "
            f"({streams.singular[0]}, …): what the tokens say nothing of was left to damping. More rows are better."
        )
    scattered = [name for name in uncalibrated if name in streams.scattered]
    unreached = [name for name in uncalibrated if name not in streams.scattered]
    for names, why in ((scattered, "not seeing the rows in their order"), (unreached, "not reached by the rows")):
        if names:
            notes.append(f"{counted(len(names), 'layer')} rounded to nearest, {why} ({names[0]}, …).")
    if streams.rounder.resumed:
        groups = counted(streams.rounder.resumed, "group")
        notes.append(f"{groups} of layers of an earlier run taken over; the seconds are of this one alone.")
    again = [name for name in streams.rounder.nearest if heard.calls[name] > 1]
    if again:
        layers = f"{counted(len(again), 'layer')} {'is' if len(again) == 1 else 'are'}"
        notes.append(f"{layers} called more than once, and calibrated on the first call ({again[0]}, …).")
    return notes

"""What rows are held to: finite, enough of them, and inputs that the model knows."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_qlora.data.errors import counted
from hf_qlora.data.tokenizer import reads_text, vocabulary_of
from hf_qlora.quant.calibrate.errors import CalibrationError
from hf_qlora.quant.calibrate.loss import base_of
from hf_qlora.quant.calibrate.packing import LEAST_ROWS, LEAST_TOKENS


if TYPE_CHECKING:
    from hf_qlora.quant.calibrate.rows import CalibrationRows


def check(rows: CalibrationRows, model: nn.Module | None) -> None:
    """Raise CalibrationError for rows that cannot be calibrated on, or not with this model."""
    for name, value in rows.inputs.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise CalibrationError(f"{name} has NaN or infinite values; clean the data.")
    if rows.text:
        _check_text(rows)
    found = rows.count - rows.held_out
    if found < LEAST_ROWS or (rows.text and rows.tokens < LEAST_TOKENS):
        tokens = f" with {rows.tokens} tokens that are no padding" if rows.text else ""
        raise CalibrationError(
            f"{counted(found, 'row')}{tokens} to calibrate on, and {rows.held_out} held out, are too few; at least "
            f"{LEAST_ROWS} rows and, of text, {LEAST_TOKENS} tokens are needed. Give more, or hold out fewer."
        )
    if model is not None:
        _check_fits(rows, base_of(model))


def _check_text(rows: CalibrationRows) -> None:
    ids, mask = rows.inputs["input_ids"], rows.inputs.get("attention_mask")
    if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise CalibrationError(
            f"input_ids are of shape {tuple(ids.shape)} and {ids.dtype}; they must be whole numbers, (rows, length)."
        )
    if mask is not None and mask.shape != ids.shape:
        raise CalibrationError(
            f"attention_mask is of shape {tuple(mask.shape)} and input_ids of {tuple(ids.shape)}; give a 2-D mask, "
            "(rows, tokens), with a 1 for each token that is no padding."
        )


def _check_fits(rows: CalibrationRows, base: nn.Module) -> None:
    parameters = inspect.signature(base.forward).parameters
    name = type(base).__name__
    if rows.text and not reads_text(base):
        raise CalibrationError(
            f"{name} reads no input_ids, and the rows are of text; give batches of what it takes: "
            f"{', '.join(list(parameters)[:3])}, …"
        )
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    unknown = [] if open_ended else sorted(rows.inputs.keys() - parameters.keys())
    if unknown:
        raise CalibrationError(f"{name} does not take {unknown}; it takes {', '.join(parameters)}.")
    if not rows.text:
        return
    vocabulary, positions = vocabulary_of(base), positions_of(base)
    for key in (key for key in rows.inputs if key.endswith("input_ids")):
        low, high = int(rows.inputs[key].min()), int(rows.inputs[key].max())
        if low < 0 or high >= vocabulary:
            raise CalibrationError(
                f"{key} has ids from {low} to {high}, and {name} knows 0 to {vocabulary - 1}: the text was tokenized "
                "for another tokenizer. Give texts, or tokenize with the model's own."
            )
    ids, pad = rows.inputs["input_ids"], _of_text(base, "pad_token_id")
    if isinstance(pad, int) and bool((ids == pad).all()):
        raise CalibrationError(
            f"All {counted(len(ids), 'row')} are padding: every token is {pad}, the model's pad_token_id. Give rows "
            "with tokens, and an attention_mask where they are padded."
        )
    width = rows.inputs["input_ids"].shape[1]
    if positions is not None and width > positions:
        raise CalibrationError(f"The rows have {width} tokens and {name} {positions} positions; give shorter rows.")


def positions_of(model: Any) -> int | None:
    """How many tokens a row of a model may have; None where there is no telling."""
    found = _of_text(base_of(model), "max_position_embeddings")
    return found if isinstance(found, int) and found > 0 else None


def _of_text(base: nn.Module, name: str) -> Any:
    """A setting of the model's config, or of the part of it that is of text; None where there is none."""
    config: Any = getattr(base, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(config, name, None)

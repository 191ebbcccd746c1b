"""Batches as a `DataLoader` gives them, as rows: joined along their first dimension.

Where rows of one batch are longer than those of another, the shorter ones are padded on the right with zeros, and the
attention mask says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_qlora.data.errors import short
from hf_qlora.quant.calibrate.errors import CalibrationError


LABELS, NO_LABEL = "labels", -100


def join_batches(batches: Iterable[Any], wanted: int, labels: bool = False) -> tuple[dict[str, Tensor], bool]:
    """The first rows of batches, at most `wanted`, and whether there were more.

    Args:
        labels: keep them: an encoder with a decoder makes out of them what it decodes. Others take a loss alone.

    Raises:
        CalibrationError: no batches; one that is no dict of tensors, or does not go with the one before.
    """
    parts: list[dict[str, Tensor]] = []
    rows, more = 0, False
    for number, batch in enumerate(batches):
        if rows >= wanted:
            more = True
            break
        part = _tensors(batch, number, labels)
        if parts and part.keys() != parts[0].keys():
            raise CalibrationError(f"Batch {number} has {sorted(part)}, and batch 0 {sorted(parts[0])}.")
        parts.append(part)
        rows += len(next(iter(part.values())))
    if not parts:
        raise CalibrationError("There are no batches to calibrate on.")
    joined = {name: _joined(name, [part[name] for part in parts])[:wanted] for name in parts[0]}
    return joined, more or rows > wanted


def _tensors(batch: Any, number: int, labels: bool) -> dict[str, Tensor]:
    if not isinstance(batch, Mapping):
        raise CalibrationError(
            f"Batch {number} is no dict of tensors by the names of the model's inputs, but {type(batch).__name__}. "
            "Give a collator that makes dicts."
        )
    given = {str(name): value for name, value in batch.items() if value is not None and (labels or name != LABELS)}
    found: dict[str, Tensor] = {}
    for name, value in given.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            raise CalibrationError(
                f"Batch {number} has {name}={short(repr(value))}, which is no tensor with rows; leave it out, or make "
                "it one (return_tensors='pt')."
            )
        found[name] = value.detach().cpu()
    sizes = {name: len(value) for name, value in found.items()}
    if not found or len(set(sizes.values())) != 1:
        raise CalibrationError(f"The inputs of batch {number} have not all as many rows: {sizes}.")
    ids = found.get("input_ids")
    if ids is not None and ids.ndim == 2 and "attention_mask" not in found:
        found["attention_mask"] = torch.ones_like(ids)
    return found


def _joined(name: str, parts: list[Tensor]) -> Tensor:
    if len({part.shape[2:] for part in parts}) != 1 or len({part.ndim for part in parts}) != 1:
        raise CalibrationError(
            f"{name} has rows of shapes {sorted({tuple(part.shape[1:]) for part in parts})}, which cannot be joined; "
            "make them alike in all dimensions but the first two."
        )
    if parts[0].ndim == 1 or len({part.shape[1] for part in parts}) == 1:
        return torch.cat(parts)
    if parts[0].ndim == 4:
        raise CalibrationError(
            f"{name} has rows of shapes {sorted({tuple(part.shape[1:]) for part in parts})}; images of several sizes "
            "cannot be padded. Resize them alike."
        )
    length = max(part.shape[1] for part in parts)
    shape = (sum(map(len, parts)), length, *parts[0].shape[2:])
    result = parts[0].new_full(shape, NO_LABEL if name == LABELS else 0)
    first = 0
    for part in parts:
        result[first : first + len(part), : part.shape[1]] = part
        first += len(part)
    return result

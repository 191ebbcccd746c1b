"""What a user gives to calibrate on, as inputs of a model: documents that are cut into rows, or rows as they are."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_qlora.data.chats import is_nothing
from hf_qlora.data.documents import SUFFIXES, Document, document_of, read_documents
from hf_qlora.data.errors import counted, placed, short
from hf_qlora.data.files import MAX_ROWS, drawn, ends_in
from hf_qlora.data.tokenizer import knows_as, tokenizer_of
from hf_qlora.quant.calibrate.batches import join_batches
from hf_qlora.quant.calibrate.checks import positions_of
from hf_qlora.quant.calibrate.errors import CalibrationError
from hf_qlora.quant.calibrate.loss import base_of, is_causal_lm
from hf_qlora.quant.calibrate.packing import (
    LEAST_ROWS,
    LEAST_TOKENS,
    Packed,
    Reader,
    Size,
    in_order,
    is_ids,
    one_a_row,
    pack,
)


logger = logging.getLogger(__name__)

KINDS = (
    "a file, a folder or a data set's id; a list of texts, of rows with columns or of lists of token ids; a tensor of "
    "token ids (rows, length); a datasets.Dataset or a DataFrame; a list of dicts of tensors or a DataLoader"
)

_NONE = object()
READY_SHARE = 4  # of rows that are given ready, one in so many is held out at most
LEAST_DISTINCT = 8  # tokens in a text: transformers makes an empty tokenizer where there is none

# inputs, how many rows are held out; for reports, words for the rows and what else is to be known of them; and whether
# the tokens are of the model's own tokenizer
Read = tuple[dict[str, Tensor], int, str, tuple[str, ...], bool]


def read(data: Any, model: nn.Module | None, tokenizer: Any, size: Size) -> Read:
    """Rows out of whatever was given; see `calibration_rows`."""
    if isinstance(data, Tensor):
        if data.ndim != 2:
            raise CalibrationError(f"A tensor of shape {tuple(data.shape)} was given; token ids are (rows, length).")
        return _ready([{"input_ids": data}], model, size, "a tensor")
    if isinstance(data, Mapping) and _is_batch(data):
        return _ready([data], model, size, "a batch")
    if isinstance(data, str | Path):
        if not str(data).strip():
            raise CalibrationError(f"data={data!r} names no file, folder or data set; give {KINDS}.")
        documents, name = read_documents(str(data), size.seed, answered=False)
        return _of_documents(documents, name, model, tokenizer, size)
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        what = f"a {type(data).__name__} with {', '.join(map(str, data))}" if isinstance(data, Mapping) else repr(data)
        raise CalibrationError(f"{short(what)} cannot be calibrated on; give {KINDS}.")
    if iter(data) is data:
        raise CalibrationError(
            f"A {type(data).__name__} can be gone through once only, and calibration goes on where it was "
            "interrupted; give a list, or what the iterator is made from."
        )
    if hasattr(data, "to_dict") and hasattr(data, "columns"):  # a DataFrame, which would be its columns' names
        data = [{name: _plain(cell) for name, cell in row.items()} for row in data.to_dict("records")]
    first = next(iter(data), _NONE)
    if first is _NONE:
        raise CalibrationError(f"There is nothing to calibrate on: the {type(data).__name__} is empty.")
    if _is_batch(first):
        return _ready(data, model, size, "batches")
    return _of_documents(_documents_in(data, size), _described(data), model, tokenizer, size)


def _plain(cell: Any) -> Any:
    """A cell with lists where pandas has arrays."""
    return cell.tolist() if hasattr(cell, "tolist") else cell


def _is_batch(value: Any) -> bool:
    """Whether it is a dict of tensors with rows; one row alone, as data sets have them, is a document."""
    if not isinstance(value, Mapping):
        return False
    ids = value.get("input_ids")
    tensors = [tensor for tensor in value.values() if isinstance(tensor, Tensor)]
    return bool(tensors) and not (isinstance(ids, Tensor) and ids.ndim == 1)


def _documents_in(data: Iterable[Any], size: Size) -> list[Document]:
    is_dataset = hasattr(data, "shuffle") and hasattr(data, "select")
    found: list[Document] = []
    for number, item in drawn(data, size.seed) if is_dataset else enumerate(data):
        if len(found) == MAX_ROWS:
            logger.info("Of the documents the first %d are read.", MAX_ROWS)
            break
        found.append(_document(number, item))
    said = list(filter(None, found))
    if said and all(isinstance(document, str) and _names_a_file(document) for document in said):
        raise CalibrationError(
            f"The texts are names of files, as {short(repr(said[0]))}, and would be calibrated on as they are; give "
            "one file or a folder of them, or what is in them."
        )
    return found


def _names_a_file(text: str) -> bool:
    return "\n" not in text and ends_in(Path(text), SUFFIXES)


def _document(number: int, item: Any) -> Document:
    if isinstance(item, str | Mapping) or is_nothing(item):
        with placed(f"Element {number}"):
            return document_of(item, answered=False)
    if isinstance(item, Tensor) and item.ndim == 1 and not item.is_floating_point():
        return [int(token) for token in item.tolist()]
    if isinstance(item, Sequence) and all(isinstance(token, int) for token in item):
        return list(item)
    raise CalibrationError(
        f"Element {number} is {short(repr(item))}, no text, no list of token ids and no dict; give {KINDS}."
    )


def _described(data: Any) -> str:
    return f"a {type(data).__name__}" if type(data).__module__.startswith("datasets") else "given documents"


def _of_documents(documents: list[Document], name: str, model: nn.Module | None, tokenizer: Any, size: Size) -> Read:
    positions = None if model is None else positions_of(model)
    if positions is not None and size.length > positions:
        raise CalibrationError(
            f"length={size.length} is more than the model's {positions} positions; give {positions} or less."
        )
    ordered = in_order(documents, size.seed)
    if not ordered:
        raise CalibrationError(f"{name} has no text to read (documents: {len(documents)}, empty).")
    left_out = len(documents) - len(ordered)
    if left_out:
        name += f" ({left_out} of {len(documents)} documents left out, empty or repeated)"
    reader = _reader(ordered, model, tokenizer)
    joined = model is None or is_causal_lm(model)
    packed = (pack if joined else one_a_row)(ordered, reader, size)
    notes: tuple[str, ...] = ()
    if packed.cut:
        notes = (
            "The held-out rows are the end of the longest document, whose rest is calibrated on, and flatter what is "
            f"measured: there are too few documents, or too short ones, in {name} ({len(ordered)}).",
        )
        logger.warning("%s", *notes)
    return *_as_rows(packed, name, reader, model, size), notes, reader.is_own


def _reader(documents: list[Document], model: nn.Module | None, tokenizer: Any) -> Reader:
    texts = not all(map(is_ids, documents))
    own = tokenizer_of(base_of(model)) if texts and model is not None else None
    tokenizer = own if tokenizer is None else tokenizer
    if tokenizer is None and texts:
        raise CalibrationError(
            "The data are texts, and no tokenizer lies with the model; put its files into the model's "
            "folder, or pass tokenizer=, or give token ids."
        )
    eos = getattr(tokenizer, "eos_token_id", None)
    if tokenizer is None:
        eos = getattr(getattr(model, "config", None), "eos_token_id", None)
        eos = eos[0] if isinstance(eos, list | tuple) and eos else eos
    bos = getattr(tokenizer, "bos_token_id", None) if texts else None
    if bos is not None and tokenizer("a")["input_ids"][:1] != [bos]:
        bos = None
    is_own = own is not None and not any(map(is_ids, documents)) and knows_as(own, tokenizer)
    return Reader(tokenizer, eos, bos, texts, is_own)


def _as_rows(packed: Packed, name: str, reader: Reader, model: Any, size: Size) -> tuple[dict[str, Tensor], int, str]:
    every = [*packed.rows, *packed.held_out]
    if len(packed.rows) < LEAST_ROWS:
        raise CalibrationError(
            f"{name} gives {counted(len(packed.rows), 'row')} of {size.length} tokens to calibrate on; at least "
            f"{LEAST_ROWS} rows and {LEAST_TOKENS} tokens are needed. Give more text, or a smaller length."
        )
    longest = max(map(len, every))
    pad = getattr(reader.tokenizer, "pad_token_id", None) or 0
    ids, mask = torch.full((len(every), longest), pad), torch.zeros(len(every), longest, dtype=torch.long)
    for number, row in enumerate(every):
        ids[number, : len(row)], mask[number, : len(row)] = torch.tensor(row), 1
    if reader.of_texts and len(ids[mask.bool()].unique()) < LEAST_DISTINCT:
        raise CalibrationError(
            f"The tokenizer makes nearly the same tokens of everything in {name}: it is probably an empty one, of a "
            "model without files of a tokenizer. Pass tokenizer=, or give other text."
        )
    inputs = {"input_ids": ids, "attention_mask": mask}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        inputs |= {"decoder_input_ids": ids.clone(), "decoder_attention_mask": mask.clone()}
    kept = len(packed.held_out)
    if len(packed.rows) < size.rows or kept < size.held_out:
        logger.warning(
            "%s gives %s to calibrate on and %d to hold out, where %d and %d were asked for.",
            name,
            counted(len(packed.rows), "row"),
            kept,
            size.rows,
            size.held_out,
        )
    held = f", and {kept} held out" if kept else ""
    long = "" if all(len(row) == longest for row in every) else "up to "
    return inputs, kept, f"{len(packed.rows)} rows of {long}{longest} tokens from {name}{held}"


def _ready(batches: Iterable[Any], model: Any, size: Size, name: str) -> Read:
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    joined, more = join_batches(batches, size.rows + size.held_out, labels=bool(is_encoder_decoder))
    inputs = _without_padding_rows(joined)
    count = len(next(iter(inputs.values())))
    for key in ("input_ids", "attention_mask") if "input_ids" in inputs else ():
        if key in inputs and not inputs[key].is_floating_point():
            inputs[key] = inputs[key].long()
    if more:
        logger.info("Of %s the first %d rows are used; rows= takes more.", name, count)
    held_out = min(size.held_out, max(count // READY_SHARE, 1))
    kept = f", the last {held_out} held out" if held_out else ""
    width = f" of {inputs['input_ids'].shape[1]} tokens" if "input_ids" in inputs else ""
    return inputs, held_out, f"{count} rows{width} from {name}{kept}", (), False


def _without_padding_rows(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without rows that are nothing but padding."""
    if "attention_mask" not in inputs:
        return inputs
    full = inputs["attention_mask"].flatten(1).any(1)
    count = len(full)
    if not bool(full.any()):
        raise CalibrationError(
            f"All {count} rows are padding, by their attention_mask; give rows with tokens, or the right mask."
        )
    if not bool(full.all()):
        logger.warning("%d of %d rows are nothing but padding and are left out.", int((~full).sum()), count)
    return {name: value[full] for name, value in inputs.items()}

"""The rows that calibration reads: what a model's forward takes, the last of them held out to measure on.

    rows = calibration_rows("speeches.txt", model)            a file, a folder, or a data set of the Hub
    rows = calibration_rows(["a text", "another"], model)     texts; or token ids, or a datasets.Dataset
    rows = calibration_rows(dataloader, model)                whatever the model takes: images, padded text

Texts are documents, which are split before they are cut into rows (`packing.py`). Rows that are ready, a tensor or
batches, are taken as they come: of these the last ones are held out, and that they share no document with the others
is the caller's affair.

What the rows are is checked here, against the model, before any long work.
"""

from __future__ import annotations

import hashlib
import logging
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from hf_qlora.data.errors import DataError
from hf_qlora.data.tokenizer import as_tokenizer, vocabulary_of
from hf_qlora.quant.calibrate.checks import check
from hf_qlora.quant.calibrate.errors import CalibrationError
from hf_qlora.quant.calibrate.loss import base_of, mean_loss
from hf_qlora.quant.calibrate.packing import Size
from hf_qlora.quant.calibrate.reading import read


logger = logging.getLogger(__name__)

PLAUSIBLE_ROWS = 4
# Nats over ln V that are let pass. An untrained model has half the variance of its logits, 0.1 in SmolLM2's shape. The
# trained one has 0.8 on ids that are all wrong by 5, 1.2 on those of BERT's tokenizer, and 2.9 on random ones.
GUESSING_SLACK = 0.5
NEAR_GUESSING = 0.9


@dataclass(frozen=True)
class CalibrationRows:
    """Rows to calibrate on, and held-out ones.

    Attributes:
        inputs: what the model's forward takes, on the CPU, the first dimension rows; for text `input_ids` and
            `attention_mask`, int64, (rows, length).
        held_out: so many of the rows, the last ones, are kept from calibration, to measure on.
        source: words for reports.
        notes: what else a reader of results on them must know.
        own_tokens: whether they are texts as the model's own tokenizer reads them.

    Raises:
        CalibrationError: not all inputs have as many rows, or all rows are held out.
    """

    inputs: dict[str, Tensor]
    held_out: int
    source: str
    notes: tuple[str, ...] = ()
    own_tokens: bool = False

    def __post_init__(self) -> None:
        sizes = {name: len(value) for name, value in self.inputs.items()}
        if len(set(sizes.values())) != 1:
            raise CalibrationError(f"The inputs have not all as many rows: {sizes}.")
        if not 0 <= self.held_out < self.count:
            raise CalibrationError(
                f"held_out={self.held_out} of {self.count} rows leaves none to calibrate on; hold out fewer, or give "
                "more rows."
            )

    @property
    def count(self) -> int:
        """Of all rows."""
        return len(next(iter(self.inputs.values())))

    @property
    def text(self) -> bool:
        """Whether rows are of token ids."""
        return "input_ids" in self.inputs

    @property
    def calibration(self) -> dict[str, Tensor]:
        """The inputs without the held-out rows."""
        return {name: value[: self.count - self.held_out] for name, value in self.inputs.items()}

    @property
    def measured(self) -> dict[str, Tensor]:
        """The inputs of the held-out rows."""
        return {name: value[self.count - self.held_out :] for name, value in self.inputs.items()}

    @property
    def tokens(self) -> int:
        """Those to calibrate on that are no padding; 0 where rows are not of text."""
        if not self.text:
            return 0
        given = self.calibration
        return int(given["attention_mask"].sum() if "attention_mask" in given else given["input_ids"].numel())

    @cached_property
    def fingerprint(self) -> str:
        """A sha256 of the inputs and of which are held out."""
        digest = hashlib.sha256(str(self.held_out).encode())
        for name, value in sorted(self.inputs.items()):
            digest.update(f" {name} {value.dtype} {tuple(value.shape)} ".encode())
            digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def calibration_rows(
    data: Any,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    *,
    rows: int = 64,
    length: int = 256,
    held_out: int = 8,
    seed: int = 0,
) -> CalibrationRows:
    """Rows for calibrating a model.

    Args:
        data: a .txt, .jsonl, .json, .csv or .parquet file, a folder of them, or a data set's id on the Hub,
            as `me/data` or `me/data:split`, a column named behind it as `rows.jsonl#body`; a list of texts, of rows
            with columns or of lists of token ids; a `datasets.Dataset` or a DataFrame; a tensor of token ids, (rows,
            length); an iterable of dicts of tensors that can be gone through again; or `CalibrationRows`, which are
            checked and returned.
        model: to check the rows against; it also says which tokenizer it is, and whether documents are joined.
        tokenizer: for texts, or the folder or Hub id that it lies in; by default the one that lies with the model.
        rows: at most so many to calibrate on.
        length: of a row in tokens, where it is cut out of documents; at most, where a document is a row.
        held_out: at most so many more rows, to measure on; of rows that are given ready a quarter at most.
        seed: of the documents that are held out, and of rows where there are more than wanted.

    Raises:
        CalibrationError: data that cannot be read, or do not fit the model; too few of them: fewer than 2 rows or 128
            tokens to calibrate on.
    """
    size = Size(rows, length, held_out, seed)
    if isinstance(data, CalibrationRows):
        check(data, model)
        return data
    try:
        found = CalibrationRows(*read(data, model, as_tokenizer(tokenizer), size))
    except DataError as error:
        raise CalibrationError(str(error)) from error
    check(found, model)
    return found


def plausible(model: nn.Module, rows: CalibrationRows, force: bool = False) -> float | None:
    """The loss of a causal language model on a few rows, held-out ones if there are some; None for other models.

    Token ids of which the model knows less than one that guesses are another tokenizer's. Those that its own tokenizer
    made are not: a model that is hardly trained, or cut, is warned of alone. What makes a loss NaN is named where the
    layers are known (`run.py`).

    Args:
        force: warn alone.

    Raises:
        CalibrationError: ids that are another tokenizer's.
    """
    inputs = rows.measured if rows.held_out else rows.calibration
    loss = mean_loss(model, {name: value[:PLAUSIBLE_ROWS] for name, value in inputs.items()})
    if loss is None or not math.isfinite(loss):
        return loss
    guessing = math.log(vocabulary_of(base_of(model)))
    which = "held-out rows" if rows.held_out else "some rows"
    said = f"{loss:.2f} nats a token on {which}, where guessing among its tokens has {guessing:.2f}"
    if loss > guessing + GUESSING_SLACK and not (rows.own_tokens or force):
        raise CalibrationError(
            f"The model has a loss of {said}: the ids are probably another tokenizer's ({rows.source}). Give text as "
            "the model's own tokenizer reads it; texts without tokenizer= are read so. If the ids are right, and the "
            "model is hardly trained, force calibrates all the same: Calibration(rows, force=True), or --force."
        )
    if loss > NEAR_GUESSING * guessing:
        why = "it is hardly trained on such text, or broken."
        if not rows.own_tokens:
            why = "is the text tokenized by its own tokenizer?"
        logger.warning("The model has a loss of %s: %s", said, why)
    return loss

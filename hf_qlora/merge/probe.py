"""The logits of a merged model against those of the model that was trained, on text.

For every position, KL(p ‖ q) in nats between the distributions of the unmerged model, p, and of the merged one, q;
beside it that of the unmerged model with the adapter switched off. The share that is kept is 1 − KL / KL without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_qlora.data.tokenizer import reads_text, tokenizer_of, vocabulary_of
from hf_qlora.layers.errors import MergeError
from hf_qlora.merge.names import first_sentence
from hf_qlora.quant.calibrate.loss import measuring


RANDOM_ROWS, RANDOM_LENGTH = 4, 64
LONGEST_ROW = 512
LEAST_TOKENS = 16  # distinct ones, in each paragraph: transformers makes an empty tokenizer where there is none
# Lewis Carroll, Alice's Adventures in Wonderland (1865), and Charles Darwin, On the Origin of Species (1859).
DEFAULT_TEXTS = (
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or "
    "twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it, “and "
    "what is the use of a book,” thought Alice, “without pictures or conversations?”",
    "There is grandeur in this view of life, with its several powers, having been originally breathed into a few "
    "forms or into one; and that, whilst this planet has gone cycling on according to the fixed law of gravity, from "
    "so simple a beginning endless forms most beautiful and most wonderful have been, and are being, evolved.",
)

Texts = str | Sequence[str] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Divergence:
    """Mean KL to the unmerged model, in nats a position.

    Attributes:
        merged: of the merged model.
        without: of the unmerged model with the adapter switched off.
        positions: how many.
    """

    merged: float
    without: float
    positions: int


def rows(model: nn.Module, texts: Texts | None, tokenizer: Any) -> tuple[list[Tensor], str]:
    """Token ids, (1, tokens) each, and what they are; no rows for a model that reads no text.

    Raises:
        MergeError: texts that are no strings or token ids of the model, or strings and no tokenizer; a tokenizer that
            is none.
    """
    if not reads_text(model):
        if texts is not None:
            raise MergeError(f"texts were given, but {type(model).__name__} reads no token ids; leave them out.")
        return [], "not measured: the model reads no text"
    if tokenizer is not None and not callable(tokenizer):
        raise MergeError(f"tokenizer={tokenizer!r} is none; pass what AutoTokenizer.from_pretrained(...) returns.")
    vocabulary, reader = vocabulary_of(model), tokenizer or tokenizer_of(model)
    if texts is not None:
        texts = [texts] if isinstance(texts, str) else texts
        if not len(texts):
            raise MergeError("texts is empty; give strings or lists of token ids, or None for a built-in text.")
        return [_ids(text, reader, vocabulary) for text in texts], f"{len(texts)} given text{'s' * (len(texts) != 1)}"
    if reader is not None:
        try:
            found = [_ids(text, reader, vocabulary) for text in DEFAULT_TEXTS]
        except MergeError:
            found = []
        if found and all(len(row.unique()) >= LEAST_TOKENS for row in found):
            return found, "two paragraphs of English prose"
    ids = torch.randint(vocabulary, (RANDOM_ROWS, RANDOM_LENGTH), generator=torch.Generator().manual_seed(0))
    return list(ids.split(1)), f"{RANDOM_ROWS} rows of random tokens, because the base has no tokenizer"


def readable(model: nn.Module, ids: list[Tensor], text: str) -> tuple[list[Tensor], str]:
    """Built-in rows and what they are; no rows for a model that wants more than token ids, as images, or others."""
    try:
        with measuring(model):
            _log_probabilities(model, max(ids, key=Tensor.numel))  # its positions may be too many, a shorter row's not
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model raises at what it is not made for
        return [], f"not measured: the model does not read {text} ({first_sentence(error)})"
    return ids, text


def divergence(trained: Any, merged: nn.Module, ids: list[Tensor]) -> Divergence:
    """Compare a PEFT model with what it was merged into, row by row."""
    sums, positions = torch.zeros(2, dtype=torch.float64), 0
    with measuring(trained, merged):
        for row in ids:
            expected = _log_probabilities(trained, row)
            with trained.disable_adapter():
                plain = _log_probabilities(trained, row)
            for i, found in enumerate((_log_probabilities(merged, row), plain)):
                sums[i] += (expected.exp() * (expected - found)).sum(dtype=torch.float64).cpu()
            positions += len(expected)
    kl_merged, kl_without = (max(float(total) / positions, 0.0) for total in sums)
    return Divergence(kl_merged, kl_without, positions)


def _log_probabilities(model: Any, ids: Tensor) -> Tensor:
    """(positions, classes), float32."""
    ids = ids.to(next(model.parameters()).device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    output = model(**inputs)
    logits = output.logits if hasattr(output, "logits") else output[0]
    return logits.flatten(0, -2).float().log_softmax(-1)  # type: ignore[no-any-return]


def _ids(text: str | Sequence[int], tokenizer: Any, vocabulary: int) -> Tensor:
    if isinstance(text, str):
        if tokenizer is None:
            raise MergeError("texts has strings, and no tokenizer was found beside the base; pass tokenizer=.")
        text = tokenizer(text)["input_ids"]
    try:
        row = torch.tensor([list(text)[:LONGEST_ROW]], dtype=torch.long)
    except (TypeError, ValueError) as error:
        raise MergeError(f"texts must hold strings or lists of token ids, not {text!r}.") from error
    if not row.numel() or int(row.min()) < 0 or int(row.max()) >= vocabulary:
        raise MergeError(f"texts: a row has no tokens, or ids outside 0 to {vocabulary - 1}, the model's vocabulary.")
    return row

"""Documents cut into rows of token ids, and which of them are held out.

Documents are put into an order by the seed, each once. The first ones are held out, the next ones are calibrated on:
no document is in both. Where that would leave too little to calibrate on, longer documents are passed over for the
held-out part; where it would leave no row held out, as with a single document, the longest one is cut and its end held
out.

A part is one stream, each document ended by EOS, cut into rows without padding; a row begins with BOS where the
tokenizer puts one before a text, as it is what the model's first position always sees. What is left over at the end is
dropped. Of more rows than wanted as many are drawn by the seed, so that a long document gives rows of all of it.

Models that are not causal (BERT, T5) get one document a row, cut and padded as their tokenizer does it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from hf_qlora.data.chats import render
from hf_qlora.data.documents import Document
from hf_qlora.quant.calibrate.errors import CalibrationError


LEAST_ROWS = 2  # to calibrate on
LEAST_TOKENS = 128
LEAST_LENGTH = 8
LONGEST_TEXT = 4_000_000  # characters of one document: a million tokens, in seconds


@dataclass(frozen=True)
class Size:
    """What is wanted: so many rows of so many tokens, others held out, and the seed that draws them.

    Raises:
        CalibrationError: no such number of rows, or tokens.
    """

    rows: int
    length: int
    held_out: int
    seed: int

    def __post_init__(self) -> None:
        least = {"rows": LEAST_ROWS, "length": LEAST_LENGTH, "held_out": 0, "seed": 0}
        for name, lowest in least.items():
            value = getattr(self, name)
            if type(value) is not int or value < lowest:
                raise CalibrationError(f"{name}={value!r} must be a whole number of at least {lowest}.")

    def share(self, count: int) -> int:
        """What is to be held out of so many, where they are fewer than wanted."""
        return count * self.held_out // (self.rows + self.held_out)


@dataclass(frozen=True)
class Packed:
    """Rows to calibrate on and held-out ones, as token ids; `cut`: whether these are the end of a document."""

    rows: list[list[int]]
    held_out: list[list[int]]
    cut: bool = False


class Reader:
    """Documents as token ids.

    Args:
        tokenizer: None if all documents are token ids.
        eos, bos: ids that end a document and begin a row; None for none.
        of_texts: whether any document is a text or a chat.
        is_own: whether all are, and the tokenizer is the model's.
    """

    def __init__(self, tokenizer: Any, eos: int | None, bos: int | None, of_texts: bool, is_own: bool = False) -> None:
        self.tokenizer, self.eos, self.bos, self.of_texts, self.is_own = tokenizer, eos, bos, of_texts, is_own

    def stream(self, document: Document) -> list[int]:
        """A document's ids, ended by EOS; a chat's template ends it, with a newline behind that."""
        ids = self._plain(document)
        return ids if self.eos is None or not ids or self.eos in ids[-2:] else [*ids, self.eos]

    def row(self, document: Document, length: int) -> list[int]:
        """A document's first ids, with the special tokens that the tokenizer adds."""
        if self.tokenizer is None or is_ids(document):
            return self._plain(document)[:length]
        text = self._text(document)
        ids: list[int] = self.tokenizer(text, truncation=True, max_length=length)["input_ids"]
        return ids

    def _plain(self, document: Document) -> list[int]:
        if is_ids(document):
            return list(document)  # type: ignore[arg-type]
        found: list[int] = self.tokenizer(self._text(document), add_special_tokens=False, verbose=False)["input_ids"]
        return found

    def _text(self, document: Document) -> str:
        if self.tokenizer is None:
            raise CalibrationError("There are texts and no tokenizer was found beside the model; pass tokenizer=.")
        text = document if isinstance(document, str) else render(self.tokenizer, document)  # type: ignore[arg-type]
        return text[:LONGEST_TEXT]


def in_order(documents: Sequence[Document], seed: int) -> list[Document]:
    """Each document once, without empty ones, in the seed's order."""
    found = {repr(document): document for document in documents if not _is_empty(document)}
    result = list(found.values())
    random.Random(seed).shuffle(result)
    return result


def pack(documents: Sequence[Document], reader: Reader, size: Size) -> Packed:
    """Documents as full rows, for a causal model."""
    pool = _enough((reader.stream(document) for document in documents), size)
    held_out, rest = _held_out(pool, size)
    if size.held_out and len(_cut(held_out, reader.bos, size.length)) == 0:
        return _from_the_end(pool, reader, size)
    return Packed(
        _drawn(_cut(rest, reader.bos, size.length), size.rows, size.seed),
        _drawn(_cut(held_out, reader.bos, size.length), size.held_out, size.seed),
    )


def one_a_row(documents: Sequence[Document], reader: Reader, size: Size) -> Packed:
    """Documents as rows of their own, of at most `size.length`, not padded yet."""
    wanted = size.rows + size.held_out
    rows = list(islice(filter(None, (reader.row(document, size.length) for document in documents)), wanted))
    count = size.held_out if len(rows) >= wanted else max(min(size.held_out, 1), size.share(len(rows)))
    return Packed(rows[count:], rows[:count])


def _enough(streams: Iterable[list[int]], size: Size) -> list[list[int]]:
    """The first documents that have all tokens that are wanted, whichever of them is held out."""
    wanted = (size.rows + size.held_out) * size.length
    pool, total, longest = list[list[int]](), 0, 0
    for ids in streams:
        pool.append(ids)
        total += min(len(ids), wanted)
        longest = max(longest, min(len(ids), wanted))
        if total >= wanted + longest:
            break
    return pool


def _held_out(pool: list[list[int]], size: Size) -> tuple[list[list[int]], list[list[int]]]:
    """Documents to hold out, the first that leave enough, and the others."""
    total = left = sum(map(len, pool))
    missing = min(size.held_out * size.length, max(size.share(total), size.length)) if size.held_out else 0
    least = min(size.rows * size.length, total // 2)
    held_out, rest = list[list[int]](), list[list[int]]()
    for ids in pool:
        if missing > 0 and left - len(ids) >= least:
            held_out.append(ids)
            missing -= len(ids)
            left -= len(ids)
        else:
            rest.append(ids)
    return held_out, rest


def _from_the_end(pool: list[list[int]], reader: Reader, size: Size) -> Packed:
    """All documents calibrated on, but for the end of the longest."""
    longest = max(pool, key=len, default=[])
    count = max(1, min(size.held_out, size.share(len(longest) // size.length)))
    at = max(0, len(longest) - count * size.length)
    rest = [ids for ids in pool if ids is not longest] + [longest[:at]]
    return Packed(
        _drawn(_cut(rest, reader.bos, size.length), size.rows, size.seed),
        _cut([longest[at:]], reader.bos, size.length)[:count],
        cut=True,
    )


def _cut(documents: Iterable[list[int]], bos: int | None, length: int) -> list[list[int]]:
    """Documents, one behind the other, as rows of `length`."""
    stream = [token for ids in documents for token in ids]
    rows, first = [], 0
    while first < len(stream):
        head = [] if bos is None or stream[first] == bos else [bos]
        row = head + stream[first : first + length - len(head)]
        first += length - len(head)
        if len(row) == length:
            rows.append(row)
    return rows


def _drawn(rows: list[list[int]], count: int, seed: int) -> list[list[int]]:
    """At most `count` of the rows, drawn from all of them, in their order."""
    if len(rows) <= count:
        return rows
    return [rows[number] for number in sorted(random.Random(seed).sample(range(len(rows)), count))]


def is_ids(document: Document) -> bool:
    """Whether a document is token ids already."""
    return isinstance(document, list) and bool(document) and isinstance(document[0], int)


def _is_empty(document: Document) -> bool:
    return not document.strip() if isinstance(document, str) else not document

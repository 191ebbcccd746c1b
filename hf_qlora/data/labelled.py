"""Texts with a class: from rows of files and of the Hub, and parts of them to train, decide and test on.

A text is taken once, with its first class, so that parts have no text in common.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_qlora.data.documents import is_path
from hf_qlora.data.errors import DataError, short
from hf_qlora.data.files import ROWS, ends_in, files_in, placed_hub_rows, placed_rows


FEWEST = 10  # texts of a class: some of them in each part


@dataclass(frozen=True)
class Labelled:
    """Texts with the numbers of their classes, and the classes' names.

    Attributes:
        rows: (text, class), shuffled.
    """

    rows: list[tuple[str, int]]
    names: list[str]


def rows_in(source: str, seed: int = 0) -> list[Any]:
    """The rows of a file of JSON, CSV or Parquet, of a folder with some, or of the Hub's data set ("train").

    Args:
        seed: of the rows that are drawn from a data set on the Hub.

    Raises:
        DataError: nothing of that name, no rows in it, or a file that is not read.
    """
    return [row for _, row in placed_rows_in(source, seed)]


def placed_rows_in(source: str, seed: int = 0) -> list[tuple[str, Any]]:
    """The same, each behind its place in words.

    Raises:
        DataError: see `rows_in`.
    """
    path = Path(source)
    if path.exists():
        if ends_in(path, (".txt",)):
            raise DataError(f"{path} is a text, and rows with columns are needed: {', '.join(ROWS)}.")
        files = files_in(path, ROWS) if path.is_dir() else [path]
        return [(f"{file}, {place}", row) for file in files for place, row in placed_rows(file)]
    if is_path(source):
        raise DataError(f"The file {source} is not there.")
    return [(f"{source}, {place}", row) for place, row in placed_hub_rows(source, "train", seed)]


def labelled(
    rows: Iterable[Any], text: str = "text", label: str = "label", limit: int | None = None, seed: int = 0
) -> Labelled:
    """What is learned from rows with a text and a class, which is a word or a whole number.

    Args:
        text, label: names of the columns.
        limit: use at most so many texts, drawn by the seed.

    Raises:
        DataError: a row without the columns or with other values, one class only, a class of fewer than 10 texts, or
            two that are a number and the same as a word.
    """
    by_text: dict[str, str | int] = {}
    for number, row in enumerate(rows, 1):
        key, value = _cell(row, number, text), _cell(row, number, label)
        value = int(value) if isinstance(value, float) and value.is_integer() else value  # as pandas writes classes
        if not isinstance(key, str) or not isinstance(value, str | int):
            raise DataError(f"Row {number} is no text with a class (a word or a whole number): {short(repr(row))}")
        by_text.setdefault(key, value)
    found = list(by_text.items())
    random.Random(seed).shuffle(found)
    found = found[:limit]
    counts = Counter(value for _, value in found)
    if len(counts) < 2:
        raise DataError(
            f"The {len(found)} texts have one class, {next(iter(counts))!r}: there is nothing to tell apart."
            if counts
            else "There are no texts to learn from."
        )
    rarest, count = counts.most_common()[-1]
    if count < FEWEST:
        raise DataError(f"Class {rarest!r} has {count} texts; each needs {FEWEST}, to have some to train and test on.")
    classes = sorted(counts, key=_in_order)
    names = [str(value) for value in classes]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DataError(f"{twice} is a class as a number in some rows, and as a word in others; write it in one way.")
    return Labelled([(key, classes.index(value)) for key, value in found], names)


def _in_order(value: str | int) -> tuple[bool, int, str]:
    """Numbers first, those that are written as words too, then other words."""
    number = isinstance(value, int) or value.isdecimal()
    return not number, int(value) if number else 0, str(value)


def _cell(row: Any, number: int, column: str) -> Any:
    if not isinstance(row, Mapping):
        raise DataError(f"Row {number} must be a JSON object, with a column for each value, but is {short(repr(row))}")
    if row.get(column) is None:
        raise DataError(
            f"Row {number} has nothing in the column {column!r}; its columns are {', '.join(map(str, row))}."
        )
    return row[column]

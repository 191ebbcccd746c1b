"""Documents: texts, chats, or token ids, out of rows, files, folders and data sets of the Hub.

A source is named by one string: `speeches.txt`, a folder, `chats.jsonl`, `me/data`, `me/data:validation`, and, of a
data set with several configs, `me/data/en:validation`. A column is named behind it, `rows.jsonl#body`; without one it
is `text`, or a chat in one of the usual layouts. A .txt file is one document, each row of anything else is one; where
it has nothing, as an empty cell of CSV, it is an empty one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hf_qlora.data.chats import UNDERSTOOD, Messages, as_messages, has_chat, is_nothing
from hf_qlora.data.errors import DataError, placed, short
from hf_qlora.data.files import ROWS, ends_in, files_in, placed_hub_rows, placed_rows, read_text


SUFFIXES = (".txt", *ROWS)
AS_TEXT = "give a list of texts, or write it into a .txt file"
COLUMNS = f"text; {UNDERSTOOD}; or input_ids"
LONGEST_NAME = 300

Document = str | Messages | list[int]


def read_documents(source: str, seed: int = 0, answered: bool = True) -> tuple[list[Document], str]:
    """The documents of a source, and its name without the folders on this machine.

    Args:
        seed: of the rows that are drawn from a data set on the Hub.
        answered: whether chats must end with the assistant's answer.

    Raises:
        DataError: nothing of that name, no documents in it, a file that is not read, or a column that is not there.
    """
    path, column = Path(source), None
    if "\n" in source or len(source) > LONGEST_NAME:
        raise _is_text(source)
    if not path.exists() and "#" in source:
        name, _, column = source.rpartition("#")
        source, path = name, Path(name)
    read = partial(_placed, column=column, answered=answered)
    if path.is_file():
        found = _of_file(path, read)
    elif path.is_dir():
        found = [document for file in files_in(path, SUFFIXES) for document in _of_file(file, read)]
    elif is_path(source):
        raise DataError(f"The file {source} is not there.")
    elif len(source.split()) > 1:
        raise _is_text(source)
    else:
        return _of_hub(source, seed, read), source
    return found, path.absolute().name


def document_of(row: Any, column: str | None = None, source: str | None = None, answered: bool = True) -> Document:
    """A row as a document: the first of the columns that are understood and have something.

    Args:
        column: what is read of it.
        source: its name, behind which a column could be named.
        answered: as for `read_documents`.

    Raises:
        DataError: columns that are not understood, or not of text.
    """
    if isinstance(row, str) or is_nothing(row):
        return row if isinstance(row, str) else ""
    if not isinstance(row, Mapping):
        raise DataError(f"A row is neither a text nor an object with columns, but {short(repr(row))}")
    if column is not None and column not in row:
        raise DataError(f"There is no column {column!r}; found are {', '.join(map(str, row)) or 'none'}.")
    for name in ("text", "input_ids") if column is None else (column,):
        if not is_nothing(row.get(name)):
            masked = name == "input_ids" and not is_nothing(row.get("attention_mask"))
            return _unpadded(row[name], row["attention_mask"]) if masked else _value(name, row[name], answered)
    if column is not None or (row.keys() & {"text", "input_ids"} and not has_chat(row)):
        return ""
    other = "" if source is None else f"; or name another, as {source}#{next(iter(row), 'body')}"
    return as_messages(row, COLUMNS + other, answered)


def _value(name: str, value: Any, answered: bool = True) -> Document:
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and value and isinstance(value[0], Mapping):
        return as_messages({"messages": list(value)}, answered=answered)
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, bytes) and all(type(token) is int for token in value):
        return list(value)
    raise DataError(f"The column {name!r} has no text, chat or token ids, but {short(repr(value))}")


def _unpadded(given: Any, mask: Any) -> list[int]:
    """The token ids that their mask says are text."""
    ids: Any = _value("input_ids", given)
    told = mask.tolist() if hasattr(mask, "tolist") else mask
    fits = isinstance(told, Sequence) and len(told) == len(ids) and all(one in (0, 1) for one in told)
    if not fits:
        raise DataError(f"The column 'attention_mask' has not a 0 or 1 for each of input_ids, but {short(repr(told))}")
    return [token for token, is_text in zip(ids, told, strict=True) if is_text]


def _of_file(file: Path, read: Callable[..., Document]) -> list[Document]:
    if ends_in(file, (".txt",)):
        return [read_text(file)]
    if not ends_in(file, SUFFIXES):
        raise DataError(f"{file} is not read; name a file that ends in {', '.join(SUFFIXES)}, or a folder of them.")
    return [read(row, place=f"{file}, {place}", source=str(file)) for place, row in placed_rows(file)]


def _of_hub(source: str, seed: int, read: Callable[..., Document]) -> list[Document]:
    name, _, split = source.partition(":")
    try:
        rows = placed_hub_rows(name, split or "train", seed, SUFFIXES)
    except DataError as error:
        if "/" in name:
            raise
        raise DataError(f"{source!r} is no file here; if it is meant as a text, {AS_TEXT}. {error}") from error
    return [read(row, place=f"{source}, {place}", source=source) for place, row in rows]


def _placed(row: Any, place: str, **options: Any) -> Document:
    with placed(place):
        return document_of(row, **options)


def _is_text(source: str) -> DataError:
    return DataError(f"{short(source)!r} is a text and no name of a file or data set; {AS_TEXT}.")


def is_path(source: str) -> bool:
    """Whether it cannot be the name of a data set on the Hub, with the config that is named behind some."""
    local = source.startswith((".", "~", os.sep)) or "\\" in source or source.count("/") > 2
    return local or ends_in(Path(source), SUFFIXES)

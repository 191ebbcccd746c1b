"""Rows of files, and of data sets that the `datasets` package finds."""

from __future__ import annotations

import hashlib
import importlib
import json
import random
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_qlora.data.errors import DataError, first_line, offline, short
from hf_qlora.data.tables import csv_rows, parquet_rows


ROWS = (".jsonl", ".json", ".csv", ".parquet")  # files of rows end so
MAX_ROWS = 20_000  # of a data set on the Hub
SAVED = "what save_to_disk writes; in Python, give what datasets.load_from_disk returns"
NO_DATA = {  # by files in a folder: what that is
    ("config.json",): "a model's, and not of data",
    ("adapter_config.json",): "an adapter's, and not of data",
    ("dataset_dict.json",): f"{SAVED}, one part of it",
    ("state.json", "dataset_info.json"): SAVED,
}


def read_text(file: Path, newline: str | None = None) -> str:
    """A file's text, without the mark (BOM) that Windows' editors begin files in UTF-8 with.

    Args:
        newline: as for `open`: "" leaves the line ends as they are.

    Raises:
        DataError: it is not UTF-8, or not to be read.
    """
    try:
        with file.open(encoding="utf-8-sig", newline=newline) as opened:
            return opened.read()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as text in UTF-8: {first_line(error)}") from error


def ends_in(file: Path, suffixes: tuple[str, ...]) -> bool:
    """Whether a file's name ends so, in small letters or capitals."""
    return file.suffix.lower() in suffixes


def files_in(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files in a folder of data whose names end so, in the order of their names.

    Raises:
        DataError: there are none, or it is not of data but a model's, or one that `datasets` saved.
    """
    for names, what in NO_DATA.items():
        if all((folder / name).is_file() for name in names):
            raise DataError(f"The folder {folder} is {what} (by {' and '.join(names)}).")
    files = sorted(file for file in folder.iterdir() if ends_in(file, suffixes) and file.is_file())
    if not files:
        inner = sorted({file.parent.name for file in folder.glob("*/*") if ends_in(file, suffixes) and file.is_file()})
        there = f" Those in its folder {inner[0]} are not read: name that." if inner else ""
        raise DataError(f"The folder {folder} has no files that end in {', '.join(suffixes)}.{there}")
    return files


def placed_rows(file: Path) -> list[tuple[str, Any]]:
    """The rows of a file, of CSV and Parquet by its ending, else of JSON; each behind its place in words.

    JSON is one list, or an object or a string on each line; empty lines are none.

    Raises:
        DataError: it cannot be read so; with the place.
    """
    if ends_in(file, (".parquet",)):
        return list(parquet_rows(file))
    if ends_in(file, (".csv",)):
        return list(csv_rows(file, read_text(file, newline="")))
    text = read_text(file)
    if text.lstrip()[:1] != "[":
        return [(f"line {number}", row) for number, row in _lines(file, text)]
    return [(f"element {number}", row) for number, row in enumerate(_list(file, text), start=1)]


def _lines(file: Path, text: str) -> Iterator[tuple[int, Any]]:
    # Not `splitlines`, which ends lines at U+2028, U+0085 and others too: they may stand in a JSON string as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # no JSON, or past the parser's limits
                raise DataError(f"{file}, line {number} is not JSON{_why(error)}") from error
            if not isinstance(row, dict | str | None):
                raise DataError(f"{file}, line {number} is no JSON object or string, but {short(line)}")
            yield number, row


def _list(file: Path, text: str) -> list[Any]:
    try:
        found: list[Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            raise DataError(
                f"{file} begins with a JSON list, and line {error.lineno} has more behind it; write one list, or one "
                "object on each line."
            ) from error
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{file}{line} is not JSON{_why(error)}") from error
    return found


def rows_sha256(rows: Any) -> str:
    """Of rows as they were read, of JSON's types: by it a run that goes on knows its data."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def _why(error: Exception) -> str:
    return f": {error.msg}." if isinstance(error, json.JSONDecodeError) else f" that can be read: {error}."


def _with_config(name: str) -> list[str]:
    """`owner/name/config` as what `load_dataset` takes, the name and the config, if there is one."""
    parts = name.split("/")
    return ["/".join(parts[:2]), *parts[2:]]


def placed_hub_rows(
    name: str, split: str, seed: int, suffixes: tuple[str, ...] = ROWS, limit: int = MAX_ROWS
) -> list[tuple[str, Mapping[str, Any]]]:
    """At most `limit` rows, drawn by the seed, of what `datasets.load_dataset` finds, each behind its place in words.

    Args:
        name: `owner/name`, or `owner/name/config` of a data set that has several.
        suffixes: of the files that `name` might have been instead, for the message.

    Raises:
        DataError: no `datasets` package; nothing of that name, or not to be had.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        read = f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"
        raise DataError(
            f"{name!r} is neither a {read} file nor a folder with some. For data sets of the Hub: pip install datasets"
        ) from error
    try:
        rows = datasets.load_dataset(*_with_config(name), split=split)
    # of files that do not fit together; of a data set that is a script, which is not run
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        why = ": ".join(first_line(part) for part in (error, error.__cause__) if isinstance(part, Exception))
        configs = re.search(r"available configs: (\[.*\])", str(error))
        if configs:
            why += f" Name one behind it, as {name}/CONFIG; there are {configs[1]}."
        raise DataError(f"Cannot load the data set {name!r}: {why}{offline()}") from error
    return [(f"row {number} (from 0)", row) for number, row in drawn(rows, seed, limit)]


def drawn(rows: Any, seed: int, limit: int = MAX_ROWS) -> list[tuple[int, Mapping[str, Any]]]:
    """At most `limit` rows of a `datasets.Dataset`, drawn by the seed, each behind its number."""
    numbers = random.Random(seed).sample(range(len(rows)), min(len(rows), limit))
    return list(zip(numbers, rows.select(numbers), strict=True))

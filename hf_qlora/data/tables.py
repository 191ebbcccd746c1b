"""Rows of tables: CSV with a line of names, and Parquet."""

from __future__ import annotations

import csv
import importlib
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

from hf_qlora.data.errors import DataError, counted, first_line, short


LONGEST_CELL = 2**31 - 1  # characters; by default Python reads 131,072, which documents exceed
OTHER_SEPARATORS = {";": "semicolons", "\t": "tabs"}
_limit_lock = Lock()  # the limit is the process's


def csv_rows(file: Path, text: str) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a CSV file, each behind the line that it ends on; cells are text, empty ones None.

    A first column without a name is left out: the numbers that pandas writes there.

    Args:
        text: what is in it, with its line ends as they are.

    Raises:
        DataError: no names, one twice, a row with another number of cells, or an open quotation.
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    with _long_cells(), _named(file, reader):
        names = next(filter(None, reader), [])
        _check_separator(file, names)
        _check_names(file, names[1:] if names[:1] == [""] else names)
        return [(f"line {reader.line_num}", _row(file, reader.line_num, names, cells)) for cells in reader if cells]


def _check_separator(file: Path, names: Sequence[str]) -> None:
    found = [word for separator, word in OTHER_SEPARATORS.items() if len(names) == 1 and separator in names[0]]
    if found:
        raise DataError(f"{file} has {found[0]} between its cells; write it with commas.")


def _check_names(file: Path, names: Sequence[str]) -> None:
    if not names or not all(names) or max(Counter(names).values()) > 1:
        raise DataError(f"{file} must name each of its columns once, and names {short(', '.join(names))}")


def _row(file: Path, line: int, names: list[str], cells: list[str]) -> dict[str, Any]:
    if len(cells) != len(names):
        raise DataError(f"{file}, line {line} has {counted(len(cells), 'cell')}, and there are names of {len(names)}.")
    return {name: cell or None for name, cell in zip(names, cells, strict=True) if name}


@contextmanager
def _long_cells() -> Iterator[None]:
    with _limit_lock:
        before = csv.field_size_limit(LONGEST_CELL)
        try:
            yield
        finally:
            csv.field_size_limit(before)


@contextmanager
def _named(file: Path, reader: Any) -> Iterator[None]:
    try:
        yield
    except csv.Error as error:
        raise DataError(f"{file}, line {reader.line_num} is not CSV: {error}.") from error


def parquet_rows(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a Parquet file, each behind its number.

    Raises:
        DataError: no `pyarrow` package, it cannot read the file, or a column is there twice.
    """
    try:
        arrow = importlib.import_module("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataError(f"{file}: to read Parquet, pip install pyarrow") from error
    try:
        with parquet.ParquetFile(file) as opened:
            names, rows = opened.schema_arrow.names, opened.read().to_pylist()
    except (OSError, ValueError, OverflowError, arrow.ArrowException) as error:  # of values that Python has not, too
        raise DataError(f"{file} cannot be read as Parquet: {first_line(error)}") from error
    _check_names(file, names)
    return [(f"row {number}", row) for number, row in enumerate(rows, start=1)]

"""Rows of tables: CSV with a line of names, and Parquet."""

from __future__ import annotations

import csv
import importlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_qlora.data.errors import DataError, first_line


LONGEST_CELL = 2**31 - 1  # characters; by default Python reads 131,072, which documents exceed


def csv_rows(file: Path, text: str) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a CSV file, each behind the line that it ends on; cells are text, empty ones None.

    Args:
        text: what is in it.

    Raises:
        DataError: no names, one twice, a row with another number of cells, or an open quotation.
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    with _long_cells(), _named(file, reader):
        names = next(reader, [])
        if not all(names) or len(set(names)) < len(names) or not names:
            raise DataError(f"{file}, line 1 must name each column once, and is {','.join(names) or '(nothing)'}")
        return [(f"line {reader.line_num}", _row(file, reader.line_num, names, cells)) for cells in reader if cells]


def _row(file: Path, line: int, names: list[str], cells: list[str]) -> dict[str, Any]:
    if len(cells) != len(names):
        raise DataError(f"{file}, line {line} has {len(cells)} cells, and line 1 names {len(names)} columns.")
    return {name: cell or None for name, cell in zip(names, cells, strict=True)}


@contextmanager
def _long_cells() -> Iterator[None]:
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
        DataError: no `pyarrow` package, or it cannot read the file.
    """
    try:
        arrow = importlib.import_module("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataError(f"{file}: to read Parquet, pip install pyarrow") from error
    try:
        rows = parquet.ParquetFile(file).read().to_pylist()
    except (OSError, arrow.ArrowException) as error:
        raise DataError(f"{file} cannot be read as Parquet: {first_line(error)}") from error
    return [(f"row {number}", row) for number, row in enumerate(rows, start=1)]

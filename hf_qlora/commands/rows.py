"""Options for the text to calibrate on."""

from __future__ import annotations

from typing import Annotated

import typer

from hf_qlora.console import misused


Calibrate = Annotated[
    str | None,
    typer.Option(
        help="Fit the rounding to text: a .txt, .jsonl, .json, .csv or .parquet file, a folder of them, or, with "
        "the datasets package, a Hub id, as me/data:split. A column is named behind it, as rows.jsonl#body."
    ),
]
Rows = Annotated[int, typer.Option(min=2, help="Of text, to calibrate on.")]
Length = Annotated[int, typer.Option(min=8, help="Of a row, in tokens.")]
HeldOut = Annotated[int, typer.Option(min=0, help="Further rows, to measure on.")]
ROWS_BY_DEFAULT = (64, 256, 8, 0)
RowsSeed = Annotated[int, typer.Option(min=0, help="Of the choice of rows.")]


def check_rows_are_used(calibrate: str | None, *given: int) -> None:
    if calibrate is None and given != ROWS_BY_DEFAULT:
        raise misused("--rows, --length, --held-out and --seed are of the rows for --calibrate; name what to read.")

"""The files of results that the commands read and write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from hf_qlora.bench.results import check_same_device, read_lines, read_whole, write_whole
from hf_qlora.console import misused


def read_results(results: Path) -> Any:
    """What was measured before.

    Raises:
        typer.Exit: with 2, where there is no such file or it was changed by hand.
    """
    _check_there(results)
    try:
        return read_whole(results)
    except ValueError as error:
        raise misused(str(error)) from None


def check_lines(results: Path, report_only: bool, read: Callable[[Path], Any] = read_lines) -> None:
    """Refuse a file that cannot be used, before anything is done.

    Args:
        read: how the command reads it.

    Raises:
        typer.Exit: with 2, where a line of the file was changed by hand, a run is there twice, or there is nothing to
            report.
    """
    if report_only:
        _check_there(results)
    try:
        read(results)
    except ValueError as error:
        raise misused(str(error)) from None


def check_addable(results: Path, device: str) -> None:
    """Raises: typer.Exit: with 2, where the file's rows are of another kind of device than what would be added."""
    from hf_qlora.bench.measure import environment

    try:
        check_same_device(results, environment(device)["device"])
    except ValueError as error:
        raise misused(str(error)) from None


def _check_there(results: Path) -> None:
    if not results.is_file():
        raise misused(f"{results} is not there; leave out --report to measure.")


def measured(found: Any, results: Path, report: Any) -> None:
    """Keep what was measured, draw it and print it, as the module `report` does."""
    write_whole(results, found)
    report.plot(found, results.with_suffix(".png"))
    typer.echo(report.markdown(found))

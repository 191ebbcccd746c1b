"""The files of results of the commands; what is wrong with one is said before anything is measured."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import typer

from hf_qlora.bench.commands.forms import fits
from hf_qlora.bench.results import check_same_device, read_lines, read_whole, write_whole
from hf_qlora.console import misused


def reported(command: str, results: Path, report: Any, report_only: bool) -> bool:
    """Print what was measured before, as the module `report` does, if only that is asked for.

    Returns:
        `report_only`.

    Raises:
        typer.Exit: with 2, where there is nothing to report, or else no place for what will be measured.
    """
    if report_only:
        typer.echo(report.markdown(read_results(command, results)))
    else:
        _check_place(results)
    return report_only


def read_results(command: str, results: Path) -> Any:
    """What the command measured before.

    Raises:
        typer.Exit: with 2, where there is no such file, it was changed by hand or is another command's.
    """
    _check_there(results)
    found = _read(command, results, read_whole, other=read_lines)
    _check_form(command, results, [found])
    return found


def file_of_runs(
    command: str, results: Path, report_only: bool, quick: bool = False, read: Callable[[Path], Any] | None = None
) -> Path:
    """Where the command's runs are kept, one in a line; quick ones beside the others.

    Args:
        read: how the command reads them.

    Raises:
        typer.Exit: with 2, where a line was changed by hand or is another command's, a run is there twice, there is
            nothing to report, or no place for runs.
    """
    _check_no_folder(results)
    file = results.with_stem(f"{results.stem}_quick") if quick else results
    if report_only:
        _check_there(file)
    else:
        _check_place(file)
    _check_form(command, file, _read(command, file, read_lines, other=read_whole))
    if read is not None:
        try:
            read(file)
        except ValueError as error:
            raise misused(str(error)) from None
    return file


def check_addable(results: Path, device: str) -> None:
    """Raises: typer.Exit: with 2, where the file's rows are of another kind of device than what would be added.

    Args:
        device: that kind, as `environment` has it.
    """
    try:
        check_same_device(results, device)
    except ValueError as error:
        raise misused(str(error)) from None


def measured(found: Any, results: Path, report: Any) -> None:
    """Keep what was measured, draw it and print it, as the module `report` does."""
    write_whole(results, found)
    if hasattr(report, "plot"):
        report.plot(found, results.with_suffix(".png"))
    typer.echo(report.markdown(found))


def _check_there(results: Path) -> None:
    _check_no_folder(results)
    if not results.is_file():
        raise misused(f"{results} is not there; leave out --report to measure.")


def _check_place(results: Path) -> None:
    from hf_qlora.bench.quantization.result import check_folder

    _check_no_folder(results)
    try:
        check_folder(results.parent)
    except ValueError as error:
        raise misused(str(error)) from None
    if results.exists() and not os.access(results, os.W_OK):
        raise misused(f"{results} cannot be written to; name another file.")


def _check_no_folder(results: Path) -> None:
    if results.is_dir():
        raise misused(f"{results} is a folder; --results is a file.")


def _read(command: str, results: Path, read: Callable[[Path], Any], other: Callable[[Path], Any]) -> Any:
    """By one of the two ways of keeping results; a file in which the other's are is another command's."""
    try:
        return read(results)
    except (OSError, ValueError) as error:
        with suppress(OSError, ValueError):
            if other(results):
                raise _of_another(command, results) from None
        raise misused(str(error)) from None


def _check_form(command: str, results: Path, found: list[Any]) -> None:
    if not all(fits(command, one) for one in found):
        raise _of_another(command, results)


def _of_another(command: str, results: Path) -> typer.Exit:
    return misused(f"{results} is no result of `hf-qlora bench {command}`; give another --results.")

"""What commands that write files do alike: places for them, interruptions, what was made."""

from __future__ import annotations

import re
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from hf_qlora.console import INTERRUPTED, misused


OPTIONS = ("onto", "dtype", "trained_on")  # that errors name as Python has them


def refused(error: Exception) -> typer.Exit:
    """Say why the library refused, in the words of the command line; raise what this returns."""
    text = re.sub(rf"\b({'|'.join(OPTIONS)})='([^']*)'", _as_typed, str(error))
    return misused(re.sub(r"\bforce (?=(calibrates|merges|writes)\b)", "--force ", text))


def _as_typed(found: re.Match[str]) -> str:
    return f"--{found[1].replace('_', '-')} {found[2]}"


def make_place(file: Path, output: Path | None = None) -> None:
    """Make the folder for a file that is written after long work, and not into the model's folder `output`."""
    if output is not None and output.absolute() in file.absolute().parents:
        raise misused(f"{file} is in the model's folder, {output}; name a place beside it.")
    if file.is_dir():
        raise misused(f"{file} is a folder; name a file.")
    if file.exists() and not file.is_file():  # which would be replaced
        raise misused(f"{file} is a device or a pipe; name a file.")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise misused(f"There is no place for {file}: {error}.") from None


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Let a SIGTERM raise as Ctrl-C does, so that what is half done is removed."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def stopped(output: Path) -> typer.Exit:
    """Say what an interruption left; raise what this returns."""
    typer.echo(f"Stopped; {output} is {'as it was' if output.exists() else 'not there'}.", err=True)
    return typer.Exit(INTERRUPTED)


def say_and_write(found: Any, output: Path, file: Path | None) -> None:
    """Print what was made in `output`, and write all of it into a file if that is asked for."""
    typer.echo(str(found))
    write_report(found, file, f"The model is in {output}, but its report")


def write_report(found: Any, file: Path | None, what: str = "The report") -> None:
    """Write all of a report into a file if that is asked for; errors name `what` could not be written."""
    from hf_qlora.config.record import write_json

    if file is not None:
        try:
            write_json(file, found.to_dict())
        except OSError as error:
            raise misused(f"{what} could not be written: {error}.") from None

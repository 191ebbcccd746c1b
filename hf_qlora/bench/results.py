"""Result files, sealed: what a measurement printed, and a sha256 of it, so that a figure changed by hand is found.

    one measurement   JSON, written whole: `write_whole`, `read_whole`
    many runs         JSON lines, one for each run, appended as it ends, so that what was cut off goes on:
                      `append_line`, `read_lines`

The seal is the key "sha256" of the object (of each line's object): of its other keys as JSON, sorted, without spaces.
It finds mistakes and honest edits; who wants to deceive can seal again.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, TextIO


SEAL = "sha256"


def sealed(values: dict[str, Any]) -> dict[str, Any]:
    """The same with its seal as the last key."""
    kept = {key: value for key, value in values.items() if key != SEAL}
    return kept | {SEAL: _digest(kept)}


def write_whole(path: Path, values: dict[str, Any]) -> None:
    """Write sealed JSON to a temporary name and rename it."""
    write_text(path, json.dumps(sealed(values), indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write to a temporary name and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def read_whole(path: Path) -> dict[str, Any]:
    """What `write_whole` wrote, without the seal.

    Raises:
        ValueError: it is no result, or was changed since.
    """
    return _opened(path.read_text(encoding="utf-8"), str(path))


def append_line(results: Path, row: dict[str, Any]) -> None:
    """Write one more line, and see it on the disk."""
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a+", encoding="utf-8") as file:
        _cut_off_half_a_line(file)
        file.write(json.dumps(sealed(row)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(results: Path) -> list[dict[str, Any]]:
    """The file's lines without their seals; none where it is not there.

    Raises:
        ValueError: a line is no result, or was changed since.
    """
    if not results.is_file():
        return []
    lines = results.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last line's end was cut off
    return [_opened(line, f"{results}, line {number}") for number, line in enumerate(lines, 1) if line]


def _opened(text: str, where: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error}): it is cut, or no result of `hf-qlora bench`.") from None
    if not isinstance(values, dict) or SEAL not in values:
        raise ValueError(f"{where} has no {SEAL!r}: it is no result of `hf-qlora bench`.")
    seal = values.pop(SEAL)
    if seal != _digest(values):
        raise ValueError(f"{where} was changed after it was measured: its {SEAL} is another. Measure again.")
    return values


def _digest(values: dict[str, Any]) -> str:
    # Through JSON first: what is sealed is what a reader gets back, with tuples as lists and keys as strings.
    text = json.dumps(json.loads(json.dumps(values)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _cut_off_half_a_line(file: TextIO) -> None:
    """What a process left that was killed while it wrote."""
    file.seek(0)
    text = file.read()
    whole = text.rfind("\n") + 1
    if whole < len(text):
        file.truncate(len(text[:whole].encode()))
        file.seek(0, os.SEEK_END)

"""Result files, sealed: what a measurement printed, and a sha256 of it, so that a figure changed by hand is found.

    one measurement   JSON, written whole: `write_whole`, `read_whole`
    many runs         JSON lines, one for each run, appended as it ends, so that what was cut off goes on:
                      `append_line`, `read_lines`

The seal is the key "sha256" of the object (of each line's object): of its other keys as JSON, sorted, without spaces.
Lines are chained: the digest of a line covers the seal of the line before it too (of the first one: of nothing), so
that a line taken out, put in, doubled or moved is found. Lines taken off the end are not: what is left is whole.
It finds mistakes and honest edits; who wants to deceive can seal again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock


SEAL = "sha256"


def sealed(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    """The same with its seal as the last key.

    Args:
        before: the seal of the line before.
    """
    kept = {key: value for key, value in values.items() if key != SEAL}
    return kept | {SEAL: _digest(kept, before)}


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
    return _checked(_loaded(path.read_text(encoding="utf-8"), str(path)), str(path))


def append_line(results: Path, row: dict[str, Any]) -> None:
    """Write one more line, and see it on the disk. Processes that append to one file wait for each other.

    Raises:
        ValueError: the last line is no result.
    """
    results.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(results.with_name(f".{results.name}.lock")), results.open("a+b") as file:
        file.seek(0)
        text = file.read()
        lines, half = _split(text.decode())
        before = _loaded(lines[-1][1], f"{results}, line {lines[-1][0]}")[SEAL] if lines else ""
        file.truncate(len(text) - len(half.encode()))
        end = b"\n" if lines and not half and not text.endswith(b"\n") else b""  # as an editor may leave it
        file.write(end + json.dumps(sealed(row, before)).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(results: Path) -> list[dict[str, Any]]:
    """The file's lines without their seals; none where it is not there.

    Raises:
        ValueError: a line is no result or was changed since, or lines before it are not those it was written behind.
    """
    if not results.is_file():
        return []
    rows, before = [], ""
    for number, line in _split(results.read_text(encoding="utf-8"))[0]:
        where = f"{results}, line {number}"
        values = _loaded(line, where)
        seal = values[SEAL]
        rows.append(_checked(values, where, before, " or a line before it was taken out, put in or moved"))
        before = seal
    return rows


def check_once(results: Path, runs: Iterable[Hashable]) -> None:
    """Refuse a file that has a run twice.

    Args:
        runs: what identifies each line of the file.

    Raises:
        ValueError: with the first such run.
    """
    for run, count in Counter(runs).items():
        if count > 1:
            raise ValueError(
                f"{results} has {count} lines of {run}, and nothing says which of them counts. Take off all lines "
                "from the second of them on, or name another file: --results OTHER."
            )


def check_same_device(results: Path, device: str) -> None:
    """Refuse to add rows to those of another kind of device: they would stand in one table.

    Args:
        device: the kind, as `environment` has it.

    Raises:
        ValueError: with both.
    """
    others = sorted({row["with"]["device"] for row in read_lines(results)} - {device})
    if others:
        raise ValueError(
            f"{results} has rows of {' and '.join(others)}; those of {device} do not belong into the same tables. "
            "Name another file: --results OTHER."
        )


def _split(text: str) -> tuple[list[tuple[int, str]], str]:
    """The lines with their numbers, and what a process left that was killed while it wrote the last.

    A last line that is whole but for its end is one of them.
    """
    *lines, rest = text.split("\n")
    try:
        json.loads(rest)
        lines, rest = [*lines, rest], ""
    except ValueError:  # half a line, or nothing
        pass
    return [(number, line) for number, line in enumerate(lines, 1) if line], rest


def _loaded(text: str, where: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error}): it is cut, or no result of `hf-qlora bench`.") from None
    if not isinstance(values, dict) or SEAL not in values:
        raise ValueError(f"{where} has no {SEAL!r}: it is no result of `hf-qlora bench`.")
    return values


def _checked(values: dict[str, Any], where: str, before: str = "", otherwise: str = "") -> dict[str, Any]:
    """Without the seal."""
    kept = {key: value for key, value in values.items() if key != SEAL}
    if values[SEAL] != _digest(kept, before):
        raise ValueError(
            f"{where} was changed after it was measured{otherwise}: its {SEAL} is another. Measure again."
        )
    return kept


def _digest(values: dict[str, Any], before: str = "") -> str:
    # Through JSON first: what is sealed is what a reader gets back, with tuples as lists and keys as strings.
    text = json.dumps(json.loads(json.dumps(values)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256((before + text).encode()).hexdigest()

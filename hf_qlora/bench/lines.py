"""Results as JSON lines: one for each run, appended as it ends, so that what was cut off goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TextIO


def read_lines(results: Path) -> list[dict[str, Any]]:
    """The file's lines; none where it is not there."""
    if not results.is_file():
        return []
    lines = results.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]  # what follows the last line's end was cut off


def append_line(results: Path, row: dict[str, Any]) -> None:
    """Write one more line, and see it on the disk."""
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a+", encoding="utf-8") as file:
        _cut_off_half_a_line(file)
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _cut_off_half_a_line(file: TextIO) -> None:
    """What a process left that was killed while it wrote."""
    file.seek(0)
    text = file.read()
    whole = text.rfind("\n") + 1
    if whole < len(text):
        file.truncate(len(text[:whole].encode()))
        file.seek(0, os.SEEK_END)

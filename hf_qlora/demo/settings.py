"""The settings of a run, and the check of its output folder before anything is loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from hf_qlora.demo.errors import DemoError


@dataclass(frozen=True)
class Settings:
    """What to run; `hf-qlora demo --help` says what each one is."""

    model: str | None
    dataset: str | None
    output: Path
    steps: int
    batch_size: int
    rank: int
    loftq: bool
    learning_rate: float
    held_out: int
    max_length: int
    seed: int
    save_merged: bool


def check_output(folder: Path) -> None:
    """Raise `DemoError` if the folder cannot be made or written to."""
    for part in (folder, *folder.parents):
        if part.exists():
            if not part.is_dir():
                raise DemoError(f"--output: {part} is a file; name a folder.")
            break
    else:
        return
    if not os.access(part, os.W_OK):
        raise DemoError(f"--output: {part} cannot be written to; name another folder.")

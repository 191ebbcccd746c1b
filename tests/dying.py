"""Processes that are killed in the middle of writing files, at every file operation in turn."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path


WATCHED = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.copyfile", "os.chmod")
KILLED = 9


def deaths(write: Callable[[], object], under: Path) -> Iterator[int]:
    """Fork a process that does `write` and dies at file operation 1, 2, … in a folder; until one lives to the end."""
    number = 0
    while True:
        number += 1
        process = os.fork()
        if process == 0:
            try:
                sys.addaudithook(_dies_at(number, under))
                write()
                os._exit(0)
            finally:
                os._exit(1)
        ended = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if ended == 0:
            return
        assert ended == KILLED
        yield number


def _dies_at(number: int, under: Path) -> Callable[[str, tuple[object, ...]], None]:
    seen = [0]

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in WATCHED and str(arguments[0]).startswith(str(under)):
            seen[0] += 1
            if seen[0] == number:
                os._exit(KILLED)

    return hook

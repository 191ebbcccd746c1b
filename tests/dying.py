"""Processes that are killed: in the middle of writing files, at each file operation in turn, or at some time."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path


WATCHED = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.copyfile", "os.chmod")
KILLED = 9


def deaths(write: Callable[[], object], under: Path) -> Iterator[int]:
    """Fork a process that does `write` and dies at file operation 1, 2, … in a folder; until one lives to the end."""
    number = 0
    while True:
        number += 1
        if not dies(write, under, number):
            return
        yield number


def dies(write: Callable[[], object], under: Path, number: int) -> bool:
    """Fork a process that does `write` and dies at a file operation in a folder; whether it came to that."""
    process = os.fork()
    if process == 0:
        try:
            sys.addaudithook(_dies_at(number, under))
            write()
            os._exit(0)
        finally:
            os._exit(1)
    ended = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert ended in (0, KILLED)
    return ended == KILLED


def killed(work: Callable[[], object], seconds: float) -> bool:
    """Fork a process that does `work` and kill it (SIGKILL) after some time; whether it was not done by then."""
    process = os.fork()
    if process == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)  # not waited for yet, so its number is still its own
    ended = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert ended in (0, -signal.SIGKILL)
    return ended != 0


def _dies_at(number: int, under: Path) -> Callable[[str, tuple[object, ...]], None]:
    seen = [0]

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in WATCHED and str(arguments[0]).startswith(str(under)):
            seen[0] += 1
            if seen[0] == number:
                os._exit(KILLED)

    return hook

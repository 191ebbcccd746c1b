"""The command line of scripts that train: what is wrong is said in one sentence, and ends with 2; Ctrl-C with 130."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from hf_qlora.data.errors import DataError
from hf_qlora.train.interrupt import RunError, way_on


INTERRUPTED, MISUSED = 130, 2  # exit codes


class Parser(argparse.ArgumentParser):
    """Its description is shown as it was written; an error is one line."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        stop(message)


def stop(message: str, code: int = MISUSED) -> NoReturn:
    print(f"{'Error: ' if code == MISUSED else ''}{message}", file=sys.stderr)
    raise SystemExit(code)


@contextmanager
def in_one_sentence(output: Path) -> Iterator[None]:
    """End with what cannot be read or written, or with the way on after a Ctrl-C."""
    try:
        yield
    except (DataError, RunError) as error:
        stop(str(error))
    except KeyboardInterrupt:
        stop(way_on(output), INTERRUPTED)


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def learning_rate(text: str) -> float:
    if not 0 < (number := float(text)) < 1:  # nor nan
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return number


def seed(text: str) -> int:
    if not 0 <= (number := int(text)) < 2**31:
        raise argparse.ArgumentTypeError(f"{number} is not from 0 to 2³¹ − 1")
    return number


def own_rank(rank: int | None, method: str, default: int) -> int:
    """LoRA's rank, which full fine-tuning has none of."""
    if rank is not None and method == "full":
        stop(f"--rank {rank} is of LoRA, and --method full has none; leave it out.")
    return rank or default

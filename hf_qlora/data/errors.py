"""Data that cannot be read, and how that is said."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants


class DataError(ValueError):
    """Data that cannot be read; the message says what, why, and what to do."""


@contextmanager
def placed(place: str) -> Iterator[None]:
    """Name the place of what is refused within it."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{place}: {error}") from error


def first_line(error: Exception) -> str:
    """An error of a library, without the advice that follows."""
    return str(error).strip().partition("\n")[0]


def offline() -> str:
    """What to add where the Hub may have been meant."""
    return " (HF_HUB_OFFLINE is set, so the Hub is not asked.)" if constants.HF_HUB_OFFLINE else ""


def counted(count: int, noun: str) -> str:
    """So many of something, as "1 row" or "2 rows"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def short(text: str) -> str:
    """A text on one line of at most 240 characters."""
    return textwrap.shorten(text, 240, placeholder=" …") or "(nothing)"

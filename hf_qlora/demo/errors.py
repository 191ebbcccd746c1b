"""What the demo says of a model, data set or folder that cannot be used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants


class DemoError(ValueError):
    """Something given to the demo cannot be used; the message says what, why, and what to do."""


@contextmanager
def explained(*errors: type[Exception]) -> Iterator[None]:
    """Turn errors whose messages are made for users into `DemoError`."""
    try:
        yield
    except errors as error:
        raise DemoError(str(error)) from error


def first_line(error: Exception) -> str:
    """An error of a library, without the advice that follows."""
    return str(error).strip().partition("\n")[0]


def offline() -> str:
    """What to add where the Hub may have been meant."""
    return " (HF_HUB_OFFLINE is set, so the Hub is not asked.)" if constants.HF_HUB_OFFLINE else ""

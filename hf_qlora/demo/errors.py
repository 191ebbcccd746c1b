"""What the demo says of a model, data set or folder that cannot be used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class DemoError(ValueError):
    """Something given to the demo cannot be used; the message says what, why, and what to do."""


@contextmanager
def explained(*errors: type[Exception]) -> Iterator[None]:
    """Turn errors whose messages are made for users into `DemoError`."""
    try:
        yield
    except errors as error:
        raise DemoError(str(error)) from error

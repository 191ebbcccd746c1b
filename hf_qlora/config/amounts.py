"""Numbers of bytes as users write them: 2147483648, or "2GiB"."""

from __future__ import annotations

import re

from hf_qlora.validation import ConfigError


UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([KMG]i?B|B|)")


def parsed(value: object) -> int | None:
    """Bytes from an integer that is not negative, or from a text with a unit of `UNITS` or none; else None."""
    if isinstance(value, str):
        found = _AMOUNT.fullmatch(value.strip())
        return int(float(found[1]) * UNITS[found[2] or "B"]) if found else None
    return value if type(value) is int and value >= 0 else None


def bytes_given(value: object, setting: str) -> int:
    """Bytes, of which there must be one at least.

    Raises:
        ConfigError: another value.
    """
    found = parsed(value)
    if not found:
        raise ConfigError(
            f"{setting}={value!r} must be a positive number of bytes, as an integer or with a unit of "
            f"{tuple(UNITS)}, as '24GiB'."
        )
    return found

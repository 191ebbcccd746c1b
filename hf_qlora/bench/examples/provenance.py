"""What a table is of: its seeds, and the versions of this package that its rows were made with.

Rows of several versions may stand in one table, which then says so: `runs.Origin` has the script and the device only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def seeds(whole: int, planned: int) -> str:
    """How many; of how many, where some are not done by all methods yet."""
    return f"{whole} seeds" if whole == planned else f"{whole} of {planned} planned seeds"


def versions(rows: Iterable[Mapping[str, Any]]) -> str:
    """The package's version and the hash of its source; of several, which parts' rows each has made."""
    parts: dict[str, list[str]] = {}
    for row in rows:
        with_ = row["with"]
        made = parts.setdefault(f"hf-qlora {with_['hf-qlora']}, code {with_['code']}", [])
        if row["part"] not in made:
            made.append(row["part"])
    if len(parts) == 1:
        return f"Rows were made with {next(iter(parts))}."
    each = "; ".join(f"{version} ({', '.join(made)})" for version, made in parts.items())
    return f"Rows were made with {len(parts)} versions of this package: {each}."

"""What `AdapterHealthCallback` has found, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


SHOWN = 2  # names of tensors


class AdapterHealthError(RuntimeError):
    """Training that does no good; the message is the report."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        step: the optimizer step, from 1; 0 before the first.
        what: which tensors, and what is wrong with them.
        means, do: what follows from it, and what to do.
        where: for NaN and infinity, the layer where they arose.
        fatal: whether training is stopped for it, where that is wished; else it is said only.
    """

    step: int
    what: str
    means: str
    do: str
    where: str = ""
    fatal: bool = True

    def __str__(self) -> str:
        rows = {"what": self.what, "arose": self.where, "means": self.means, "do": self.do}
        when = f"step {self.step}" if self.step else "before the first step"
        return "\n".join([when, *(f"  {key:<6} {text}" for key, text in rows.items() if text)])


def named(names: Sequence[str], of: int, kind: str) -> str:
    """How many of them, of which kind, and the names of some."""
    count = f"all {of}" if len(names) == of else f"{len(names)} of {of}"
    return f"{count} {kind} ({', '.join(names[:SHOWN])}{', …' if len(names) > SHOWN else ''})"

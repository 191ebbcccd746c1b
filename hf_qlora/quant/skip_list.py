"""Which layers to leave dense for a number of bytes, so that the error falls the most.

A layer left dense costs its dense bytes less its packed ones, and takes its ‖W − Q(W)‖² out of the sum over layers.
The layers are taken in the order of error per byte, each that still fits. That is a knapsack by the greedy rule: the
best list of all is better by less than the first layer that did not fit, and where layers are alike in size it is
this one. Weights' dtype cancels out of the order in a model of one dtype: it is that of the mean squared error of a
weight.

Rejected: weighting by the relative error, which would count a layer of tiny weights as one of large ones. Neither
knows what a layer's inputs are, nor what its outputs are good for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

from hf_qlora.validation import ConfigError


UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?(%|[KMG]i?B|B|)")


def bytes_of(budget: int | str, dense_bytes: int) -> int:
    """A budget in bytes.

    Args:
        budget: bytes, or "50MiB", or "5%" of `dense_bytes`.

    Raises:
        ConfigError: not to be understood, negative, or more than 100 %.
    """
    found = _AMOUNT.fullmatch(budget.strip()) if isinstance(budget, str) else None
    if found and found[2] == "%" and float(found[1]) <= 100:
        return int(dense_bytes * float(found[1]) / 100)
    if found and found[2] != "%":
        return int(float(found[1]) * UNITS[found[2] or "B"])
    if type(budget) is int and budget >= 0:
        return budget
    raise ConfigError(
        f"budget={budget!r} is no number of bytes: give an amount with a unit of {tuple(UNITS)}, as '50MiB', or a "
        "share of the dense model's bytes up to 100%, as '5%'."
    )


def choose(errors: Mapping[str, float], costs: Mapping[str, int], budget: int) -> list[str]:
    """The layers to leave dense, those of the most error per byte first.

    Args:
        errors: squared error of each layer.
        costs: bytes that it takes to leave it dense.
    """
    worth = {name: errors[name] / costs[name] if costs[name] > 0 else math.inf for name in errors if errors[name] > 0}
    chosen: list[str] = []
    left = budget
    for name in sorted(worth, key=lambda name: worth[name], reverse=True):
        if costs[name] <= left:
            chosen.append(name)
            left -= costs[name]
    return chosen


def check_enough(budget: int, costs: Iterable[int]) -> None:
    """Raise ConfigError where a budget is too small for any layer."""
    least = min(costs)
    if budget < least:
        raise ConfigError(
            f"budget={budget} bytes is too small to leave any layer dense; the smallest that works is {least} bytes."
        )

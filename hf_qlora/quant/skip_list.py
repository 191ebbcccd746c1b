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

from hf_qlora.config import amounts
from hf_qlora.validation import ConfigError


_SHARE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?%")


def bytes_of(budget: int | str, dense_bytes: int) -> int:
    """A budget in bytes.

    Args:
        budget: bytes, or "50MiB", or "5%" of `dense_bytes`.

    Raises:
        ConfigError: not to be understood, negative, or more than 100 %.
    """
    share = _SHARE.fullmatch(budget.strip()) if isinstance(budget, str) else None
    found = amounts.parsed(budget) if share is None else int(dense_bytes * float(share[1]) / 100)
    if found is None or (share and float(share[1]) > 100):
        raise ConfigError(
            f"budget={budget!r} is no number of bytes: give an amount with a unit of {tuple(amounts.UNITS)}, as "
            "'50MiB', or a share of the dense model's bytes up to 100%, as '5%'."
        )
    return found


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

"""The largest number whose peak fits a budget.

The peak grows with batch, sequence and rank, nearly in a straight line: the next guess is where the line through the
two points nearest to the budget meets it, or the middle, where lines have not helped. The answer is exact: it was seen
to fit, and the next number was seen not to.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from hf_qlora.validation import ConfigError


PATIENCE = 4  # guesses by a line between two that halve


def largest_that_fits(peak: Callable[[int], float], budget: int, name: str, limit: int) -> int:
    """The largest number from 1 to `limit` whose `peak`, in bytes, is within `budget`.

    Args:
        peak: never falls with the number; infinite where there is no run at all.
        name: of the number, for the message.

    Raises:
        ConfigError: not even 1 fits; with the smallest budget that works.
    """
    points = {1: peak(1)}
    if points[1] > budget:
        raise ConfigError(
            f"budget={budget:,} bytes is too small: with {name}=1 the peak is {points[1]:,} bytes, which is the "
            "smallest budget that works with these settings. Checkpointing, a lower rank or a shorter batch need less."
        )
    low, high, guess, tries = 1, limit + 1, 2, 0
    while high - low > 1:
        tries += 1
        if high in points and (tries % PATIENCE == 0 or math.isinf(points[high])):
            guess = (low + high) // 2
        guess = min(max(guess, low + 1), high - 1)
        points[guess] = peak(guess)
        if points[guess] <= budget:
            low = guess
        else:
            high = guess
        guess = _by_line(points, budget)
    return low


def _by_line(points: dict[int, float], budget: int) -> int:
    if sum(map(math.isfinite, points.values())) < 2:
        return max(points) * 2
    one, other = sorted(
        filter(lambda number: math.isfinite(points[number]), points), key=lambda number: abs(points[number] - budget)
    )[:2]
    rise = (points[other] - points[one]) / (other - one)
    return one + int((budget - points[one]) // rise) if rise > 0 else max(points) * 2

"""The largest number whose peak fits a budget.

The peak grows with batch, sequence and rank, and nearly in a straight line: between one that fits and one that does
not, the next guess is where the line meets the budget, and the middle where that has not helped. The answer is exact:
it was seen to fit, and the next number was seen not to.
"""

from __future__ import annotations

from collections.abc import Callable

from hf_qlora.validation import ConfigError


def largest_that_fits(peak: Callable[[int], int], budget: int, name: str, limit: int) -> int:
    """The largest number from 1 to `limit` whose `peak`, in bytes, is within `budget`.

    Args:
        peak: never falls with the number.
        name: of the number, for the message.

    Raises:
        ConfigError: not even 1 fits; with the smallest budget that works.
    """
    lowest = peak(1)
    if lowest > budget:
        raise ConfigError(
            f"budget={budget:,} bytes is too small: with {name}=1 the peak is {lowest:,} bytes, which is the smallest "
            "budget that works with these settings. Checkpointing, a lower rank or a shorter batch need less."
        )
    low, low_peak = 1, lowest
    high, high_peak = _too_large(peak, budget, limit, lowest)
    if high > limit:
        return limit
    by_line = True
    while high - low > 1:
        guess = low + int((high - low) * (budget - low_peak) / (high_peak - low_peak)) if by_line else (low + high) // 2
        guess = min(max(guess, low + 1), high - 1)
        width, found = high - low, peak(guess)
        if found <= budget:
            low, low_peak = guess, found
            # The line is nearly right: what is above the guess is mostly the next.
            if high - low > 1 and by_line:
                above = peak(low + 1)
                if above > budget:
                    return low
                low, low_peak = low + 1, above
        else:
            high, high_peak = guess, found
        by_line = high - low < width / 2
    return low


def _too_large(peak: Callable[[int], int], budget: int, limit: int, lowest: int) -> tuple[int, int]:
    """A number that does not fit, with its peak; one above `limit` if all do."""
    number = 2
    while number <= limit:
        found = peak(number)
        if found > budget:
            return number, found
        per_number = max((found - lowest) / (number - 1), 1)
        number = min(max(2 * number, int((budget - lowest) / per_number) + 2), max(limit, number + 1))
        if number == limit and peak(limit) <= budget:
            break
    return limit + 1, budget + 1

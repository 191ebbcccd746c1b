"""Paired differences over seeds, their intervals, and what an interval shows.

A seed's difference is of two arms that saw the same examples in the same order. The 95 % interval of its mean is
Student's t: mean ± t(0.975, n − 1) · sd / √n. It is over seeds, on one test set: another test set is another draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


CONFIDENCE = 0.95


@dataclass(frozen=True)
class Mean:
    """Of one value for each seed.

    Attributes:
        deviation: of a single seed's value; NaN with one seed, as are `low` and `high`, the interval of the mean.
    """

    seeds: int
    mean: float
    deviation: float
    low: float
    high: float


def mean_of(values: Sequence[float]) -> Mean:
    """The mean with its 95 % t interval."""
    x = np.asarray(values, dtype=float)
    n, mean = len(x), float(x.mean())
    if n < 2:
        return Mean(n, mean, math.nan, math.nan, math.nan)
    deviation = float(x.std(ddof=1))
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * deviation / math.sqrt(n)
    return Mean(n, mean, deviation, mean - reach, mean + reach)


def paired(values: Sequence[float], reference: Sequence[float]) -> Mean:
    """Of the differences, seed by seed."""
    return mean_of([value - other for value, other in zip(values, reference, strict=True)])


def non_inferior(difference: Mean, margin: float) -> bool | None:
    """Whether the interval of a difference (more is better) lies above −margin; None where there is no interval."""
    return None if math.isnan(difference.low) else difference.low > -margin

"""Paired differences of two arms, their intervals, and what an interval shows.

    x(s, i) = value − reference of seed s and item i of the test set: both arms saw the same examples in the same order

A mean over seeds is uncertain by its seeds and by its items: another seed, or another test set, is another draw.
`paired` has the seeds only: Student's t, mean ± t(0.975, S − 1) · sd / √S. `two_way` has both: seeds and items are
drawn anew, each with replacement, independently and the same for both arms (the pigeonhole bootstrap,
arXiv:0712.1111), and the standard deviation of the mean over the draws is the standard error:

    variance ≈ σ²(seeds) / S + σ²(items) / N + 3 σ²(rest) / (S · N)      the truth has the rest once: it is cautious
    interval = mean ± t(0.975, f) · √variance

S − 1 seeds are drawn of S, which makes their part unbiased: S of them would lose a fifth of it with five seeds. f is
Satterthwaite's: S − 1 where seeds are all of the variance, and the more the less they are. Quantiles of the draws were
rejected: of five seeds they are too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats


CONFIDENCE = 0.95
DRAWS, DRAW_SEED = 10_000, 0
AT_ONCE = 2**22  # items drawn in one piece: bounds the memory


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
    """The mean with its 95 % t interval over the seeds."""
    x = np.asarray(values, dtype=float)
    n, mean = len(x), float(x.mean())
    if n < 2:
        return Mean(n, mean, math.nan, math.nan, math.nan)
    deviation = float(x.std(ddof=1))
    reach = _quantile(n - 1) * deviation / math.sqrt(n)
    return Mean(n, mean, deviation, mean - reach, mean + reach)


def paired(values: Sequence[float], reference: Sequence[float]) -> Mean:
    """Of the differences, seed by seed; the interval is over the seeds, with one test set."""
    return mean_of([value - other for value, other in zip(values, reference, strict=True)])


def two_way(values: npt.ArrayLike, reference: npt.ArrayLike) -> Mean:
    """Of the differences, with an interval over seeds and items.

    Args:
        values, reference: of each item with each seed, as 0 and 100 of one that is wrong or right; (seeds, items).
    """
    x = np.asarray(values, dtype=float) - np.asarray(reference, dtype=float)
    seeds, items = x.shape
    over_seeds = mean_of(x.mean(axis=1).tolist())
    if seeds < 2 or items < 2:
        return Mean(seeds, over_seeds.mean, over_seeds.deviation, math.nan, math.nan)
    whole = float(bootstrapped(x).var(ddof=1))
    by_seeds = over_seeds.deviation**2 / seeds
    by_items = max(whole - by_seeds, 0.0)
    spread = by_seeds**2 / (seeds - 1) + by_items**2 / (items - 1)
    reach = _quantile(whole**2 / spread) * math.sqrt(whole) if spread else 0.0
    return Mean(seeds, over_seeds.mean, over_seeds.deviation, over_seeds.mean - reach, over_seeds.mean + reach)


def bootstrapped(x: npt.NDArray[np.float64], draws: int = DRAWS) -> npt.NDArray[np.float64]:
    """Means of x (seeds, items) over S − 1 seeds and N items, drawn anew each time; (draws,)."""
    random = np.random.default_rng(DRAW_SEED)
    found = []
    for first in range(0, draws, step := max(1, AT_ONCE // x.shape[1])):
        count = min(step, draws - first)
        by_seed = _counts(random, count, x.shape[0], x.shape[0] - 1)
        by_item = _counts(random, count, x.shape[1], x.shape[1])
        found.append(np.einsum("di,di->d", by_seed @ x, by_item) / ((x.shape[0] - 1) * x.shape[1]))
    return np.concatenate(found)


def _counts(random: np.random.Generator, draws: int, of: int, drawn: int) -> npt.NDArray[np.float64]:
    """How often each of so many is drawn; (draws, of)."""
    chosen = random.integers(0, of, (draws, drawn)) + of * np.arange(draws)[:, None]
    return np.bincount(chosen.ravel(), minlength=draws * of).reshape(draws, of).astype(float)


def _quantile(freedom: float) -> float:
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))


def verdict(
    difference: Mean,
    margin: float,
    of: str = "accuracy",
    arm: str = "QLoRA",
    reference: str = "full fine-tuning",
) -> str:
    """What the interval of a difference in points, of which more is better, shows of non-inferiority by a margin."""
    claim = f"{arm} loses less than {margin} points of {of} to {reference}"
    if math.isnan(difference.low):
        return f"**Not decided**: that {claim}. One seed has no interval; the difference is {difference.mean:+.2f}."
    interval = (
        f"the difference is {difference.mean:+.2f}, its 95 % interval {difference.low:+.2f} to {difference.high:+.2f}"
    )
    if difference.low > -margin:
        worse = " All of it is below 0: it is worse, by less than the margin." if difference.high < 0 else ""
        return f"**Shown**: {claim}; {interval}.{worse}"
    if difference.high < -margin:
        return f"**Shown to be worse**: {arm} loses more than {margin} points of {of} to {reference}; {interval}."
    return f"**Not decided**: that {claim}. {interval[0].upper()}{interval[1:]}, which holds {-margin:+}."

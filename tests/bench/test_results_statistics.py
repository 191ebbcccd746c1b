"""Intervals of paired differences: over seeds Student's, over seeds and items as wide as the variance by theory."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from hf_qlora.bench.examples.statistics import Mean, bootstrapped, mean_of, paired, two_way, verdict


def simulated(random: np.random.Generator, seeds: int, items: int, a: float, b: float, rest: float) -> np.ndarray:
    """A mean of 0 with effects of seeds and of items, and what is of neither alone; by their deviations."""
    of_seed, of_item = random.normal(0, a, (seeds, 1)), random.normal(0, b, (1, items))
    return of_seed + of_item + random.normal(0, rest, (seeds, items))


def test_the_interval_over_seeds_is_scipys() -> None:
    random = np.random.default_rng(0)
    first, second = random.normal(0.9, 0.01, 7), random.normal(0.9, 0.01, 7)
    found = paired(list(first), list(second))
    expected = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9)  # the same in fp64
    assert found.mean == pytest.approx(float(np.mean(first - second)), rel=1e-12)
    assert math.isnan(mean_of([0.5]).low)


def test_the_variance_of_the_draws_is_that_of_the_effects() -> None:
    random = np.random.default_rng(1)
    seeds, items = 5, 400
    x = simulated(random, seeds, items, 0.3, 4.0, 2.0)
    of_seeds, of_items = x.mean(axis=1).var(ddof=1), x.mean(axis=0).var(ddof=1)
    rest = x - x.mean(axis=1, keepdims=True) - x.mean(axis=0, keepdims=True) + x.mean()
    # Both variances have the rest once, as the truth is to have it; drawing both adds it once more.
    theory = of_seeds / seeds + of_items / items + (rest**2).sum() / ((seeds - 1) * (items - 1)) / (seeds * items)
    # 10,000 draws: a variance is known to 1.4 %, three times that; finite seeds and items change the rest by 1 %.
    assert bootstrapped(x).var() == pytest.approx(theory, rel=0.05)
    assert (bootstrapped(x) == bootstrapped(x)).all()


@pytest.mark.parametrize("effects", [(0.3, 0.0, 0.1), (0.0, 3.0, 0.5), (0.2, 2.0, 2.0)])
def test_the_interval_holds_the_truth_as_often_as_it_says(
    effects: tuple[float, float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_qlora.bench.examples.statistics.bootstrapped", lambda x: bootstrapped(x, 300))
    random, count = np.random.default_rng(2), 600
    held = 0
    for _ in range(count):
        found = two_way(simulated(random, 5, 100, *effects), np.zeros((5, 100)))
        held += found.low < 0 < found.high
    # 95 % of 600 within three deviations (0.9 %), or somewhat more, as the rest is counted three times.
    assert 0.923 < held / count < 0.995


def test_two_way_is_of_paired_differences() -> None:
    random = np.random.default_rng(3)
    first, second = random.normal(0, 1, (4, 50)), random.normal(0, 1, (4, 50))
    found, over_seeds = two_way(first, second), paired(list(first.mean(1)), list(second.mean(1)))
    assert (found.mean, found.deviation, found.seeds) == pytest.approx((over_seeds.mean, over_seeds.deviation, 4))
    shared = random.normal(0, 100, (4, 50))
    again = two_way(first + shared, second + shared)
    assert (again.low, again.high) == pytest.approx((found.low, found.high), rel=1e-9)  # fp64, less 100s


def test_without_differences_the_interval_is_a_point_and_with_one_seed_there_is_none() -> None:
    assert two_way(np.ones((3, 5)), np.ones((3, 5))) == Mean(3, 0.0, 0.0, 0.0, 0.0)
    assert math.isnan(two_way(np.ones((1, 5)), np.zeros((1, 5))).low)


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (-0.4, 0.1, "**Shown**"),
        (-0.4, -0.1, "**Shown**"),
        (0.1, 0.2, "**Shown**"),
        (-0.6, 0.1, "**Not decided**"),
        (-0.6, -0.1, "**Not decided**"),
        (-2.0, -1.0, "**Shown to be worse**"),
        (math.nan, math.nan, "**Not decided**"),
    ],
)
def test_the_verdict_says_what_the_interval_shows(low: float, high: float, said: str) -> None:
    text = verdict(Mean(5, (low + high) / 2, 1.0, low, high), 0.5)
    assert text.startswith(f"{said}:")
    assert math.isnan(low) or f"{low:+.2f} to {high:+.2f}" in text
    assert ("worse, by less" in text) == (said == "**Shown**" and high < 0)

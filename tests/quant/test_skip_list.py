"""The greedy list against all lists, and amounts of bytes."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_qlora.quant.skip_list import bytes_of, check_enough, choose
from hf_qlora.validation import ConfigError


LAWS = settings(max_examples=200, deadline=None, database=None)
ERRORS = st.integers(0, 50)  # sums of whole numbers are exact
LAYERS = st.lists(st.tuples(ERRORS, st.integers(1, 20)), min_size=1, max_size=8)


def best_of_all(errors: dict[str, float], costs: dict[str, int], budget: int) -> float:
    lists = (chosen for count in range(len(errors) + 1) for chosen in combinations(errors, count))
    return max(sum(errors[n] for n in chosen) for chosen in lists if sum(costs[n] for n in chosen) <= budget)


@LAWS
@given(LAYERS, st.integers(0, 80))
def test_the_best_list_is_better_by_less_than_the_first_layer_that_did_not_fit(
    layers: list[tuple[int, int]], budget: int
) -> None:
    errors = {f"layer{i}": float(error) for i, (error, _) in enumerate(layers)}
    costs = {f"layer{i}": cost for i, (_, cost) in enumerate(layers)}
    chosen = choose(errors, costs, budget)
    assert sum(costs[name] for name in chosen) <= budget
    by_worth = sorted((name for name in errors if errors[name]), key=lambda name: -errors[name] / costs[name])
    left_out = [name for name in by_worth if name not in chosen]
    gap = best_of_all(errors, costs, budget) - sum(errors[name] for name in chosen)
    assert gap == 0 if not left_out else 0 <= gap < errors[left_out[0]]


@LAWS
@given(st.lists(ERRORS, min_size=1, max_size=8), st.integers(1, 20), st.integers(0, 80))
def test_among_layers_of_one_size_the_greedy_list_is_the_best(errors: list[int], cost: int, budget: int) -> None:
    named = {f"layer{i}": float(error) for i, error in enumerate(errors)}
    costs = dict.fromkeys(named, cost)
    chosen = choose(named, costs, budget)
    assert sum(named[name] for name in chosen) == best_of_all(named, costs, budget)


def test_a_layer_that_is_smaller_dense_is_left_dense_first_and_one_without_error_never() -> None:
    assert choose({"a": 5.0, "tiny": 1.0, "zero": 0.0}, {"a": 12, "tiny": -2, "zero": 1}, 10) == ["tiny", "a"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (1000, 1000),
        ("1000", 1000),
        ("12 B", 12),
        ("1.5KiB", 1536),
        ("50MiB", 50 * 2**20),
        ("2GB", 2 * 10**9),
        ("5%", 500),
        ("100%", 10_000),
        (" 0.5 % ", 50),
    ],
)
def test_an_amount_is_read(given: int | str, expected: int) -> None:
    assert bytes_of(given, 10_000) == expected


@pytest.mark.parametrize("given", [-1, "-5%", "5 percent", "101%", "", "MiB", "1e9", "nan", 5.0, True, None])
def test_what_is_no_amount_is_refused(given: object) -> None:
    with pytest.raises(ConfigError, match="is no number of bytes"):
        bytes_of(given, 10_000)  # type: ignore[arg-type]


def test_a_budget_for_no_layer_is_refused_with_the_least_that_works() -> None:
    check_enough(7, [9, 7])
    with pytest.raises(ConfigError, match="the smallest that works is 7 bytes"):
        check_enough(6, [9, 7])

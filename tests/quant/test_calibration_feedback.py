"""Rounding with error feedback, against the textbook, brute force and least squares in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from textbook import fitted, levels, loss, nearest, surgeon
from torch import Tensor

from hf_qlora.quant import reference
from hf_qlora.quant.calibrate.feedback import (
    STRIPE,
    Feedback,
    Nearest,
    refine,
    refit_scales,
    ridge,
    round_with_feedback,
)
from hf_qlora.quant.codebook import nf4_levels


# Two evaluations in float64 and float32 of one choice differ where a weight lies on a midpoint to within a rounding:
# of 16 levels at random weights, fewer than one in a thousand.
TIES = 2e-3


def damped(gram: Tensor, damping: float) -> Tensor:
    return gram + ridge(gram, damping) * torch.eye(len(gram), dtype=gram.dtype)


def problem(K: int, N: int, *, rank: int | None = None, signs: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """A target, (K, N), scales of whole blocks of some inputs, and the Gram matrix of correlated inputs."""
    target = torch.randn(K, N)
    scales = target.abs().amax(0, keepdim=True).expand(K, N).clone()
    if signs:
        scales[:, ::3] *= -1
        scales[:, 1::5] = 0
    X = torch.randn(rank or 4 * K, K) @ (torch.eye(K) + 0.5 * torch.randn(K, K) / K**0.5)
    return target, scales, damped(X.t() @ X, 0.01)


@pytest.mark.parametrize("order", [False, True], ids=["as given", "permuted"])
@pytest.mark.parametrize("K", [1, STRIPE - 1, STRIPE, 2 * STRIPE + 5])
def test_with_the_identity_codes_equal_nearest(K: int, order: bool) -> None:
    target, scales, _ = problem(K, 9)
    codes = round_with_feedback(target, scales, torch.eye(K), torch.randperm(K) if order else None)
    scaled, _ = reference._scale_blocks(target.t().reshape(-1), K)
    assert torch.equal(codes.t().reshape(-1), reference._nearest(scaled, nf4_levels()))
    assert torch.equal(refine(codes, target, scales, torch.eye(K)), codes)


@pytest.mark.parametrize("signs", [False, True], ids=["absmax", "zero and negative scales"])
@pytest.mark.parametrize("order", [False, True], ids=["as given", "permuted"])
@pytest.mark.parametrize("K", [1, 7, STRIPE + 9])
def test_it_is_the_textbook_s(K: int, order: bool, signs: bool) -> None:
    target, scales, gram = problem(K, 24, signs=signs)
    permutation = torch.randperm(K) if order else torch.arange(K)
    codes = round_with_feedback(target, scales, gram, permutation if order else None)
    expected = surgeon(target, scales, gram, permutation.tolist())
    # A tie broken otherwise changes the columns after it in its row, so that values are compared row by row.
    same = (levels(codes, scales) == levels(expected, scales)).all(0)
    assert same.double().mean() >= 1 - TIES * K
    found, wanted = loss(codes, target, scales, gram), loss(expected, target, scales, gram)
    assert found.sum() == pytest.approx(float(wanted.sum()), rel=1e-2)


def by_pivots(factor: np.ndarray) -> np.ndarray:
    return factor / factor.diagonal()[:, None]


@pytest.mark.parametrize("order", [False, True], ids=["as given", "permuted"])
def test_the_factor_of_an_ill_conditioned_gram_is_that_of_float64(order: bool) -> None:
    """A few directions and little beside them, as the inputs of language models are: a condition of 10⁶ and more."""
    K = 192
    X = torch.randn(200, 8) @ torch.randn(8, K) + 1e-3 * torch.randn(200, K)
    gram = damped(X.t() @ X, 1e-5)
    permutation = torch.randperm(K) if order else torch.arange(K)
    H = gram[permutation][:, permutation].double().numpy()
    assert np.linalg.cond(H) > 1e6
    expected = by_pivots(np.linalg.cholesky(np.linalg.inv(H)).T)
    found = Feedback(gram, permutation if order else None).upper.double().numpy()
    narrow = by_pivots(np.linalg.cholesky(np.linalg.inv(H.astype(np.float32))).T)

    def lost(factor: np.ndarray) -> float:
        return float(np.abs(factor - expected).max())

    assert lost(found) < 2e-5  # stored in float32; some entries are a hundred times the pivot
    assert lost(narrow) > 1e-3  # computed in it
    target, scales, _ = problem(K, 24)
    codes = round_with_feedback(target, scales, gram, permutation if order else None)
    same = codes == surgeon(target, scales, gram, permutation.tolist())
    assert same.double().mean() > 0.995


def test_it_beats_nearest_where_inputs_are_correlated() -> None:
    target, scales, gram = problem(96, 32)
    before = loss(nearest(target, scales), target, scales, gram).sum()
    assert loss(round_with_feedback(target, scales, gram), target, scales, gram).sum() < 0.9 * before


@settings(max_examples=60, deadline=None)
@given(
    K=st.integers(1, 2 * STRIPE + 6),
    N=st.integers(1, 5),
    rank=st.integers(1, 100),
    seed=st.integers(0, 2**20),
    signs=st.booleans(),
)
def test_refining_never_makes_it_worse(K: int, N: int, rank: int, seed: int, signs: bool) -> None:
    torch.manual_seed(seed)
    target, scales, gram = problem(K, N, rank=rank, signs=signs)
    codes = torch.randint(16, (K, N), dtype=torch.uint8)
    for _ in range(3):
        better = refine(codes, target, scales, gram)
        before, after = loss(codes, target, scales, gram), loss(better, target, scales, gram)
        # float32 slopes carry a rounding of what the codes started from.
        assert (after <= before * (1 + 1e-5) + 1e-5 * loss(torch.full_like(codes, 7), target, scales, gram)).all()
        codes = better


def test_refining_in_bfloat16_makes_it_worse_by_its_roundings_alone() -> None:
    """Codes go by levels that are not rounded yet, and two that are nearly as good may then change places.

    Inputs that are all alike are the hardest: their roundings add up.
    """
    K, N, rises = 64, 16, []
    for seed in range(20):
        torch.manual_seed(seed)
        target, scales, _ = problem(K, N)
        X = 3 * torch.randn(80, 1) @ torch.randn(1, K) + 0.1 * torch.randn(80, K)
        gram = damped(X.t() @ X, 0.01)

        def left(codes: Tensor, target: Tensor = target, scales: Tensor = scales, gram: Tensor = gram) -> Tensor:
            rest = levels(codes, scales).bfloat16().double() - target.double()
            return (rest * (gram.double() @ rest)).sum(0)

        codes = round_with_feedback(target, scales, gram, dtype=torch.bfloat16)
        for _ in range(3):
            better = refine(codes, target, scales, gram, torch.bfloat16)
            rises.append(left(better) / left(codes) - 1)
            codes = better
    rise = torch.stack(rises)
    # A thousandth of the rows and 2e-3 were seen; bfloat16 rounds to 4e-3 of a value.
    assert rise.max() < 1e-2
    assert (rise > 1e-6).double().mean() < 1e-2
    assert rise.mean() < 0


def test_three_inputs_are_refined_to_where_no_single_weight_can_move() -> None:
    """Of all 16³ codes."""
    every = torch.tensor(list(itertools.product(range(16), repeat=3)), dtype=torch.uint8).t()
    for seed in range(40):
        torch.manual_seed(seed)
        target, scales, gram = problem(3, 1, rank=5)
        start = round_with_feedback(target, scales, gram)
        codes = start
        for _ in range(20):
            codes = refine(codes, target, scales, gram)
        assert torch.equal(refine(codes, target, scales, gram), codes)
        losses = loss(every, target.expand(3, 4096), scales.expand(3, 4096), gram)
        found = loss(codes, target, scales, gram)
        one_moved = (every != codes).sum(0) <= 1
        assert found <= losses[one_moved].min() * (1 + 1e-5) + 1e-9
        assert losses.min() <= found <= loss(start, target, scales, gram)
        assert found <= loss(nearest(target, scales), target, scales, gram) * (1 + 1e-5)


def test_most_of_three_inputs_are_rounded_best() -> None:
    every = torch.tensor(list(itertools.product(range(16), repeat=3)), dtype=torch.uint8).t()
    best = total = nearest_total = 0.0
    for seed in range(40):
        torch.manual_seed(seed)
        target, scales, gram = problem(3, 1, rank=5)
        codes = refine(round_with_feedback(target, scales, gram), target, scales, gram)
        best += float(loss(every, target.expand(3, 4096), scales.expand(3, 4096), gram).min())
        total += float(loss(codes, target, scales, gram))
        nearest_total += float(loss(nearest(target, scales), target, scales, gram))
    assert best <= total < (best + nearest_total) / 2


@pytest.mark.parametrize("trust", [0.01, 1.0])
@pytest.mark.parametrize(("blocks", "size"), [(1, 32), (3, 32), (2, 64)])
def test_scales_are_fitted_by_least_squares(blocks: int, size: int, trust: float) -> None:
    K, N = blocks * size, 6
    target, _, gram = problem(K, N)
    scales = target.view(blocks, size, N).abs().amax(1)
    scales[0, 0], scales[-1, 1] = 0.0, -scales[-1, 1]
    codes = torch.randint(16, (K, N), dtype=torch.uint8)
    found = refit_scales(codes, target, scales, gram, trust)
    expected = fitted(codes, target, scales, gram, trust)
    # Normal equations in float32 lose the square of a condition of some tens.
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=2e-4)


def test_scales_stay_where_nothing_says_otherwise() -> None:
    """A row of zeros, and a block whose codes are all zero."""
    target, _, gram = problem(64, 2)
    target[:, 0] = 0
    scales = torch.rand(2, 2)
    codes = torch.randint(16, (64, 2), dtype=torch.uint8)
    codes[:, 0] = 7
    codes[:32, 1] = 7
    found = refit_scales(codes, target, scales, gram)
    assert found.isfinite().all()
    torch.testing.assert_close(found[:, 0], scales[:, 0])
    assert found[0, 1] == pytest.approx(float(scales[0, 1]))


def test_fitted_scales_make_less_error_and_what_follows_still_less() -> None:
    target, _, gram = problem(128, 16)
    scales = target.view(2, 64, 16).abs().amax(1)
    spread = scales.repeat_interleave(64, 0)
    codes = round_with_feedback(target, spread, gram)
    fitted = refit_scales(codes, target, scales, gram, 1e-6).repeat_interleave(64, 0)
    before, after = loss(codes, target, spread, gram), loss(codes, target, fitted, gram)
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < before.sum()
    assert (loss(refine(codes, target, fitted, gram), target, fitted, gram) <= after * (1 + 1e-5)).all()


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_singular_grams_and_dead_inputs(rank: int) -> None:
    """Damping alone says what to do with inputs of which nothing is known: rounding to nearest."""
    target, scales, _ = problem(40, 8)
    X = torch.randn(rank, 40)
    X[:, 10:20] = 0
    gram = damped(X.t() @ X, 0.01)
    codes = round_with_feedback(target, scales, gram, torch.randperm(40))
    assert torch.equal(codes[10:20].long(), nearest(target, scales)[10:20])
    assert torch.equal(refine(codes, target, scales, gram)[10:20], codes[10:20])
    assert loss(codes, target, scales, gram).sum() <= loss(nearest(target, scales), target, scales, gram).sum()


def test_inputs_as_good_as_zero_are_rounded_to_nearest() -> None:
    target, scales, _ = problem(40, 8)
    X = 1e-20 * torch.randn(100, 40)
    gram = damped(X.t() @ X, 0.01)
    codes = refine(round_with_feedback(target, scales, gram), target, scales, gram)
    assert torch.equal(codes.long(), nearest(target, scales))


def test_a_gram_that_is_not_positive_definite_is_an_error() -> None:
    with pytest.raises(torch.linalg.LinAlgError):
        round_with_feedback(torch.ones(2, 2), torch.ones(2, 2), -torch.eye(2))


def test_zero_scales_and_zero_weights_make_zeros() -> None:
    target, scales, gram = problem(32, 4)
    scales[:, 0] = 0
    target[:, 1] = 0
    codes = refine(round_with_feedback(target, scales, gram), target, scales, gram)
    values = Nearest(scales).values(codes)
    assert values.isfinite().all()
    assert (values[:, :2] == 0).all()
    assert (codes[:, 0] == reference.ZERO_CODE).all()


def test_scales_too_small_to_divide_by_do_no_harm() -> None:
    """1 / 1e-40 is infinite in float32."""
    target = torch.tensor([[0.0], [1e-40], [-1e-40]])
    scales = torch.full((3, 1), 1e-40)
    codes = round_with_feedback(target, scales, torch.eye(3))
    assert (Nearest(scales).values(codes) - target).abs().max() <= 1e-40


def test_what_is_given_stays() -> None:
    target, scales, gram = problem(70, 3)
    copies = [tensor.clone() for tensor in (target, scales, gram)]
    codes = round_with_feedback(target, scales, gram)
    before = codes.clone()
    refine(codes, target, scales, gram)
    assert torch.equal(codes, before)
    refit_scales(codes, target, scales[:1].clone(), gram)
    assert all(torch.equal(*pair) for pair in zip((target, scales, gram), copies, strict=True))

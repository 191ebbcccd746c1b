"""Layers that read the same inputs, rounded together: bitsandbytes' own unpacking and the textbook as oracles."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import textbook
import torch
from bitsandbytes.functional import dequantize_4bit
from textbook import corrected
from torch import Tensor

from hf_qlora import NF4Config
from hf_qlora.quant import reference
from hf_qlora.quant.calibrate import group
from hf_qlora.quant.calibrate.feedback import ridge
from hf_qlora.quant.calibrate.grams import Grams, full_float32
from hf_qlora.quant.calibrate.group import Method, Packed
from hf_qlora.quant.codebook import nf4_levels
from hf_qlora.quant.dequantize import block_scales, dequantize_weight
from hf_qlora.quant.packing import quantize_weight
from hf_qlora.validation import ConfigError


NOTHING = Method(correction=False)


def round_group(weights: list[Tensor], gram: Tensor, cross: Tensor | None, *args: Any, **options: Any) -> list[Packed]:
    """Of copies of the Gram matrices, which are used up."""
    return group.round_group(weights, gram.clone(), None if cross is None else cross.clone(), *args, **options)


def inputs(tokens: int, K: int) -> Tensor:
    return torch.randn(tokens, K) @ (torch.eye(K) + 0.5 * torch.randn(K, K) / K**0.5)


def gram_of(X: Tensor) -> Tensor:
    return X.t() @ X


def codes_of(packed: Packed) -> Tensor:
    return reference.unpack(packed[0].view(-1), packed[1].shape.numel()).view(packed[1].shape)


def values_of(packed: Packed) -> Tensor:
    """Levels times scales, as the engine has it."""
    codes, state = packed
    levels = nf4_levels()[reference.unpack(codes.view(-1), state.shape.numel()).int()]
    scales = block_scales(state).repeat_interleave(state.blocksize)[: len(levels)]
    return (levels * scales).view(state.shape)


def loss(packed: Packed, target: Tensor, gram: Tensor) -> float:
    rest = (values_of(packed) - target).double()
    return float(((rest @ gram.double()) * rest).sum())


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("N", "K", "block_size"),
    [(8, 64, 32), (3, 128, 64), (5, 96, 64), (7, 37, 32), (3, 5, 64), (6, 64, 4096), (300, 64, 64)],
    ids=str,
)
def test_what_is_packed_is_what_was_meant(N: int, K: int, block_size: int, dtype: torch.dtype, nested: bool) -> None:
    """Ragged rows and odd numbers of weights among them; bitsandbytes reads one long row right on any processor."""
    config = NF4Config(block_size=block_size, double_quant=nested)
    weight = torch.randn(N, K)
    [(codes, state)] = round_group([weight], gram_of(inputs(4 * K, K)), None, config, Method(), dtype=dtype)
    assert (state.shape, state.dtype, state.nested, state.blocksize) == (weight.shape, dtype, nested, block_size)
    assert codes.dtype == torch.uint8
    assert codes.shape == (-(-weight.numel() // 2), 1)
    meant = values_of((codes, state)).to(dtype)
    assert torch.equal(dequantize_weight(codes, state), meant)
    if N * K % 2 == 0:
        state.shape = torch.Size((1, N * K))
        assert torch.equal(dequantize_4bit(codes, state).view(N, K), meant)
    # No farther than nearest is by more than what correlated inputs ask for: the scales belong to the right blocks.
    plain = dequantize_weight(*quantize_weight(weight, config), torch.float32)
    assert (meant.float() - weight).square().mean() < 4 * (plain - weight).square().mean()


def test_codes_are_sought_for_the_dtype_of_the_products() -> None:
    """Which is the weights' own, unless the config says another; the state says the weights' in any case."""
    weight, gram = torch.randn(16, 64), gram_of(inputs(256, 64))

    def rounded(compute: str | None, dtype: torch.dtype) -> Packed:
        [packed] = round_group([weight], gram, None, NF4Config(compute_dtype=compute), Method(), dtype=dtype)
        assert packed[1].dtype == dtype
        return packed

    wide, narrow = rounded(None, torch.float32), rounded(None, torch.bfloat16)
    assert not torch.equal(wide[0], narrow[0])
    assert torch.equal(rounded("bfloat16", torch.float32)[0], narrow[0])
    assert torch.equal(rounded("float32", torch.bfloat16)[0], wide[0])


@pytest.mark.parametrize("method", [Method(), Method(order="given", refits=0, passes=0)], ids=["default", "plain"])
@pytest.mark.parametrize("K", [64, 96])
def test_it_has_less_error_than_nearest(K: int, method: Method) -> None:
    weight, gram = torch.randn(16, K), gram_of(inputs(4 * K, K))
    [packed] = round_group([weight], gram, None, NF4Config(), method, dtype=torch.float32)
    assert loss(packed, weight, gram) < 0.9 * loss(quantize_weight(weight, NF4Config()), weight, gram)


def test_with_the_identity_codes_are_the_nearest_to_the_scales() -> None:
    weight = torch.randn(16, 128)
    for nested, K in itertools.product([True, False], [64, 40]):
        config, part = NF4Config(double_quant=nested), weight[:, :K].contiguous()
        method = Method(refits=0, damping=1e-9)
        [packed] = round_group([part], torch.eye(K), None, config, method, dtype=torch.float32)
        plain = quantize_weight(part, config)
        assert torch.equal(block_scales(packed[1]), block_scales(plain[1]))
        scales = block_scales(packed[1]).repeat_interleave(64)[: part.numel()].view(part.shape)
        table = nf4_levels().view(16, 1, 1) * scales
        assert torch.equal(values_of(packed), table.gather(0, (table - part).abs().argmin(0)[None])[0])


def test_the_correction_is_ridge_regression() -> None:
    K, tokens, damping = 24, 60, 0.1
    X0 = inputs(tokens, K)
    X = X0 + 0.3 * torch.randn(tokens, K)
    target = torch.randn(K, 10)
    found = target.clone()
    group._correct(found, [slice(0, 4), slice(4, 10)], gram_of(X), X.t() @ X0 - gram_of(X), damping)
    # Gram matrices in float32, and a condition of some tens.
    torch.testing.assert_close(found.double(), corrected(target, X, X0, damping), rtol=1e-4, atol=1e-4)


METHODS = [
    Method(refits=0, passes=0),
    Method(refits=0, passes=0, damping=0.3),
    Method(refits=0, passes=0, correction_damping=0.9),
    Method(refits=0, passes=0, damping=0.001, correction_damping=0.01),
    Method(refits=0, passes=0, order="given"),
    Method(refits=0, passes=0, correction=False),
    Method(refits=0, passes=2),
    Method(damping=0.1, refits=2),
    Method(),
]


@pytest.fixture(scope="module")
def problem() -> tuple[Tensor, Tensor, Tensor]:
    """A weight, (N, K), X and X₀; some inputs are a hundred times others, in no order."""
    torch.manual_seed(0)
    K, tokens = 128, 400
    X0 = inputs(tokens, K) * torch.logspace(-1, 1, K)[torch.randperm(K)]
    X = X0 + 0.3 * X0.std(0) * torch.randn(tokens, K)
    return torch.randn(24, K), X, X0


def alike(one: Tensor, other: Tensor) -> float:
    return float((one == other).double().mean())


def test_each_setting_makes_the_codes_that_the_textbook_makes_with_it_and_with_no_other(
    problem: tuple[Tensor, Tensor, Tensor],
) -> None:
    weight, X, X0 = problem
    expected = [textbook.rounded(weight.t(), X, X0, method, 64) for method in METHODS]
    for number, (method, (codes, scales)) in enumerate(zip(METHODS, expected, strict=True)):
        [packed] = round_group(
            [weight], gram_of(X), X.t() @ X0, NF4Config(double_quant=False), method, dtype=torch.float32
        )
        # Float32 breaks perhaps one tie of 3,000 otherwise, which changes a third of its row, of 24.
        assert alike(codes_of(packed), codes.t()) > 0.98, method
        close = block_scales(packed[1]).double().isclose(scales.t().reshape(-1), rtol=1e-4)
        assert close.double().mean() > 0.95, method
        others = [alike(codes, other) for other, _ in expected[:number] + expected[number + 1 :]]
        assert max(others) < 0.96, "the problem must tell the settings apart"


def test_the_correction_reaches_the_codes() -> None:
    K, tokens = 64, 400
    X0 = inputs(tokens, K)
    X = X0 + 0.3 * torch.randn(tokens, K)
    T = torch.randn(8, K)

    def error(method: Method) -> float:
        [packed] = round_group([T], gram_of(X), X.t() @ X0, NF4Config(), method, dtype=torch.float32)
        return float((X @ values_of(packed).t() - X0 @ T.t()).norm())

    assert error(Method()) < 0.95 * error(NOTHING)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
@pytest.mark.parametrize("K", [128, 100])
def test_what_lies_on_the_levels_stays(K: int, nested: bool, dtype: torch.dtype) -> None:
    """Base scales kept, no correction, nothing to change: inputs that are all alike are the hardest."""
    config = NF4Config(double_quant=nested)
    base = quantize_weight(torch.randn(32, K).to(dtype), config)
    X = torch.randn(1, K) + 0.01 * torch.randn(4 * K, K)
    weight = dequantize_weight(*base).float()
    [packed] = round_group([weight], gram_of(X), None, config, NOTHING, dtype=dtype, scales=[base[1]])
    assert torch.equal(codes_of(packed), codes_of(base))
    assert torch.equal(block_scales(packed[1]), block_scales(base[1]))


def test_base_scales_are_not_the_base_s_own() -> None:
    """`.to(device)` moves a state in place: a merged model that moves must leave the base where it is."""
    base = quantize_weight(torch.randn(8, 64), NF4Config())
    weight = torch.randn(8, 64)
    [(_, state)] = round_group(
        [weight], torch.eye(64), None, NF4Config(), Method(), dtype=torch.float32, scales=[base[1]]
    )
    assert state is not base[1]
    assert state.state2 is not base[1].state2


@pytest.mark.parametrize("method", [Method(), Method(refits=0), Method(order="given", passes=2)], ids=str)
def test_siblings_together_are_each_alone(method: Method) -> None:
    """Rows of a weight do not see each other: only a product of another shape may be summed in another order."""
    K = 96 if method.refits == 0 else 128
    X0 = inputs(5 * K, K)
    X = X0 + 0.1 * torch.randn_like(X0)
    gram, cross = gram_of(X), X.t() @ X0
    weights = [torch.randn(N, K) for N in (5, 16, 1)]
    together = round_group(weights, gram, cross, NF4Config(), method, dtype=torch.float32)
    for weight, packed in zip(weights, together, strict=True):
        [alone] = round_group([weight], gram, cross, NF4Config(), method, dtype=torch.float32)
        # One tie in a thousand broken otherwise changes the rest of its row; rows are few.
        assert (codes_of(packed) == codes_of(alone)).double().mean() > 0.98
        assert loss(packed, weight, gram) == pytest.approx(loss(alone, weight, gram), rel=1e-3)


def test_zero_blocks_rows_and_weights_stay_zero() -> None:
    weight = torch.randn(6, 128)
    weight[0] = 0
    weight[1, :64] = 0
    [flat] = round_group(
        [weight], gram_of(inputs(600, 128)), None, NF4Config(double_quant=False), Method(), dtype=torch.float32
    )
    assert (values_of(flat)[0] == 0).all()
    [none] = round_group(
        [torch.zeros(4, 64)], gram_of(inputs(300, 64)), None, NF4Config(), Method(), dtype=torch.float32
    )
    assert (values_of(none) == 0).all()


def test_no_input_was_ever_other_than_zero() -> None:
    """Then it is nearest, to the scales that there are."""
    weight, config = torch.randn(6, 128), NF4Config(double_quant=False)
    [packed] = round_group(
        [weight], torch.zeros(128, 128), torch.zeros(128, 128), config, Method(refits=0), dtype=torch.float32
    )
    assert torch.equal(codes_of(packed), codes_of(quantize_weight(weight, config)))


@pytest.mark.parametrize("damping", [0.01, 1e-9, 1e-30])
@pytest.mark.parametrize("rank", [1, 3])
def test_fewer_tokens_than_inputs_are_survived_at_any_damping(rank: int, damping: float) -> None:
    weight = torch.randn(6, 128)
    X = 100 * torch.randn(rank, 1) @ torch.randn(1, 128) + torch.randn(rank, 128)
    method = Method(damping=damping, correction_damping=damping)
    gram, cross = gram_of(X), X.t() @ (X + 0.1 * torch.randn_like(X))
    [packed] = round_group([weight], gram, cross, NF4Config(), method, dtype=torch.float32)
    assert values_of(packed).isfinite().all()


def test_outliers_among_the_inputs_are_survived() -> None:
    """As language models have them: one input a thousand times the others."""
    X = inputs(500, 128)
    X[:, 3] *= 1000
    weight, gram = torch.randn(16, 128), gram_of(X)
    [packed] = round_group([weight], gram, None, NF4Config(), Method(), dtype=torch.float32)
    assert loss(packed, weight, gram) < 0.5 * loss(quantize_weight(weight, NF4Config()), weight, gram)


@pytest.mark.parametrize(
    "values",
    [
        {"damping": 0},
        {"damping": float("nan")},
        {"correction_damping": -1},
        {"refits": -1},
        {"passes": 0.5},
        {"order": "best"},
    ],
    ids=str,
)
def test_a_method_that_is_none_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        Method(**values)


def test_the_damping_is_of_the_mean_diagonal() -> None:
    gram = torch.diag(torch.tensor([1.0, 3.0]))
    assert ridge(gram, 0.5) == 1.0
    assert torch.equal(gram, torch.diag(torch.tensor([1.0, 3.0])))


@pytest.mark.parametrize(("K", "config"), [(128, NF4Config()), (136, NF4Config(double_quant=False))])
def test_some_outputs_at_a_time_are_rounded_as_all_at_once(
    K: int, config: NF4Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slabs that end within a layer, and at its end; rows of whole blocks, and not."""
    weights, X = [torch.randn(24, K), torch.randn(40, K)], inputs(4 * K, K)
    gram, cross = gram_of(X), X.t() @ (X + 0.1 * torch.randn_like(X))
    whole = round_group(weights, gram, cross, config, Method(), dtype=torch.float32)
    for outputs in (7, 24, 1):
        monkeypatch.setattr(group, "SLAB_BYTES", outputs * 4 * K)
        for found, expected in zip(
            round_group(weights, gram, cross, config, Method(), dtype=torch.float32), whole, strict=True
        ):
            # products of other shapes round otherwise: hardly a code is so near a midpoint
            assert (found[0] != expected[0]).float().mean() < 0.01
            assert torch.allclose(found[1].absmax.float(), expected[1].absmax.float(), rtol=0.02, atol=2)


def test_products_are_in_full_float32_whatever_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the matrices, and of what is solved with them; afterwards all is as it was."""
    torch.set_float32_matmul_precision("medium")
    seen: list[str] = []
    addmm = Tensor.addmm_
    monkeypatch.setattr(Tensor, "addmm_", lambda *args, **options: seen.append(allowed()) or addmm(*args, **options))
    try:
        before = allowed()
        X = torch.randn(8, 4)
        Grams(torch.zeros(4, 4), torch.zeros(4, 4), None).add(X, X)
        with full_float32():
            seen.append(allowed())
        assert (allowed(), torch.get_float32_matmul_precision()) == (before, "medium")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {"ieee, ieee"}
    assert before != "ieee, ieee"


def allowed() -> str:
    return f"{torch.backends.cuda.matmul.fp32_precision}, {torch.backends.mkldnn.matmul.fp32_precision}"

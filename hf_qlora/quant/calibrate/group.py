"""Layers that read the same inputs, rounded together: from weights and Gram matrices to packed codes.

With X the inputs that the quantized model produces, (tokens, K), X₀ those of the model that it stands for, and T the
weights:

    H = Xᵀ X,   D = Xᵀ X₀,   T' = T + T (D − H)ᵀ (H + μI)⁻¹

T' is the weight whose products X T'ᵀ come nearest to X₀ Tᵀ: it makes up for what earlier layers got wrong (which
GPTAQ, arXiv 2504.02692, and Qronos, arXiv 2505.11695, do too, each in its own way). T' is rounded: its blocks' absmax,
written as they are stored, are the scales; codes are found for these by error feedback, the inputs that weigh most
first; then the scales are fitted to the codes, written, and the codes gone through again.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.functional import QuantState
from torch import Tensor

from hf_qlora.config import NF4Config
from hf_qlora.quant.calibrate.feedback import Feedback, refine, refit_scales, ridge
from hf_qlora.quant.codebook import nf4_levels
from hf_qlora.quant.dequantize import block_scales
from hf_qlora.quant.packing import nest_scales, share_tables
from hf_qlora.quant.reference import pack
from hf_qlora.validation import ConfigError


Packed = tuple[Tensor, QuantState]

SLAB_BYTES = 2**25  # of the weights, in float32, that are rounded at a time; it takes some ten times that


@dataclass(frozen=True, kw_only=True)
class Method:
    """How weights are rounded. `hf-qlora bench calibrated-nf4 --part methods` compares others.

    Attributes:
        cap: a token whose inputs' norm is above so many times the median counts as if it were that; None: never.
            (Models make inputs of a text's first tokens in some layers that are hundreds of times as large.)
        correction: make up for what earlier layers got wrong; without it T' = T.
        damping: λ of H + λI, which codes are sought for, as a share of H's mean diagonal.
        correction_damping: μ, likewise.
        order: "activation", the inputs with the largest H first, or "given".
        refits: how often scales are fitted to the codes, where rows are whole blocks.
        passes: how often codes are gone through again, after each fit of the scales and at least once.
    """

    cap: float | None = None
    correction: bool = True
    damping: float = 0.01
    correction_damping: float = 0.1
    order: str = "activation"
    refits: int = 1
    passes: int = 1

    def __post_init__(self) -> None:
        for name in ("damping", "correction_damping"):
            if not 0 < (value := getattr(self, name)) < float("inf"):
                raise ConfigError(f"{name}={value!r} must be a positive number, such as 0.01.")
        if self.cap is not None and not 0 < self.cap < float("inf"):
            raise ConfigError(f"cap={self.cap!r} must be a positive number, such as 3.0, or None.")
        for name in ("refits", "passes"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ConfigError(f"{name}={value!r} must be a whole number, 0 or more.")
        if self.order not in ("activation", "given"):
            raise ConfigError(f"order={self.order!r} is not known; choose 'activation' or 'given'.")


def round_group(
    weights: Sequence[Tensor],
    gram: Tensor,
    cross: Tensor | None,
    config: NF4Config,
    method: Method,
    *,
    dtype: torch.dtype,
    scales: Sequence[QuantState] | None = None,
) -> list[Packed]:
    """Round the weights of layers that read the same inputs.

    Args:
        weights: T of each, (out_features, in_features), of a floating dtype.
        gram: H, (K, K), float32.
        cross: D, (K, K), float32; None where X₀ = X. Both are used up, to take no more memory than must be.
        dtype: of the weights; without a compute dtype in the config, that of the products too.
        scales: of each weight, to be kept as they are, instead of its own.

    Returns:
        for each, the packed codes and their state, as `quantize_weight` gives them.
    """
    target, widths = _side_by_side(weights), [len(weight) for weight in weights]
    compute: Any = config.compute_dtype or dtype
    slabs = _slabs(target)
    order = gram.diagonal().argsort(descending=True, stable=True) if method.order == "activation" else None
    if method.correction and cross is not None:
        _correct(target, slabs, gram, cross.sub_(gram), method.correction_damping)
    del cross
    if scales is None:
        states = [
            _state(_absmax(part.t(), config.block_size), part.t().shape, dtype, config)
            for part in target.split(widths, 1)
        ]
    else:
        states = [_copied(state) for state in scales]
    gram.diagonal().add_(ridge(gram, method.damping))
    feedback = Feedback(gram, order)
    codes = torch.empty_like(target, dtype=torch.uint8)
    for slab in slabs:
        codes[:, slab] = feedback(target[:, slab], _spread(states, slab), compute)
    del feedback
    fits = method.refits if scales is None and target.shape[0] % config.block_size == 0 else 0
    for _ in range(fits):
        states = _refitted(codes, target, states, slabs, gram, config)
        for _ in range(method.passes):
            _refine(codes, target, states, slabs, gram, compute)
    for _ in range(0 if fits else method.passes):
        _refine(codes, target, states, slabs, gram, compute)
    parts = codes.split(widths, 1)
    return [(pack(part.t().reshape(-1)).view(-1, 1), state) for part, state in zip(parts, states, strict=True)]


def _side_by_side(weights: Sequence[Tensor]) -> Tensor:
    """All of them transposed, (K, ΣN), float32."""
    widths = [len(weight) for weight in weights]
    result = torch.empty(weights[0].shape[1], sum(widths), dtype=torch.float32, device=weights[0].device)
    for part, weight in zip(result.split(widths, 1), weights, strict=True):
        part.copy_(weight.t())
    return result


def _slabs(target: Tensor) -> list[slice]:
    """Outputs do not know of each other: some at a time bound what rounding them takes beside the weights."""
    K, N = target.shape
    width = max(1, SLAB_BYTES // (4 * K))
    return [slice(start, min(start + width, N)) for start in range(0, N, width)]


def _correct(target: Tensor, slabs: Sequence[slice], gram: Tensor, difference: Tensor, damping: float) -> None:
    """T' in place of T; the difference is D − H."""
    factor = gram.to(torch.float64, copy=True).mT  # symmetric, and so it lies as LAPACK has it
    factor.diagonal().copy_(gram.diagonal() + ridge(gram, damping))
    torch.linalg.cholesky(factor, out=factor)
    for slab in slabs:
        part = target[:, slab]
        solved = torch.linalg.solve_triangular(factor, (difference @ part).double(), upper=False)
        part += torch.linalg.solve_triangular(factor.mT, solved, upper=True).to(target.dtype)


def _refine(
    codes: Tensor, target: Tensor, states: Sequence[QuantState], slabs: Sequence[slice], H: Tensor, dtype: torch.dtype
) -> None:
    """Codes that are no worse, up to roundings, in place."""
    for slab in slabs:
        codes[:, slab] = refine(codes[:, slab], target[:, slab], _spread(states, slab), H, dtype)


def _absmax(weight: Tensor, block_size: int) -> Tensor:
    """The largest magnitude of each block of the flat weight, (blocks,)."""
    flat = weight.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % block_size)).view(-1, block_size).abs().amax(1)


def _state(scales: Tensor, shape: torch.Size, dtype: torch.dtype, config: NF4Config) -> QuantState:
    """How a weight is packed with given scales, (blocks,), which double quantization may round."""
    state = QuantState(
        absmax=scales.contiguous(),
        shape=shape,
        dtype=dtype,
        blocksize=config.block_size,
        code=nf4_levels(scales.device),
        quant_type=config.quant_type,
    )
    if config.double_quant:
        nest_scales(state)
    share_tables(state)
    return state


def _copied(state: QuantState) -> QuantState:
    """Moving a layer moves its state in place, and the base's must stay."""
    result = copy.deepcopy(state)
    share_tables(result)
    return result


def _spread(states: Sequence[QuantState], slab: slice) -> Tensor:
    """The scale of each weight of some outputs, of all layers side by side, (K, outputs)."""
    parts, first = [], 0
    for state in states:
        N, K = state.shape
        rows = range(max(slab.start - first, 0), min(slab.stop - first, N))
        if rows:
            scales = block_scales(state)
            flat = torch.arange(rows.start * K, rows.stop * K, device=scales.device)
            parts.append(scales[flat // state.blocksize].view(-1, K).t())
        first += N
    return torch.cat(parts, 1)


def _refitted(
    codes: Tensor,
    target: Tensor,
    states: Sequence[QuantState],
    slabs: Sequence[slice],
    gram: Tensor,
    config: NF4Config,
) -> list[QuantState]:
    flat = torch.cat([block_scales(state).view(state.shape[0], -1).t() for state in states], 1)
    for slab in slabs:
        flat[:, slab] = refit_scales(codes[:, slab], target[:, slab], flat[:, slab], gram)
    return [
        _state(part.t().reshape(-1), state.shape, state.dtype, config)
        for part, state in zip(flat.split([state.shape[0] for state in states], 1), states, strict=True)
    ]

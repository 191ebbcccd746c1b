"""Rounding a weight to given levels so that its products stay right, not its values.

For a target T, (N, K), inputs with Gram matrix H = Xᵀ X, (K, K), and scales S, codes are sought that make

    ‖X (Q − T)ᵀ‖² = tr (Q − T) H (Q − T)ᵀ,   Q = NF4 level[codes] · S

small. With H = I, that is rounding to nearest.

    round_with_feedback   goes through the inputs one by one, rounds a column to nearest, and lets the columns that are
                          still to come make up for what was lost (GPTQ, arXiv 2210.17323, with a table of levels in
                          place of a grid)
    refine                goes through them again: each weight moves to the best level while all others stay
                          (coordinate descent, as QuantEase, arXiv 2309.01885), so that a row's error falls or stays.
                          That is up to roundings: levels are chosen before they are rounded to the layer's dtype, and
                          in bfloat16 one row in a thousand has risen, by 0.2 % at most
    refit_scales          the best scales for given codes, by least squares, row by row

Weights are held transposed, (K, N): what is read and written together is then contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_qlora.quant.codebook import nf4_levels


SMALLEST = 1e-30  # mean of a Gram matrix's diagonal: below, its reciprocal times a weight may be past float32
STRIPE = 64  # columns whose corrections are gathered before they reach the rest of the weight


def ridge(gram: Tensor, damping: float) -> float:
    """What is added to H's diagonal, damping · mean(diag H): text leaves many directions with few samples or none.

    Where inputs were never other than zero, or so small that 1 / H is past float32, 1. A float32 Gram matrix of K
    inputs is known to some K roundings of its mean, and may be indefinite by as much, so damping is that at least.
    """
    mean = float(gram.diagonal().double().mean())
    known = len(gram) * torch.finfo(torch.float32).eps
    return max(damping, known) * mean if mean > SMALLEST else 1.0


def round_with_feedback(
    target: Tensor,
    scales: Tensor,
    gram: Tensor,
    order: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Codes of a weight, by error feedback.

    Args:
        target: Tᵀ, (K, N), float32.
        scales: the scale of each weight, (K, N), float32; zero and negative ones too.
        gram: H, (K, K), positive definite.
        order: the inputs in the order in which to go through them, (K,); as they are by default.
        dtype: that the values of the codes will be rounded to.

    Returns:
        (K, N), uint8.

    Raises:
        torch.linalg.LinAlgError: H is not positive definite.
    """
    return Feedback(gram, order)(target, scales, dtype)


class Feedback:
    """Error feedback over inputs with a Gram matrix, for any number of weights; arguments as above."""

    def __init__(self, gram: Tensor, order: Tensor | None = None) -> None:
        self.order = order
        upper = _inverse_factor(gram, order)
        upper /= upper.diagonal().clone().unsqueeze(1)  # what one step of error asks of the columns to come
        self.upper = upper.to(gram.dtype, memory_format=torch.contiguous_format)

    def __call__(self, target: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        if self.order is None:
            return self._in_order(target.clone(), scales, dtype)
        codes = torch.empty_like(target, dtype=torch.uint8)
        codes[self.order] = self._in_order(target[self.order], scales[self.order], dtype)
        return codes

    def _in_order(self, rest: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        codes, nearest = torch.empty_like(rest, dtype=torch.uint8), Nearest(scales, dtype)
        for start in range(0, len(rest), STRIPE):
            stop = min(start + STRIPE, len(rest))
            stripe, U = rest[start:stop], self.upper[start:stop, start:stop]
            errors = torch.empty_like(stripe)
            for j in range(stop - start):
                codes[start + j], values = nearest(start + j, stripe[j])
                torch.sub(stripe[j], values, out=errors[j])
                stripe[j + 1 :].addr_(U[j, j + 1 :], errors[j], alpha=-1)
            rest[stop:].addmm_(self.upper[start:stop, stop:].t(), errors, alpha=-1)
        return codes


def refine(codes: Tensor, target: Tensor, scales: Tensor, gram: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Codes that are no worse, up to roundings (see the module), by one pass of coordinate descent.

    Arguments as for `round_with_feedback`.
    """
    nearest = Nearest(scales, dtype)
    codes, values = codes.clone(), nearest.values(codes)
    slope = gram @ (values - target)
    curvature = gram.diagonal().tolist()
    for start in range(0, len(values), STRIPE):
        stop = min(start + STRIPE, len(values))
        near, moved, H = slope[start:stop].clone(), torch.empty_like(slope[start:stop]), gram[start:stop, start:stop]
        for j in range(stop - start):
            i = start + j
            codes[i], best = nearest(i, torch.sub(values[i], near[j], alpha=1 / curvature[i]))
            torch.sub(best, values[i], out=moved[j])
            near.addr_(H[:, j], moved[j])
        slope.addmm_(gram[:, start:stop], moved)
    return codes


def refit_scales(codes: Tensor, target: Tensor, scales: Tensor, gram: Tensor, trust: float = 0.01) -> Tensor:
    """The best scales for given codes, of a weight whose rows are whole blocks.

    Args:
        codes, target: (K, N).
        scales: what they are, (K / block size, N).
        trust: how much they are held where they are, as a share of the mean curvature.

    Returns:
        (K / block size, N); some may be negative.
    """
    blocks, N = scales.shape
    size = len(codes) // blocks
    levels = nf4_levels(codes.device)[codes.int()]
    parts = levels.view(blocks, size, N)
    curvature = torch.stack(  # [a, b, n] = what the blocks a and b of row n have to do with each other
        [((gram[:, b * size : (b + 1) * size] @ parts[b]).view(blocks, size, N) * parts).sum(1) for b in range(blocks)]
    )
    rest = target - levels * scales.repeat_interleave(size, 0)
    slope = ((gram @ rest).view(blocks, size, N) * parts).sum(1)
    curvature = curvature.permute(2, 0, 1).contiguous()
    diagonal = curvature.diagonal(dim1=1, dim2=2)
    diagonal.add_(diagonal.mean(1, keepdim=True).mul(trust).clamp(min=1e-30))  # rows of zeros have none
    step: Tensor = torch.linalg.solve(curvature, slope.t().unsqueeze(-1)).squeeze(-1)
    return scales + step.t()


class Nearest:
    """The nearest levels of a weight's columns, with given scales, (K, N); a scale of zero makes zeros.

    Their values are those that the layer will multiply by: rounded to the dtype of its products. In bfloat16 what is
    lost so adds up, over inputs that are alike, to steps of the codes.
    """

    def __init__(self, scales: Tensor, dtype: torch.dtype = torch.float32) -> None:
        self.levels = nf4_levels(scales.device)
        self.midpoints = (self.levels[1:] + self.levels[:-1]) / 2
        self.scales, self.dtype = scales, dtype
        self.inverse = torch.where(scales == 0, 0.0, 1 / scales)

    def __call__(self, i: int, column: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and values for column i, (N,)."""
        codes = torch.bucketize(column * self.inverse[i], self.midpoints, out_int32=True)
        return codes, self._as_stored(self.levels.index_select(0, codes) * self.scales[i])

    def values(self, codes: Tensor) -> Tensor:
        """What codes stand for, (K, N)."""
        return self._as_stored(self.levels[codes.int()] * self.scales)

    def _as_stored(self, values: Tensor) -> Tensor:
        return values.to(self.dtype).to(values.dtype)


def _inverse_factor(gram: Tensor, order: Tensor | None) -> Tensor:
    """U, upper triangular, with Uᵀ U = H⁻¹, in float64; all in the memory of one matrix.

    LAPACK's matrices lie column by column, and torch copies others. H is symmetric: its transpose lies so, and is H.
    """
    H = gram if order is None else gram.index_select(0, order).index_select(1, order)
    work = H.to(torch.float64, copy=True).mT
    del H
    torch.linalg.cholesky(work, out=work)
    torch.cholesky_inverse(work, out=work)
    torch.linalg.cholesky(work, upper=True, out=work)
    return work

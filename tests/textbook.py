"""Calibrated rounding step by step in float64, as papers and textbooks have it: what the fast one is held against.

Weights are transposed here, (K, N), as in `hf_qlora.quant.calibrate.feedback`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hf_qlora.quant.calibrate.group import Method
from hf_qlora.quant.codebook import nf4_levels


def levels(codes: Tensor, scales: Tensor) -> Tensor:
    return nf4_levels().double()[codes.long()] * scales.double()


def loss(codes: Tensor, target: Tensor, scales: Tensor, gram: Tensor) -> Tensor:
    """tr (Q − T) H (Q − T)ᵀ, by weight row, (N,)."""
    rest = levels(codes, scales) - target.double()
    return (rest * (gram.double() @ rest)).sum(0)


def nearest(values: Tensor, scales: Tensor) -> Tensor:
    """The code whose value is nearest, of all 16, the lower where two are."""
    table = nf4_levels().double().view(16, 1, 1) * scales.double()
    return (table - values.double()).abs().argmin(0)


def corrected(target: Tensor, X: Tensor, X0: Tensor, damping: float) -> Tensor:
    """T' by numpy's lstsq on stacked rows: min ‖X T'ᵀ − X₀ Tᵀ‖² + μ̄ ‖T' − T‖², μ̄ = μ · mean diag Xᵀ X."""
    rows, old, T = X.double().numpy(), X0.double().numpy(), target.double().numpy()
    ridge = (damping * np.square(rows).sum(0).mean()) ** 0.5
    A, b = np.concatenate([rows, ridge * np.eye(len(T))]), np.concatenate([old @ T, ridge * T])
    return torch.from_numpy(np.linalg.lstsq(A, b, rcond=None)[0])


def surgeon(target: Tensor, scales: Tensor, gram: Tensor, order: Sequence[int]) -> Tensor:
    """Optimal brain surgeon, column by column: the inverse Hessian of the columns that remain is computed anew."""
    rest, codes, H = target.double().clone(), torch.zeros(target.shape, dtype=torch.long), gram.double()
    left = list(order)
    while left:
        inverse = torch.linalg.inv(H[left][:, left])
        i = left[0]
        codes[i] = nearest(rest[i : i + 1], scales[i : i + 1])[0]
        error = (rest[i] - levels(codes[i], scales[i])) / inverse[0, 0]
        rest[left] -= inverse[:, :1] * error
        left = left[1:]
    return codes


def descended(codes: Tensor, target: Tensor, scales: Tensor, gram: Tensor) -> Tensor:
    """Each weight in turn at the level that is best while all others stay."""
    codes, H = codes.clone().long(), gram.double()
    for i in range(len(codes)):
        others = levels(codes, scales) - target.double()
        others[i] = 0
        best = target[i].double() - H[i] @ others / H[i, i]
        codes[i] = nearest(best[None], scales[i : i + 1])[0]
    return codes


def fitted(codes: Tensor, target: Tensor, scales: Tensor, gram: Tensor, trust: float = 0.01) -> Tensor:
    """Scales, (blocks, N), by lstsq over Lᵀ, H = L Lᵀ; the trust is a row more for each scale."""
    (K, N), blocks = target.shape, len(scales)
    size, root, found = K // blocks, torch.linalg.cholesky(gram.double()).t(), []
    for n in range(N):
        design = torch.zeros(K, blocks, dtype=torch.float64)
        for b in range(blocks):
            rows = slice(b * size, (b + 1) * size)
            design[rows, b] = nf4_levels().double()[codes[rows, n].long()]
        A = root @ design
        weight = (trust * A.square().sum(0).mean()).sqrt()
        stacked = torch.cat([A, weight * torch.eye(blocks, dtype=torch.float64)])
        wanted = torch.cat([root @ target[:, n].double(), weight * scales[:, n].double()])
        found.append(torch.linalg.lstsq(stacked, wanted).solution)
    return torch.stack(found, 1)


def rounded(target: Tensor, X: Tensor, X0: Tensor, method: Method, block_size: int) -> tuple[Tensor, Tensor]:
    """The whole of it, of a weight whose rows are whole blocks: codes, (K, N), and scales, (K / block size, N)."""
    target = target.double()
    if method.correction:
        target = corrected(target, X, X0, method.correction_damping)
    K, N = target.shape
    gram = X.double().t() @ X.double()
    weight = gram.diagonal()
    H = gram + method.damping * weight.mean() * torch.eye(K, dtype=torch.float64)
    order = sorted(range(K), key=lambda i: -float(weight[i])) if method.order == "activation" else range(K)
    scales = target.view(K // block_size, block_size, N).abs().amax(1)
    codes = surgeon(target, scales.repeat_interleave(block_size, 0), H, order)
    for _ in range(method.refits):
        scales = fitted(codes, target, scales, H)
        for _ in range(method.passes):
            codes = descended(codes, target, scales.repeat_interleave(block_size, 0), H)
    for _ in range(0 if method.refits else method.passes):
        codes = descended(codes, target, scales.repeat_interleave(block_size, 0), H)
    return codes, scales

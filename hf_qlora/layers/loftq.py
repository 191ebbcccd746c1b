"""LoftQ in one iteration (arXiv 2310.08659): the adapter starts as the best rank-r approximation of what NF4 lost.

scaling · B A = the first r terms of the SVD of R = W − NF4(W), with A = √S Vᵀ and B = U √S / scaling. The base stays.
Only one side's singular vectors are computed, as eigenvectors of the smaller Gram matrix; the other side follows by a
product with R, so that B A is R projected onto them, whatever the accuracy of S. Many times faster than the full SVD.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_qlora.config import QLoRAConfig
from hf_qlora.layers.fold import rank_and_scaling


def loftq_factors(weight: Tensor, quantized: Tensor, config: QLoRAConfig, name: str) -> tuple[Tensor, Tensor]:
    """`lora_A`, (r, in_features), and `lora_B`, (out_features, r), in float32, for the module called `name`.

    Args:
        weight, quantized (`torch.Tensor`, (out_features, in_features)): the dense weight and its dequantized NF4 form.
    """
    r, scaling = rank_and_scaling(config, name)
    A, B = _best_factors(weight.float() - quantized.float(), r)
    return A, B / scaling


def _best_factors(R: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A (r, K) and B (N, r) of equal norms, B A the best rank-r approximation of R (N, K); zeros beyond its rank."""
    N, K = R.shape
    if N > K:
        A, B = _best_factors(R.t(), r)
        return B.t().contiguous(), A.t().contiguous()
    k = min(r, N)
    squares, vectors = torch.linalg.eigh(R @ R.t())  # ascending
    U = vectors[:, -k:].flip(1)
    root = squares[-k:].flip(0).clamp(min=0).pow(0.25)  # √S
    inverse = torch.where(root > 1e-6 * root.max(), 1 / root, torch.zeros_like(root))
    A, B = R.new_zeros(r, K), R.new_zeros(N, r)
    A[:k], B[:, :k] = inverse[:, None] * (U.t() @ R), U * (root * (inverse > 0))
    return A, B

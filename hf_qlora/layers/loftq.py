"""LoftQ in one iteration (arXiv 2310.08659): the adapter starts as the best rank-r approximation of what NF4 lost.

scaling · B A = the first r terms of the SVD of W − NF4(W), with A = √S Vᵀ and B = U √S / scaling. The base stays.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from hf_qlora.config import QLoRAConfig


def loftq_factors(weight: Tensor, quantized: Tensor, config: QLoRAConfig, name: str) -> tuple[Tensor, Tensor]:
    """`lora_A`, (r, in_features), and `lora_B`, (out_features, r), in float32, for the module called `name`.

    Args:
        weight, quantized (`torch.Tensor`, (out_features, in_features)): the dense weight and its dequantized NF4 form.
    """
    rank_pattern: dict[str, Any] = config.rank_pattern
    alpha_pattern: dict[str, Any] = config.alpha_pattern
    r: int = rank_pattern.get(get_pattern_key(rank_pattern.keys(), name)) or config.r
    alpha: float = alpha_pattern.get(get_pattern_key(alpha_pattern.keys(), name)) or config.lora_alpha
    scaling = alpha / math.sqrt(r) if config.use_rslora else alpha / r
    U, S, Vh = torch.linalg.svd(weight.float() - quantized.float(), full_matrices=False)
    k = min(r, S.numel())
    A = torch.zeros(r, weight.shape[1], device=weight.device)
    B = torch.zeros(weight.shape[0], r, device=weight.device)
    root = S[:k].sqrt()
    A[:k], B[:, :k] = root[:, None] * Vh[:k], U[:, :k] * root / scaling
    return A, B

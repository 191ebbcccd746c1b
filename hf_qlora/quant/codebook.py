"""The two codebooks of a QLoRA base: 16 NF4 levels for weights, 256 dynamic levels for their scales.

NF4 (arXiv 2305.14314). Quantiles of N(0, 1) at evenly spaced probabilities, divided by the largest:
    positive:  Φ⁻¹(p) for the first 8 of 9 points p from 0.9677083 down to ½
    negative: −Φ⁻¹(p) for the first 7 of 8 such points
    and an exact zero, so that zeros of the weight stay zeros.
The paper's text gives another formula; these are the numbers that bitsandbytes ships, so they are constants here and a
test recomputes them from the quantiles (they agree to 1.1e-7).

The dynamic map (arXiv 2110.02861). A signed 8-bit type whose exponent is written in unary, so that each decade has
twice the levels of the one below it:
    ± 10^(i−6) · midpoints of 2^i equal cells of [0.1, 1],  i = 0 … 6,   together with 0 and +1
It is not symmetric: the largest level is 1, the smallest −0.993.

Rejected: building NF4 at import from the quantiles. It would follow the rounding of the installed torch, and a level
one bit off gives other weights than the checkpoint was trained with.
"""

from __future__ import annotations

import torch


NF4_OFFSET = 0.9677083
"""Largest probability whose quantile is a level; Φ⁻¹(0.9677083) = 1.848 standard deviations become ±1."""

NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The NF4 levels, ascending: code 0 is −1, code 7 is 0, code 15 is 1. Each is an fp32 number written in full."""

DYNAMIC_MAP_DECADES = 7
"""Decades of the signed 8-bit dynamic map: 2 · (1 + 2 + … + 64) + 2 = 256 levels."""


def nf4_levels(device: torch.device | str | None = None) -> torch.Tensor:
    """The NF4 levels as a tensor.

    Returns:
        `torch.Tensor` (16,), fp32, ascending.
    """
    return torch.tensor(NF4_LEVELS, dtype=torch.float32, device=device)


def dynamic_map(device: torch.device | str | None = None) -> torch.Tensor:
    """The signed 8-bit dynamic map (arXiv 2110.02861) that nested scales are written in.

    Computed in fp32 throughout, as bitsandbytes does; from fp64, rounded once, 72 levels differ in their last bit.

    Returns:
        `torch.Tensor` (256,), fp32, ascending.
    """
    positive = torch.cat([_decade(exponent) for exponent in range(DYNAMIC_MAP_DECADES)])
    ends = torch.tensor([0.0, 1.0])
    return torch.cat([-positive, ends, positive]).sort().values.to(device)


def _decade(exponent: int) -> torch.Tensor:
    """Positive levels of one decade: midpoints of 2^exponent equal cells of [0.1, 1], scaled by a power of ten."""
    edges = torch.linspace(0.1, 1.0, 2**exponent + 1, dtype=torch.float32)
    midpoints = (edges[:-1] + edges[1:]) / 2
    return midpoints * 10.0 ** (exponent - DYNAMIC_MAP_DECADES + 1)

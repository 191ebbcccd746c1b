"""How concentrated attention is.

The mean attention weight is 1/length for every pattern, so it says nothing. Concentration does:

    c = 1 − mean over heads and rows of H(p) / log n,    H(p) = −Σ p log p over the row's n ≥ 2 visible keys,

0 where all keys weigh the same and 1 where one key has everything. A few query rows of a sequence are enough, so that
no (tokens, tokens) matrix is made.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


ROWS = 8  # query rows looked at in each sequence


@torch.no_grad()
def concentration(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    *,
    seed: int = 0,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    position_bias: Tensor | None = None,
    position_ids: Tensor | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> Tensor | None:
    """c of one layer, a scalar float32 tensor, NaN where no row sees two keys; None where that is not known here.

    Args:
        query, key (`torch.Tensor`, (batch, heads, tokens, head_dim)): keys may have fewer heads, and more tokens.
        mask: as attention functions get it: None, bool or additive (batch, 1 or heads, 1 or tokens, keys), or padding
            (batch, keys).
        seed: chooses the rows.
    """
    (batch, heads, tokens, size), (kv_heads, keys) = query.shape, key.shape[1:3]
    packed = cu_seq_lens_q is not None or (mask is None and _restarts(position_ids))
    if packed or s_aux is not None or keys < tokens or not (mask is None or isinstance(mask, Tensor)):
        return None
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if mask is not None and mask.ndim == 4:
        mask = mask[..., :keys].expand(batch, -1, tokens, -1)
    rows = choose_rows(seed, _real(mask, batch, tokens, keys, query.device))  # (batch, rows)
    chosen = query.gather(2, rows[:, None, :, None].expand(-1, heads, -1, size)).float()
    scores = (chosen.reshape(batch, kv_heads, -1, size) @ key.float().transpose(2, 3)).reshape(batch, heads, -1, keys)
    scores = scores * (size**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    own = rows + (keys - tokens)  # where a row's own token is among the keys
    visible = _visible(mask, rows, own, keys, causal, sliding_window)
    if mask is not None and mask.ndim == 4 and mask.dtype != torch.bool:
        scores = scores + _of_rows(mask, rows).float()
    if position_bias is not None:
        scores = scores + _of_rows(position_bias[..., :keys].expand(batch, -1, tokens, -1), rows).float()
    n = visible.sum(-1)  # (batch, 1 or heads, rows)
    log_p = scores.masked_fill(~visible, -math.inf).log_softmax(-1)
    entropy = -(log_p.exp() * log_p.masked_fill(~visible, 0.0)).sum(-1)  # (batch, heads, rows)
    itself = visible.gather(-1, own[:, None, :, None].expand(*n.shape, 1)).squeeze(-1)  # padding does not see itself
    counts = (itself & (n >= 2)).expand_as(entropy)
    ratio = torch.where(counts, entropy / n.clamp(min=2).float().log(), torch.zeros_like(entropy))
    total = counts.sum()
    return torch.where(total > 0, 1 - ratio.sum() / total.clamp(min=1), torch.full_like(ratio.sum(), math.nan))


def choose_rows(seed: int, real: Tensor) -> Tensor:
    """Rows to look at in each sequence, (batch, `ROWS` or fewer), the `real` ones, (batch, tokens), first."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(real.shape, generator=generator).to(real.device)
    return order.masked_fill(~real, 2.0).argsort(dim=1)[:, :ROWS]


def _real(mask: Tensor | None, batch: int, tokens: int, keys: int, device: torch.device) -> Tensor:
    """Which tokens see themselves, so that they are no padding: (batch, tokens)."""
    if mask is None:
        return torch.ones(batch, tokens, dtype=torch.bool, device=device)
    if mask.ndim == 4:
        own = mask[:, 0].diagonal(keys - tokens, -2, -1)
        return own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2
    return mask[:, keys - tokens : keys].bool()


def _restarts(position_ids: Tensor | None) -> bool:
    """Whether positions fall within a row: several sequences in it."""
    return position_ids is not None and bool((position_ids[..., 1:] < position_ids[..., :-1]).any())


def _of_rows(matrix: Tensor, rows: Tensor) -> Tensor:
    """The chosen rows of (batch, 1 or heads, tokens, keys)."""
    index = rows[:, None, :, None].expand(-1, matrix.shape[1], -1, matrix.shape[3])
    return matrix.gather(2, index)


def _visible(mask: Tensor | None, rows: Tensor, own: Tensor, keys: int, causal: bool, window: int | None) -> Tensor:
    """Which keys the chosen rows see, (batch, 1 or heads, rows, keys)."""
    if mask is not None and mask.ndim == 4:
        part = _of_rows(mask, rows)
        return part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min / 2
    ahead = own[:, :, None] - torch.arange(keys, device=rows.device)
    visible = ahead >= 0 if causal else torch.ones_like(ahead, dtype=torch.bool)
    if window is not None:
        visible = visible & (ahead.abs() < window)
    visible = visible[:, None]
    return visible if mask is None else visible & mask[:, None, None, :keys].bool()

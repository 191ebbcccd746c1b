"""Dropout whose mask is not kept but drawn again, from the same state of the random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def dropped(x: Tensor, dropout: float) -> Tensor:
    """Dropout, whose mask follows the order in memory, and on GPUs the alignment: both the same each time."""
    if not dropout:
        return x
    even = x.contiguous()
    return torch.nn.functional.dropout(even.clone() if even.data_ptr() % 16 else even, dropout)


@contextmanager
def random_again(state: Tensor | None, device: torch.device) -> Iterator[None]:
    """Within it, random numbers are drawn from `state`; afterwards they go on as before."""
    if state is None:
        yield
        return
    before = random_state(device)
    _set_random_state(state, device)
    try:
        yield
    finally:
        _set_random_state(before, device)


def random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)

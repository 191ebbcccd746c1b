"""What an optimizer keeps of each trained parameter, and where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hf_qlora.validation import ConfigError


MIN_8BIT = 4096  # bitsandbytes keeps the state of smaller tensors in float32
MIN_PAGED = 100_000  # and pages none of fewer values
BLOCK = 256  # values that share a scale


@dataclass(frozen=True)
class Optimizer:
    """An optimizer, by the name that `TrainingArguments(optim=...)` has for it.

    Attributes:
        make: torch's over (tensors, whether on CUDA), which the trace runs; None for bitsandbytes', whose steps make
            no tensors.
        bits: of bitsandbytes' two states.
        paged: whether they are in memory that moves to the host when the device is full.
    """

    make: Callable[[Sequence[Tensor], bool], torch.optim.Optimizer] | None = None
    bits: int = 0
    paged: bool = False

    def state_bytes(self, sizes: Sequence[int]) -> tuple[int, int]:
        """Of bitsandbytes' states for tensors of so many values: on the device, and paged."""
        if not self.bits:
            return 0, 0
        device = paged = 0
        small = True
        for size in sizes:
            eight = self.bits == 8 and size >= MIN_8BIT
            state = 2 * size * (1 if eight else 4)
            if eight:
                small = False
                device += 2 * 4 * -(-size // BLOCK)
            if self.paged and size >= MIN_PAGED:
                paged += state
            else:
                device += state
        return device + (0 if small else 2 * 256 * 4), paged  # two tables of codes, shared


def _adamw(tensors: Sequence[Tensor], on_cuda: bool, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(tensors, fused=True) if fused else torch.optim.AdamW(tensors, foreach=on_cuda)


def _sgd(tensors: Sequence[Tensor], on_cuda: bool) -> torch.optim.Optimizer:
    return torch.optim.SGD(tensors, lr=0.1, foreach=on_cuda)


OPTIMIZERS = {
    "adamw_torch": Optimizer(partial(_adamw, fused=False)),
    "adamw_torch_fused": Optimizer(partial(_adamw, fused=True)),
    "adamw_8bit": Optimizer(bits=8),
    "paged_adamw_8bit": Optimizer(bits=8, paged=True),
    "paged_adamw_32bit": Optimizer(bits=32, paged=True),
    "sgd": Optimizer(_sgd),
}


ALIASES = {"adamw_bnb_8bit": "adamw_8bit"}  # of transformers' OptimizerNames


def known_name(name: str) -> str:
    """A key of `OPTIMIZERS`, for a name that `TrainingArguments(optim=...)` has, or a member of `OptimizerNames`.

    Raises:
        ConfigError: it is not known.
    """
    given = str(getattr(name, "value", name))
    found = ALIASES.get(given, given)
    if found not in OPTIMIZERS:
        raise ConfigError(f"optimizer={given!r} is not known; choose one of {tuple(OPTIMIZERS)}.")
    return found

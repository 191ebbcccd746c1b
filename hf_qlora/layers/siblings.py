"""Layers that are given the same tensor: q, k and v; gate and up.

They are found when they are called: the second of them gets the very object that the first one got, unchanged. So
nothing depends on a model's names, nor on which of them is called, hooked or used; whatever stands between (a hook
that returns another tensor, a cast, an operation in place) makes them strangers, which is slower and as right.

What they share is the input with its cast, and the place where its gradient is summed (`kernels.shared.share`).
Rejected: one node for all of them, computed when the first is called. It must guess who will be called. What it learns
from a first step it has forgotten in a resumed run, which then differs in the last bits from an uninterrupted one; and
a fellow that is hooked, offloaded or sharded must not be computed at another's call.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hf_qlora.kernels.shared import SharedInput, share


@dataclass(eq=False)
class _Shared:
    """What was made of x, for as long as x is there.

    Attributes:
        given: x for the layers. It has x's memory, unless it was cast, and x's history: it keeps nothing else alive.
    """

    x: weakref.ref[Tensor]
    version: int
    dtype: torch.dtype
    given: Tensor
    sum: SharedInput


class _Last(threading.local):
    """The last shared input of this thread."""

    shared: _Shared | None = None


_last = _Last()


def shared_input(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, SharedInput | None]:
    """x in `dtype`, and where its gradient is summed: those of the last call, if it was with the same x."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x.to(dtype), None
    last = _last.shared
    if last is not None and last.x() is x and (last.version, last.dtype) == (x._version, dtype):
        return last.given, last.sum
    given, total = share(x.to(dtype))
    forget = partial(_forget, _last.__dict__)
    _last.shared = _Shared(weakref.ref(x, forget), x._version, dtype, given, total)
    return given, total


def _forget(of_thread: dict[str, _Shared | None], x: weakref.ref[Tensor]) -> None:
    """Let go of what was made of an x that is gone, in the thread that made it."""
    last = of_thread.get("shared")
    if last is not None and last.x is x:
        of_thread["shared"] = None

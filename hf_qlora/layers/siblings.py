"""Layers that are given the same tensor: q, k and v; gate and up.

They are found when they are called: the second of them gets the very object that the first one got, unchanged. So
nothing depends on a model's names, nor on which of them is called, hooked or used; whatever stands between (a hook
that returns another tensor, a cast, an operation in place) makes them strangers, which is slower and as right.

What they share is the input with its cast, and the place where its gradient is summed (`kernels.functional.share`).
Rejected: one node for all of them, computed when the first is called. It must guess who will be called. What it learns
from a first step it has forgotten in a resumed run, which then differs in the last bits from an uninterrupted one; and
a fellow that is hooked, offloaded or sharded must not be computed at another's call.
"""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor

from hf_qlora.kernels.functional import SharedInput, share


class _Last(threading.local):
    """The last shared input of this thread; nothing here keeps a tensor or a graph alive."""

    key: tuple[weakref.ref[Tensor], int, torch.dtype] | None = None
    shared: tuple[weakref.ref[Tensor], weakref.ref[SharedInput]] | None = None


_last = _Last()


def shared_input(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, SharedInput | None]:
    """x in `dtype`, and where its gradient is summed: those of the last call, if it was with the same x."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x.to(dtype), None
    if _last.key is not None and _last.shared is not None:
        known, version, last_dtype = _last.key
        given, shared = _last.shared[0](), _last.shared[1]()
        if known() is x and (version, last_dtype) == (x._version, dtype) and given is not None and shared is not None:
            return given, shared
    given, shared = share(x.to(dtype))
    _last.key = (weakref.ref(x), x._version, dtype)
    _last.shared = (weakref.ref(given), weakref.ref(shared))
    return given, shared

"""The scales of a packed weight, out of a `state_dict`, in which bitsandbytes writes them beside the codes."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from bitsandbytes.functional import QuantState


def load_scales(state: QuantState, tensors: dict[str, Any]) -> None:
    """Give a packed weight's state, in place, the scales that a `state_dict` has: all of them, or an error and none.

    Raises:
        KeyError: one is missing.
        ValueError: they are of another shape, block size or format.
    """
    found = QuantState.from_dict(dict(tensors), device=state.absmax.device)
    check_scales(found, state)
    state.absmax.copy_(found.absmax)
    state.code = found.code.clone()
    if state.nested:
        state.state2.absmax.copy_(found.state2.absmax)
        state.offset, state.state2.code = found.offset, found.state2.code.clone()


def check_scales(found: QuantState, state: QuantState) -> None:
    """Raise ValueError for scales that are not of the shape, block size and format of a layer's own."""
    _check(found, state, ("shape", "blocksize", "quant_type", "nested", "absmax.shape", "code.shape"))
    if state.nested:
        _check(found, state, ("state2.blocksize", "state2.absmax.shape", "state2.code.shape"))


def _check(found: QuantState, state: QuantState, names: Sequence[str]) -> None:
    for name in names:
        given, own = attrgetter(name)(found), attrgetter(name)(state)
        if given != own:
            raise ValueError(f"its {name} is {given}, and this layer's is {own}.")

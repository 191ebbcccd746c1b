"""The scales of a packed weight, out of a `state_dict`, in which bitsandbytes writes them beside the codes."""

from __future__ import annotations

from typing import Any

from bitsandbytes.functional import QuantState


def load_scales(state: QuantState, tensors: dict[str, Any]) -> None:
    """Give a packed weight's state, in place, the scales that a `state_dict` has.

    Raises:
        ValueError: they are of another shape, block size or format.
    """
    found = QuantState.from_dict(dict(tensors), device=state.absmax.device)
    for name in ("shape", "blocksize", "quant_type", "nested"):
        given, own = getattr(found, name), getattr(state, name)
        if given != own:
            raise ValueError(f"its {name} is {given}, and this layer's is {own}.")
    state.absmax.copy_(found.absmax)
    state.code = found.code.clone()
    if state.nested:
        state.state2.absmax.copy_(found.state2.absmax)
        state.offset, state.state2.code = found.offset, found.state2.code.clone()

"""The rule by which a budget of bytes chooses layers: training follows it (`budget.py`), and plans foresee it.

A layer keeps its activations where what is held when it is called, and what it and all layers after it would keep, fit
into the budget; otherwise it keeps its input alone. So it is the first layers that are checkpointed, and no more of
them than necessary.
"""

from __future__ import annotations

from collections.abc import Sequence

from hf_qlora.validation import ConfigError


class BudgetTooSmall(ConfigError):
    """A budget that the layers' inputs alone exceed."""


def keeps(limit: int, held: int, kept: int) -> bool:
    """Whether a layer keeps its activations.

    Args:
        limit: the budget.
        held: bytes that are held when the layer is called.
        kept: bytes that it and all layers after it would keep.
    """
    return held + kept <= limit


def number_checkpointed(limit: int, kept: Sequence[int], inputs: Sequence[int], batch: str) -> int:
    """How many of the first layers are checkpointed in a forward, by the bytes that each keeps if it is not.

    Args:
        inputs: the bytes of each layer's input.
        batch: what the forward is of, for the error.

    Raises:
        BudgetTooSmall: for the inputs.
    """
    held = 0
    for layer, size in enumerate(inputs):
        if keeps(limit, held, sum(kept[layer:])):
            return layer
        held += size
    if held > limit:
        raise BudgetTooSmall(f"{too_small(limit, batch, len(inputs), held)} {REMEDY}")
    return len(inputs)


def too_small(limit: int, batch: str, layers: int, inputs: int) -> str:
    """What is wrong with a budget that the layers' inputs exceed."""
    return (
        f"budget_bytes={limit:,} is too small for {batch}: with all {layers} layers checkpointed, their inputs take "
        f"{inputs:,} bytes."
    )


REMEDY = "Give at least those, or smaller batches, or use mode='offload'."

"""The bytes of a peak by what they are."""

from __future__ import annotations

from collections import Counter

from hf_qlora.train.plan.trace import Block, Peak


PARTS = (
    "base",
    "adapters",
    "optimizer",
    "gradients",
    "inputs",
    "activations",
    "loss",
    "dequantized",
    "temporary",
    "libraries",
)


def parts(peak: Peak, kept: tuple[Block, ...]) -> dict[str, int]:
    """The bytes of a peak by what they are."""
    own = set(map(id, kept))

    def part(block: Block) -> str:
        if block.kind:
            return block.kind
        if id(block) in own:
            return "activations" if block.stage != "loss" else "loss"
        return "loss" if block.stage == "loss" else "temporary"

    found: Counter[str] = Counter()
    for block in peak.blocks:
        found[part(block)] += block.size
    return {name: found[name] for name in PARTS if found[name]}

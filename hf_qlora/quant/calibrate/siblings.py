"""Which layers read the same inputs, and how often each is called: a forward of a few rows, listened to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_qlora.quant.calibrate.errors import CalibrationError
from hf_qlora.quant.repacked import version_of


Forward = Callable[..., Any]


@dataclass
class Heard:
    """What was heard.

    Attributes:
        groups: the names of layers that read one tensor, one after another, in the order of the forward.
        calls: how often each layer is called.
        scattered: the layers that do not see the rows in their order, as experts do not.
        lengths: how many tokens of a row each layer reads at its first call.
    """

    groups: list[list[str]] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    scattered: set[str] = field(default_factory=set)
    lengths: dict[str, int] = field(default_factory=dict)


def listen(model: Callable[..., Any], layers: Mapping[str, nn.Module], inputs: Mapping[str, Tensor]) -> Heard:
    """Run a forward, and hear which layers are called with what.

    Every row goes in twice, as it will in `Streams`: what a layer sees in order, it then sees twice.

    Args:
        inputs: what the model's forward takes, the first dimension rows.

    Raises:
        CalibrationError: a layer's inputs are not finite; it is named.
    """
    inputs = {name: torch.cat([tensor, tensor]) for name, tensor in inputs.items()}
    heard, rows = Heard(), len(next(iter(inputs.values())))
    lengths = {1, *(tensor.shape[1] for tensor in inputs.values() if tensor.ndim > 1)}
    last: list[tuple[Tensor, int, list[str] | None]] = []  # the tensor read last, and the group that was found by it

    def hear(name: str, forward: Forward) -> Forward:
        def heard_forward(x: Tensor) -> Any:
            if not x.isfinite().all():
                raise CalibrationError(
                    f"The inputs of {name} have NaN or infinite values: the model's own forward is broken on these "
                    "rows before anything is rounded. Check the checkpoint and its dtype (float16 overflows where "
                    "bfloat16 does not)."
                )
            if not (in_rows(x, rows, lengths) and _is_twice(x)):
                heard.scattered.add(name)
            same = bool(last) and last[0][0] is x and last[0][1] == version_of(x)
            group = last[0][2] if same else None
            if not heard.calls[name]:
                tokens = x.numel() // x.shape[-1]
                heard.lengths[name] = 0 if tokens % rows else tokens // rows
                if group is None:
                    group = []
                    heard.groups.append(group)
                group.append(name)
            last[:] = [(x, version_of(x), group)]
            heard.calls[name] += 1
            return forward(x)

        return heard_forward

    with replaced_forwards(layers, hear), torch.no_grad():
        model(**inputs)
    return heard


def in_rows(x: Tensor, rows: int, lengths: set[int]) -> bool:
    """Whether x, (…, K), has the rows of a batch in their order, flattened or not."""
    return x.shape[0] == rows or (x.ndim == 2 and x.shape[0] in {rows * length for length in lengths})


def _is_twice(x: Tensor) -> bool:
    """Whether both halves are one, but for roundings, which differ by place in a batch."""
    one, other = x.float().chunk(2)
    return bool((one - other).norm() <= 0.1 * one.norm())


@contextmanager
def replaced_forwards(
    layers: Mapping[str, nn.Module], change: Callable[[str, Forward], Forward]
) -> Iterator[Callable[[str], None]]:
    """Put `change(name, forward)` in the place of each layer's forward, for the time of the block.

    Yields:
        a function that gives a layer its own forward back before that, by name.
    """
    own = {name: layer.__dict__.get("forward") for name, layer in layers.items()}  # accelerate's hooks are there

    def restore(name: str) -> None:
        forward, layer = own.pop(name), layers[name]
        layer.__dict__.pop("forward", None)
        if forward is not None:
            layer.forward = forward

    for name, layer in layers.items():
        layer.forward = change(name, layer.forward)
    try:
        yield restore
    finally:
        for name in list(own):
            restore(name)

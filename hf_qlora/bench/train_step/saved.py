"""The bytes that adapted layers keep for backward.

Read off the graph, where hooks would change what is kept: from a layer's result back to its input. What the operation
that made the input keeps for itself is not the layer's; parameters are nobody's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


@contextmanager
def counted(model: nn.Module) -> Iterator[dict[int, int]]:
    """Within it, the bytes of the storages kept by LoRA layers in one forward, by their address.

    Not for checkpointed layers, which must not be looked at before backward.
    """
    found: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is used twice
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def count(layer: nn.Module, args: tuple[Any, ...], result: Tensor) -> None:
        node = args[0].grad_fn
        others = parameters | {_address(tensor) for tensor in _kept([node] if node is not None else [])}
        for tensor in _kept(_between(result.grad_fn, node)):
            if _address(tensor) not in others:
                alive.append(tensor.detach())
                found[_address(tensor)] = tensor.untyped_storage().nbytes()

    handles = [module.register_forward_hook(count) for module in model.modules() if isinstance(module, LoraLayer)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _between(last: Any, first: Any) -> Iterator[Any]:
    """The nodes of a graph from its last one down to, and without, `first`."""
    seen, waiting = {first, None}, [last]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            yield node
            waiting += [before for before, _ in node.next_functions]


def _kept(nodes: Iterable[Any]) -> Iterator[Tensor]:
    """What autograd has saved in them: Functions in `saved_tensors`, others in attributes."""
    for node in nodes:
        own = getattr(node, "saved_tensors", None)
        if own is None:
            own = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        for value in own:
            parts = value if isinstance(value, tuple | list) else (value,)
            yield from (part for part in parts if isinstance(part, Tensor) and part.ndim)  # and no number


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()

"""An input that is a product, as an MLP with a gate has it, kept as its two factors.

    down_proj(act(gate_proj(x)) * up_proj(x))

Backward of the product needs both factors, so autograd has kept them. A layer that would keep the product too, for its
own gradients, can make it again from them, to the bit: one multiplication for the widest input of a layer.

That holds where autograd keeps the factors themselves. Where hooks have packed them away (of checkpointing, of
offloading), where backward has been there or a factor was written to since, the product is kept. So it is where hooks
are in force when the layer saves; who counts there what would be kept without the hooks asks by `products_left_out`.
What is written to `x.data` between product and layer nobody can see, autograd neither.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch.multiprocessing.reductions import StorageWeakRef


Factors = tuple[Tensor, Tensor]
Storages = Counter[StorageWeakRef]


class _LeftOut(threading.local):
    """How often this thread has saved each product that would else be its factors, and the hook that counts them."""

    def __init__(self) -> None:
        self.products: Storages = Counter()
        self.pack: Callable[[Tensor], Any] | None = None


_left_out = _LeftOut()


def factors_of(x: Tensor, gated: bool) -> Factors | None:
    """The factors of an input that is about to be saved, if they can be saved in its place.

    Args:
        x (`torch.Tensor`): as the layer got it, with gradients enabled.
        gated: x is what `shared.share` made of the layer's input.
    """
    node: Any = x.grad_fn
    if gated and node is not None:
        node = node.next_functions[0][0]
    if not _is_product(node, x) or x._version:
        return None
    hooks = _top_saved_tensors_default_hooks(False)
    if hooks is not None:
        if hooks[0] is _left_out.pack:
            _left_out.products[StorageWeakRef(x.untyped_storage())] += 1
        return None
    for raw in (node._raw_saved_self, node._raw_saved_other):
        # where torch does not tell of hooks there may be some
        if getattr(raw, "unpack_hook", raw) is not None or raw.data is None:
            return None
    try:
        return node._saved_self.detach(), node._saved_other.detach()
    except RuntimeError:  # one was written to since
        return None


@contextmanager
def products_left_out(pack: Callable[[Tensor], Any]) -> Iterator[Storages]:
    """Within it, how often this hook is given each storage that would not be saved, were no hooks in force."""
    before = _left_out.products, _left_out.pack
    _left_out.products, _left_out.pack = Counter(), pack
    try:
        yield _left_out.products
    finally:
        _left_out.products, _left_out.pack = before


def _is_product(node: Any, x: Tensor) -> bool:
    """Whether it multiplied two tensors of x's shape and dtype that both have gradients, and so are saved."""
    if node is None or node.name() != "MulBackward0":
        return False
    inputs = [before._input_metadata[i] for before, i in node.next_functions if before is not None]
    return len(inputs) == 2 and all((tuple(own.shape), own.dtype) == (tuple(x.shape), x.dtype) for own in inputs)

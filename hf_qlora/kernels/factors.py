"""An input that is a product, as an MLP with a gate has it, kept as its two factors.

    down_proj(act(gate_proj(x)) * up_proj(x))

Backward of the product needs both factors, so autograd has kept them. A layer that would keep the product too, for its
own gradients, can make it again from them, to the bit: one multiplication for the widest input of a layer.

Where hooks are in force on what is saved (of checkpointing, of offloading) the product itself is saved: they may have
let go of the factors. Who counts there what would be kept without the hooks asks for it by `products_left_out`.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch.multiprocessing.reductions import StorageWeakRef


Kept = tuple[Tensor | None, Tensor | None]
Storages = Counter[StorageWeakRef]


class _LeftOut(threading.local):
    """How often this thread has saved each product that would else be its factors; None where nobody asks."""

    products: Storages | None = None


_left_out = _LeftOut()


def kept(x: Tensor, gated: bool) -> Kept:
    """What to save for backward of an input x: x itself, or the two factors that autograd has saved already.

    Args:
        x (`torch.Tensor`): as the layer got it.
        gated: x is what `functional.share` made of the layer's input.

    Returns:
        Two tensors, for `made`; the second is None where the first is x.
    """
    node: Any = x.grad_fn
    if gated and node is not None:
        node = node.next_functions[0][0]
    if x._version or not _is_product(node, x):
        return x, None
    if _top_saved_tensors_default_hooks(False) is not None:
        if _left_out.products is not None:
            _left_out.products[StorageWeakRef(x.untyped_storage())] += 1
        return x, None
    return node._saved_self.detach(), node._saved_other.detach()


def made(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """The input, of what `kept` returned."""
    return first if first is None or second is None else torch.mul(first, second)


@contextmanager
def products_left_out() -> Iterator[Storages]:
    """Within it, how often each storage is saved that would not be, were no hooks in force."""
    before, _left_out.products = _left_out.products, Counter()
    try:
        yield _left_out.products
    finally:
        _left_out.products = before


def _is_product(node: Any, x: Tensor) -> bool:
    """Whether it multiplied two tensors of x's shape and dtype that both have gradients, and so are saved."""
    if node is None or node.name() != "MulBackward0":
        return False
    inputs = [before._input_metadata[i] for before, i in node.next_functions if before is not None]
    return len(inputs) == 2 and all((tuple(own.shape), own.dtype) == (tuple(x.shape), x.dtype) for own in inputs)

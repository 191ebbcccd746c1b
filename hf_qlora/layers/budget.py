"""Checkpointing of no more layers than a budget of bytes makes necessary.

A layer is called with a function and its input; it may

    keep it         run the function as it is: what backward needs of it stays, c bytes
    checkpoint it   keep its input alone, i bytes; backward runs it again

by the rule of `budget_rule.py`, which plans share: it is the last layers that are kept. Backward has used up their
activations before it makes any again, and the peak of a first layer kept is that of a last one kept plus the
activations of one layer that is computed again.

c is measured: the bytes that autograd saves in the layer's forward, each storage once, without parameters and what the
layers share (masks, rotary tables). It is a number of bytes for each element of the input, measured for each layer at
its first forward, and again at each longer sequence, since attention may keep its scores, which grow with the square
of the length: for shorter ones it is then an upper bound. A layer is measured while it runs checkpointed, so that a
first step is one of mode "full": no layer runs twice in a forward, which hooks and routers' losses would see.

What is held is counted, not planned: it grows with each call and shrinks when backward reaches the layer or the graph
is dropped. So it holds for several forwards before a backward too. Nothing of it changes a result.
"""

from __future__ import annotations

import functools
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint

from hf_qlora.kernels.factors import products_left_out
from hf_qlora.layers.budget_rule import REMEDY, BudgetTooSmall, keeps, too_small


logger = logging.getLogger(__name__)

Function = Callable[..., Any]


class Budget:
    """The bytes that all layers of a model may keep for backward.

    Attributes:
        limit: those bytes.
        rates: of each layer, in order, the bytes that it keeps for each byte of its input; None before its first.
        lengths: of each layer, the longest sequence that its rate was measured with.
        held: the bytes that are kept now.
        hooked: whether the rates are of layers within hooks on saved tensors.
        started, keeps: whether a forward has come to its end, and whether a layer was kept.
    """

    def __init__(self, limit: int, layers: int, options: Mapping[str, Any]) -> None:
        self.limit, self.options = limit, options
        self.rates: list[float | None] = [None] * layers
        self.lengths = [0] * layers
        self.held = 0
        self.hooked = False
        self.started = self.keeps = False
        self.warned: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "held": 0}  # a copy of the model has no graph

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # what it does depends on what is held
    def call(self, layer: int, function: Function, *args: Any) -> Any:
        """Call a layer, as `torch.utils.checkpoint.checkpoint` does."""
        x = first_tensor(args)
        if x is None or not torch.is_grad_enabled():
            return function(*args)
        hooked = _top_saved_tensors_default_hooks(False) is not None
        if hooked != self.hooked:  # a kept layer gives them products too, so it is measured anew
            self.hooked, self.rates = hooked, [None] * len(self.rates)
        known = self.rates[layer] is not None and _length(x) <= self.lengths[layer]
        if known and self._fits(layer, x):
            self.started = self.keeps = True
            return self._holding(function(*args), self._cost(layer, x))
        self._check(layer, x)
        out = checkpoint(function if known else self._measured(layer, function, x), *args, **self.options)
        self._end(layer, x)
        return self._holding(out, _bytes(x))

    def _measured(self, layer: int, function: Function, x: Tensor) -> Function:
        """The function, which learns at its first call, the forward, what it keeps."""
        size, length = _bytes(x), _length(x)
        ran: list[bool] = []

        def measured(*args: Any) -> Any:
            if ran:
                return function(*args)
            ran.append(True)
            with saved_bytes(function, args, self.hooked) as saved:
                out = function(*args)
            self.rates[layer], self.lengths[layer] = sum(saved.values()) / max(size, 1), length
            return out

        return measured

    def _cost(self, layer: int, x: Tensor) -> int:
        return math.ceil((self.rates[layer] or 0.0) * _bytes(x))

    def _fits(self, layer: int, x: Tensor) -> bool:
        """Whether this layer and all that follow can be kept."""
        own = self.rates[layer] or 0.0
        rest = sum(own if rate is None else rate for rate in self.rates[layer:])
        return keeps(self.limit, self.held, math.ceil(rest * _bytes(x)))

    def _check(self, layer: int, x: Tensor) -> None:
        """Refuse a budget that the layers' inputs exceed in the first forward; of a later batch, warn."""
        least = self.held + (len(self.rates) - layer) * _bytes(x)
        if self.held + _bytes(x) > self.limit:
            message = too_small(self.limit, _tokens(x), len(self.rates), least)
            if not self.started:
                raise BudgetTooSmall(f"{message} {REMEDY}")
            self._warn_once("exceeded", f"{message} They are all checkpointed, and the budget is exceeded.")

    def _end(self, layer: int, x: Tensor) -> None:
        """After a checkpointed layer; the last one that does not fit says that none did."""
        if layer != len(self.rates) - 1:
            return
        self.started = True
        if not self.keeps and not self._fits(layer, x) and self.held + _bytes(x) <= self.limit:
            self._warn_once(
                "none",
                f"budget_bytes={self.limit:,} leaves no layer its activations for {_tokens(x)}, so that mode='budget' "
                f"is mode='full'. From {self.held + self._cost(layer, x):,} bytes on it keeps a layer's.",
            )

    def _warn_once(self, what: str, message: str) -> None:
        if what not in self.warned:
            self.warned.add(what)
            logger.warning(message)

    def _holding(self, out: Any, size: int) -> Any:
        """The result of a layer, for which so many bytes are held until backward comes there, or its graph goes."""
        first = next((t for t in tree_iter(out) if isinstance(t, Tensor) and t.requires_grad), None)
        if first is not None:
            first.register_hook(_Share(self, size).end)
        return out


class _Share:
    """What one layer holds of a budget. The hook that it is in lives as long as the graph."""

    def __init__(self, budget: Budget, size: int) -> None:
        self.budget, self.size = budget, size
        budget.held += size

    def end(self, grad: Tensor | None = None) -> None:
        self.budget.held -= self.size
        self.size = 0

    def __del__(self) -> None:
        self.end()


@contextmanager
def saved_bytes(function: Function, args: Sequence[Any], hooked: bool = False) -> Iterator[dict[StorageWeakRef, int]]:
    """Within it, the bytes that autograd saves, by storage, but for the layer's weights and what layers share.

    It is called where hooks of a checkpoint are in force: they are given what they would be given without it. Products
    that would not be saved without any hooks are left out when it ends, unless the layer will run `hooked`.
    """
    shared = [t for t in tree_iter((args[1:], getattr(function, "keywords", {}))) if isinstance(t, Tensor)]
    layer = layer_of(function)
    own = [] if layer is None else [*layer.parameters(), *layer.buffers()]
    others = {tensor.untyped_storage().data_ptr() for tensor in (*shared, *own)}
    saved: dict[StorageWeakRef, int] = {}  # storages may be freed, but no other one gets the same reference
    times: Counter[StorageWeakRef] = Counter()
    outer_pack, outer_unpack = _top_saved_tensors_default_hooks(False)

    def pack(tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in others:
            key = StorageWeakRef(storage)
            saved[key] = storage.nbytes()
            times[key] += 1
        return outer_pack(tensor)

    with torch.autograd.graph.saved_tensors_hooks(pack, outer_unpack), products_left_out(pack) as left_out:
        yield saved
    if not hooked:
        for key in [key for key in saved if times[key] == left_out[key]]:
            del saved[key]


def first_tensor(args: Sequence[Any]) -> Tensor | None:
    """The hidden states among what a layer is called with."""
    return next((arg for arg in args if isinstance(arg, Tensor)), None)


def layer_of(function: Function) -> nn.Module | None:
    """The layer whose forward transformers hands to a checkpointing function."""
    inner: Any = function.func if isinstance(function, functools.partial) else function
    owner = getattr(inner, "__self__", None)  # a bound method
    if owner is None and isinstance(function, functools.partial) and function.args:
        owner = function.args[0]
    return owner if isinstance(owner, nn.Module) else None


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _length(x: Tensor) -> int:
    """Tokens in a sequence of (batch, ..., hidden)."""
    return math.prod(x.shape[1:-1])


def _tokens(x: Tensor) -> str:
    return f"a batch of {' × '.join(map(str, x.shape[:-1]))} tokens"

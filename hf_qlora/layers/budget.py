"""Checkpointing of no more layers than a budget of bytes makes necessary.

A layer is called with a function and its input; it may

    keep it         run the function as it is: what backward needs of it stays, c bytes
    checkpoint it   keep its input alone, i bytes; backward runs it again

and keeps it where what is held at that moment, and c of this layer and of all that follow, fit. So it is the last
layers that are kept: backward has used up their activations before it makes any again, and the peak of a first layer
kept is that of a last one kept plus the activations of one layer that is computed again.

c is measured: the bytes that autograd saves in the layer's forward, each storage once, without parameters and what the
layers share (masks, rotary tables). It is a number of bytes for each element of the input, measured for each layer at
its first forward, and again at each longer sequence, since attention may keep its scores, which grow with the square
of the length: for shorter ones it is then an upper bound. A measured layer that turns out not to fit is run again,
checkpointed, from the same random numbers.

What is held is counted, not planned: it grows with each call and shrinks when backward reaches the layer or the graph
is dropped. So it holds for several forwards before a backward too. Nothing of it changes a result.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint

from hf_qlora.validation import ConfigError


logger = logging.getLogger(__name__)

Function = Callable[..., Any]


class Budget:
    """The bytes that all layers of a model may keep for backward.

    Attributes:
        limit: those bytes.
        rates: of each layer, in order, the bytes that it keeps for each byte of its input; None before its first.
        lengths: of each layer, the longest sequence that its rate was measured with.
        held: the bytes that are kept now.
        started, keeps: whether a forward has come to its end, and whether a layer was kept.
    """

    def __init__(self, limit: int, layers: int, options: Mapping[str, Any]) -> None:
        self.limit, self.options = limit, options
        self.rates: list[float | None] = [None] * layers
        self.lengths = [0] * layers
        self.held = 0
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
        out, random = None, None
        if self.rates[layer] is None or _length(x) > self.lengths[layer]:
            random = _random_states(x.device)
            out = self._measured(layer, function, args, x)
        if self._fits(layer, x):
            self.started = self.keeps = True
            return self._holding(function(*args) if out is None else out, self._cost(layer, x))
        del out
        self._check(layer, x)
        if random is not None:
            _set_random_states(random, x.device)
        return self._holding(checkpoint(function, *args, **self.options), _bytes(x))

    def _measured(self, layer: int, function: Function, args: Sequence[Any], x: Tensor) -> Any:
        with saved_bytes(function, args) as saved:
            out = function(*args)
        self.rates[layer], self.lengths[layer] = sum(saved.values()) / max(_bytes(x), 1), _length(x)
        return out

    def _cost(self, layer: int, x: Tensor) -> int:
        return math.ceil((self.rates[layer] or 0.0) * _bytes(x))

    def _fits(self, layer: int, x: Tensor) -> bool:
        """Whether this layer and all that follow can be kept."""
        own = self.rates[layer] or 0.0
        rest = sum(own if rate is None else rate for rate in self.rates[layer:])
        return self.held + math.ceil(rest * _bytes(x)) <= self.limit

    def _check(self, layer: int, x: Tensor) -> None:
        """Refuse a budget that the layers' inputs exceed in the first forward; of a later batch, warn."""
        least = self.held + (len(self.rates) - layer) * _bytes(x)
        of = f"a batch of {' × '.join(map(str, x.shape[:-1]))} tokens"
        is_last = layer == len(self.rates) - 1
        if self.held + _bytes(x) > self.limit:
            message = (
                f"budget_bytes={self.limit:,} is too small for {of}: with all {len(self.rates)} layers checkpointed, "
                f"their inputs take {least:,} bytes."
            )
            if not self.started:
                raise ConfigError(f"{message} Give at least those, or smaller batches, or use mode='offload'.")
            self._warn_once("exceeded", f"{message} They are all checkpointed, and the budget is exceeded.")
        elif is_last and not self.keeps:
            self._warn_once(
                "none",
                f"budget_bytes={self.limit:,} leaves no layer its activations for {of}, so that mode='budget' is "
                f"mode='full'. From {self.held + self._cost(layer, x):,} bytes on it keeps a layer's.",
            )
        self.started = self.started or is_last

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
def saved_bytes(function: Function, args: Sequence[Any]) -> Iterator[dict[int, int]]:
    """Within it, the bytes that autograd saves, by storage, but for the layer's weights and what layers share."""
    shared = [t for t in tree_iter((args[1:], getattr(function, "keywords", {}))) if isinstance(t, Tensor)]
    layer = layer_of(function)
    own = [] if layer is None else [*layer.parameters(), *layer.buffers()]
    others = {tensor.untyped_storage().data_ptr() for tensor in (*shared, *own)}
    saved: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in others:
            kept.append(tensor.detach())
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # with its history, a node's own result would keep the node

    with torch.autograd.graph.saved_tensors_hooks(pack, _unpacked):
        yield saved
    kept.clear()


def _unpacked(tensor: Tensor) -> Tensor:
    return tensor


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


def _random_states(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_states(states: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1], device)

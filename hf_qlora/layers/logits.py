"""Logits that are computed when somebody reads them, or never: what a chunked head returns while it is trained.

`LazyLogits` knows the hidden states, how to apply the head to them, and what a model did to the result since. On two
levels:

* A Python function of torch that treats each row alike gives other `LazyLogits`, and `cross_entropy` the chunked loss
  (`layers/rowwise.py` has these rules).
* Whatever else reads them, in Python or below it, gets the real logits, computed once; and as `LazyLogits` come out of
  an autograd Function, whose backward applies the head again, the gradients are those of the real ones.

Once real, they stay so: they may have been changed in place. Reading logits whose head, adapter or hidden states have
changed since, or whose views have, is an error.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_map_only

from hf_qlora.kernels.dropout import random_again, random_state
from hf_qlora.kernels.functional import Unpack
from hf_qlora.kernels.loss import own_graph


logger = logging.getLogger(__name__)

_live: weakref.WeakSet[HeadCall] = weakref.WeakSet()  # those whose head is trained


@dataclass(frozen=True)
class FrozenHead:
    """A head as the fast loss takes it: the weight, (V, K), in the dtype of the product, and the bias."""

    unpack: Unpack
    bias: Tensor | None
    dtype: torch.dtype


@dataclass(eq=False)
class HeadCall:
    """One call of a head, to be made later, as often as needed.

    Attributes:
        head: the module; `apply` is its own forward, from (..., K) to (..., V).
        state: gives what the result depends on beside the parameters.
        frozen: the head's parts if it is dense and frozen.
        parameters: those of the head that are trained.
        autocast: device, whether it was enabled, and its dtype.
    """

    head: nn.Module
    apply: Callable[[Tensor], Tensor]
    state: Callable[[], object]
    frozen: FrozenHead | None
    parameters: tuple[Tensor, ...]
    autocast: tuple[str, bool, torch.dtype]
    stamp: object = field(init=False)
    stepped: bool = False
    loss_taken: bool = False  # a chunked loss, of which these logits get no gradient

    def __post_init__(self) -> None:
        self.stamp = self._stamp()
        if self.parameters:
            _watch_optimizers()
            _live.add(self)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Apply the head as it was called."""
        if self.stepped or self.stamp != self._stamp():
            raise RuntimeError(
                f"These logits were not read yet, and the {type(self.head).__name__} that makes them has changed "
                "since (an optimizer step, or another adapter). Read them before, or set chunked_loss=False."
            )
        device, enabled, dtype = self.autocast
        with torch.autocast(device, enabled=enabled, dtype=dtype):
            return self.apply(hidden)

    def _stamp(self) -> object:
        return [(id(parameter), parameter._version) for parameter in self.parameters], self.state()


@functools.cache
def _watch_optimizers() -> None:
    """Fused optimizers change parameters without changing their version."""

    def stepped(optimizer: torch.optim.Optimizer, *args: Any) -> None:
        own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for call in list(_live):
            call.stepped = call.stepped or any(id(parameter) in own for parameter in call.parameters)

    register_optimizer_step_post_hook(stepped)


@dataclass(frozen=True)
class Step:
    """An operation on each row of logits: `function`, with the logits put in among the other arguments."""

    function: Callable[..., Tensor]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    position: int = 0

    def __call__(self, logits: Tensor) -> Tensor:
        return self.function(*self.args[: self.position], logits, *self.args[self.position :], **self.kwargs)


@dataclass(eq=False)
class Recipe:
    """From hidden states, (..., K), to logits, (..., V): a call of the head and the steps after it."""

    call: HeadCall
    steps: tuple[Step, ...] = ()
    random: Tensor | None = None  # the state of the random numbers that the real logits were made with

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.call(hidden)
        for step in self.steps:
            logits = step(logits)
        return logits


Rule = Callable[..., Any]
_rules: dict[Any, Rule] = {}


def rule(*functions: Any) -> Callable[[Rule], Rule]:
    """Register what these functions of torch do with lazy logits.

    The rule gets the function and its arguments, and returns `NotImplemented` where it must have the real logits.
    """

    def register(handler: Rule) -> Rule:
        _rules.update(dict.fromkeys(functions, handler))
        return handler

    return register


class LazyLogits(Tensor):
    """The logits, (..., V), that `recipe` makes of `hidden`, (..., K)."""

    hidden: Tensor
    recipe: Recipe
    made: Tensor | None  # the real ones
    fixed: bool  # no longer lazy: something depends on these very logits
    version: int  # of `hidden`
    own_node: Any  # the node that made them; another one where a Function was given them since
    real_relatives: list[LazyLogits] | None  # views of the same logits that were made real; shared by all of them

    def unchanged_hidden(self) -> Tensor:
        if self.hidden._version != self.version:
            raise RuntimeError("The hidden states that these logits are made of were changed in place.")
        if any(other is not self and other._version for other in self.real_relatives or ()):
            raise RuntimeError(
                "A view of these logits, or what they are a view of, was changed in place before they were computed. "
                "Change the logits themselves, or a clone() of them, or set chunked_loss=False."
            )
        if self.grad_fn is not self.own_node and torch.is_grad_enabled():
            hidden: Tensor = _Joined.apply(self.hidden, self)
            return hidden
        return self.hidden

    def viewed(self, hidden: Tensor, shape: Sequence[int]) -> LazyLogits:
        """A view of these logits, (..., V): that of `hidden`, (..., K)."""
        if self.real_relatives is None:
            self.real_relatives = []
        recipe = Recipe(self.recipe.call, self.recipe.steps)
        return lazy_logits(recipe, hidden, shape, self.dtype, self.real_relatives)

    def _stays_lazy(self) -> bool:
        """Not where something depends on these very logits, or a graph would begin where they have none."""
        return not self.fixed and (self.requires_grad or not torch.is_grad_enabled())

    @classmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled reader gets them as they are here
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler, kwargs = _rules.get(func), kwargs or {}
        if handler is not None and all(arg._stays_lazy() for arg in args if isinstance(arg, LazyLogits)):
            result = handler(func, *args, **kwargs)
            if result is not NotImplemented:
                return result
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own has no annotations
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(LazyLogits, functools.partial(_made_real, func), (args, kwargs or {}))
        return func(*args, **kwargs)


def lazy_logits(
    recipe: Recipe,
    hidden: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    real_relatives: list[LazyLogits] | None = None,
) -> LazyLogits:
    """Logits to be made of `hidden`, (..., K), by `recipe`, of that shape and dtype."""
    result: LazyLogits = _Project.apply(recipe, shape, dtype, hidden, *recipe.call.parameters)
    result.hidden, result.version, result.real_relatives = hidden, hidden._version, real_relatives
    result.own_node = result.grad_fn
    return result


class _Joined(torch.autograd.Function):
    """The hidden states of logits that came out of a Function, whose backward waits for its turn (DDP's sink)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, logits: LazyLogits) -> Tensor:
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, recipe: Recipe, shape: Sequence[int], dtype: torch.dtype, hidden: Tensor, *parameters: Tensor
    ) -> LazyLogits:
        ctx.recipe = recipe
        ctx.set_materialize_grads(False)  # a sink passes on that there is none
        ctx.save_for_backward(hidden, *parameters)
        logits: LazyLogits = Tensor._make_wrapper_subclass(LazyLogits, shape, dtype=dtype, device=hidden.device)
        logits.recipe, logits.made, logits.fixed = recipe, None, False
        return logits

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, *parameters = ctx.saved_tensors
        if grad is None:
            return (None,) * (4 + len(parameters))
        second_order, frozen = torch.is_grad_enabled(), ctx.recipe.call.frozen
        if frozen is not None and not ctx.recipe.steps and not second_order:
            return None, None, None, (grad.to(frozen.dtype) @ frozen.unpack()).to(hidden.dtype)
        with own_graph(), random_again(ctx.recipe.random, hidden.device):
            start = hidden.view_as(hidden)
            logits = ctx.recipe(start)
            inputs = [start, *parameters] if hidden.requires_grad else parameters
            grads = list(torch.autograd.grad(logits, inputs, grad, create_graph=second_order, allow_unused=True))
        dx = grads.pop(0) if hidden.requires_grad else None
        return None, None, None, dx, *grads


def _made_real(reader: Any, logits: LazyLogits) -> Tensor:
    if logits.made is None:
        _say_once(torch.is_grad_enabled(), str(reader))
        hidden, recipe = logits.unchanged_hidden(), logits.recipe
        # Below autograd and autocast, where readers from C++ come by, neither the head's own Functions nor its
        # autocast would work: begin again at the top.
        included = torch._C._dispatch_tls_local_include_set()
        nothing = torch._C.DispatchKeySet.from_raw_repr(0)
        with torch._C._ForceDispatchKeyGuard(included, nothing), torch.inference_mode(False), torch.no_grad():
            recipe.random = random_state(hidden.device)
            logits.made = recipe(hidden.detach())
            logits.fixed = True
        if logits.real_relatives is not None:
            logits.real_relatives.append(logits)
    return logits.made


_said: set[bool] = set()


def _say_once(in_training: bool, reader: str) -> None:
    if in_training not in _said:
        _said.add(in_training)
        logger.log(
            logging.WARNING if in_training else logging.INFO,
            "Full logits were made because %s reads them; only cross entropy over them is computed in chunks.",
            reader,
        )

"""What stays lazy of `LazyLogits`: operations on each row alike, and cross entropy, which is computed in chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from hf_qlora.kernels import loss as chunked
from hf_qlora.layers.logits import LazyLogits, Recipe, Step, lazy_logits, rule


_CASTS = (
    Tensor.to,
    Tensor.type,
    Tensor.type_as,
    Tensor.float,
    Tensor.double,
    Tensor.half,
    Tensor.bfloat16,
)
_ARITHMETIC = (
    *(Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul),
    *(Tensor.div, Tensor.__truediv__, torch.div),
    *(Tensor.add, Tensor.__add__, Tensor.__radd__, torch.add),
    *(Tensor.tanh, torch.tanh),
)


@rule(*_CASTS, *_ARITHMETIC)
def _elementwise(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A cast, tanh, or arithmetic with numbers and with constant tensors of one row."""
    position = next((i for i, arg in enumerate(args) if isinstance(arg, LazyLogits)), None)
    others = [arg for i, arg in enumerate(args) if i != position] + list(kwargs.values())
    if position is None or any(isinstance(other, LazyLogits) for other in others):
        return NotImplemented
    logits: LazyLogits = args[position]
    row = torch.empty(1, logits.shape[-1], dtype=logits.dtype, device=logits.device)
    if func not in _CASTS and not all(_is_constant_row(other, row) for other in others if isinstance(other, Tensor)):
        return NotImplemented
    step = Step(func, tuple(arg for i, arg in enumerate(args) if i != position), kwargs, position)
    found = step(row)
    if not isinstance(found, Tensor) or found.device != logits.device or found.shape != row.shape:
        return NotImplemented
    if found is row:  # a cast to what it is
        return logits
    recipe = Recipe(logits.recipe.call, (*logits.recipe.steps, step))
    return lazy_logits(recipe, logits.unchanged_hidden(), logits.shape, found.dtype)


def _is_constant_row(other: Tensor, row: Tensor) -> bool:
    return not other.requires_grad and other.ndim <= 2 and other.numel() in (1, row.numel())


@rule(Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten)
def _reshaped(func: Callable[..., Any], logits: Any, *args: Any, **kwargs: Any) -> Any:
    """The rows in another order of dimensions, themselves whole."""
    shape = func(torch.empty(logits.shape, dtype=logits.dtype, device="meta"), *args, **kwargs)
    if shape.dtype != logits.dtype or shape.shape[-1:] != logits.shape[-1:] or not logits.numel():
        return NotImplemented
    hidden = logits.unchanged_hidden()
    return logits.viewed(hidden.reshape(*shape.shape[:-1], hidden.shape[-1]), shape.shape)


@rule(Tensor.contiguous)
def _contiguous(func: Callable[..., Any], logits: LazyLogits, **kwargs: Any) -> Any:
    return NotImplemented if kwargs else logits


@rule(Tensor.clone, torch.clone)
def _cloned(func: Callable[..., Any], logits: LazyLogits, **kwargs: Any) -> Any:
    """The same logits, to be made apart from these. DDP clones all outputs where it looks for unused parameters."""
    if kwargs:
        return NotImplemented
    recipe = Recipe(logits.recipe.call, logits.recipe.steps)
    return lazy_logits(recipe, logits.unchanged_hidden(), logits.shape, logits.dtype)


@rule(Tensor.__getitem__)
def _indexed(func: Callable[..., Any], logits: Any, index: Any) -> Any:
    """Some of the rows."""
    if not isinstance(logits, LazyLogits) or not _spares_last(index, logits.ndim):
        return NotImplemented
    hidden = logits.unchanged_hidden()[index]
    return logits.viewed(hidden, (*hidden.shape[:-1], logits.shape[-1]))


def _spares_last(index: Any, dimensions: int) -> bool:
    """Whether an index takes the last of the dimensions whole, and leaves it where it is."""
    items = index if isinstance(index, tuple) else (index,)
    used, after_ellipsis = 0, False
    for item in items:
        if isinstance(item, Tensor) and not isinstance(item, LazyLogits):
            used += item.ndim if item.dtype in (torch.bool, torch.uint8) else 1
        elif isinstance(item, int | slice) and not isinstance(item, bool):
            used += 1
        elif item is Ellipsis:
            after_ellipsis = True
        elif item is not None:
            return False
    if (after_ellipsis and items[-1] is not Ellipsis) or used >= dimensions:
        return isinstance(items[-1], slice) and items[-1] == slice(None)
    return True


@rule(F.cross_entropy)
def _cross_entropy(
    func: Callable[..., Any],
    logits: Any,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    index_targets = target.ndim == 1 and target.dtype == torch.int64 and type(target) in (Tensor, FakeTensor)
    fits = isinstance(logits, LazyLogits) and logits.ndim == 2 and index_targets and len(target) == len(logits)
    constant = weight is None or not weight.requires_grad
    if not fits or not constant or reduction not in ("mean", "sum") or (size_average, reduce) != (None, None):
        return NotImplemented
    if target.device != logits.device:
        return NotImplemented
    hidden, recipe, kind = logits.unchanged_hidden(), logits.recipe, logits.device.type
    settings: dict[str, Any] = {
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": label_smoothing,
    }
    recipe.call.loss_taken = True
    one = torch.empty(1, 1, dtype=logits.dtype, device=logits.device)
    dtype = func(one, target.new_zeros(1)).dtype  # autocast has a say
    frozen = recipe.call.frozen
    with torch.autocast(kind, enabled=False):
        if frozen is not None and weight is None and all(_is_widening(step) for step in recipe.steps):
            loss = chunked.linear_cross_entropy(
                hidden, frozen.unpack, frozen.bias, target, dtype=frozen.dtype, **settings
            )
        else:
            loss = chunked.chunked_cross_entropy(
                hidden,
                recipe,
                recipe.call.parameters,
                target,
                classes=logits.shape[-1],
                weight=weight,
                **settings,
            )
    return loss.to(dtype)


def _is_widening(step: Step) -> bool:
    """Whether a step changes no value."""
    if step.function not in _CASTS:
        return False
    return step(torch.empty(1, dtype=torch.float32)).dtype in (torch.float32, torch.float64)


_HOOK_ALL_OUTPUTS = ("torch.distributed.", "deepspeed.")


@rule(Tensor.register_hook, Tensor.retain_grad, Tensor.backward)
def _fixed(func: Callable[..., Any], logits: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    """Whatever depends on the gradient of these logits sees none of a chunked loss.

    FSDP and DeepSpeed hook all outputs to learn that backward begins; the loss, which they hook too, tells them that.

    Raises:
        RuntimeError: one was taken already.
    """
    of_all_outputs = any(_module_of(arg).startswith(_HOOK_ALL_OUTPUTS) for arg in args)
    if logits.recipe.call.loss_taken and func is not Tensor.backward and not of_all_outputs:
        raise RuntimeError(
            "The loss was computed in chunks and gives these logits no gradient. Set chunked_loss=False to look at it."
        )
    logits.fixed = True
    return NotImplemented


def _module_of(hook: Any) -> str:
    """Where a function, a method or a partial of one is defined."""
    return str(getattr(getattr(hook, "func", hook), "__module__", ""))


@rule(Tensor.tolist, Tensor.__repr__, Tensor.__format__, Tensor.data_ptr, Tensor.untyped_storage, Tensor.__reduce_ex__)
def _plain(func: Callable[..., Any], logits: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    """What needs memory, not a graph."""
    return func(logits.detach(), *args, **kwargs)

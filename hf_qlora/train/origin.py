"""In which layer NaN and infinity arise: a step's batches are run once more, with every module's output looked at.

Forward first: the first output that is not finite, in the order of computation. If there is none, backward: the first
gradient of an output that is not finite, in the order of backpropagation, and the last one before it that was. Dropout
draws other masks than in the step itself; nothing is changed, gradients included.

Parts of adapted layers and the output head are not looked at: hooks on them would change what is computed (they take
other paths, and full logits).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from hf_qlora.layers.head import ChunkedHead, output_head
from hf_qlora.layers.logits import LazyLogits
from hf_qlora.quant.names import plain_name


Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a model was called with


def find_origin(model: nn.Module, calls: Sequence[Call]) -> str:
    """Where NaN or infinity arises when a model is run on a step's batches, in a sentence; never an exception."""
    try:
        return _find(model, calls)
    except Exception as error:  # whatever it is, the report of what was found before goes on
        return f"not found: running the step's batches again raised {type(error).__name__}: {error}"


def _find(model: nn.Module, calls: Sequence[Call]) -> str:
    parameters = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    bad = [name for name, p in parameters.items() if not _is_finite(p)]
    if bad:
        return (
            f"in the model itself: {bad[0]} is not finite{f', nor are {len(bad) - 1} more tensors' if bad[1:] else ''}"
        )
    had_no_loss = False
    devices = {p.device for p in parameters.values() if p.device.type == "cuda"}
    for args, kwargs in calls:
        with torch.random.fork_rng(list(devices)), _watched(model) as seen, torch.enable_grad():
            loss = _loss_of(model(*args, **kwargs))
            if seen.forward is not None:
                return seen.forward
            if loss is None or not loss.requires_grad:
                had_no_loss = True
                continue
            if not _is_finite(loss):
                return f"in the output head or the loss: the loss is {loss.item()}, and what the layers give is finite"
            trained = [p for p in parameters.values() if p.requires_grad]
            gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        if seen.backward is not None:
            return seen.backward
        names = [name for name, p in parameters.items() if p.requires_grad]
        own = [name for name, g in zip(names, gradients, strict=True) if g is not None and not _is_finite(g)]
        if own:
            return f"in the gradient of {own[-1]} itself: what the layers hand on and back is finite"
    if had_no_loss:
        return (
            "not found: run once more, the layers' outputs are finite; loss and backward could not be repeated, as "
            "the model returns no loss (compute_loss makes it)"
        )
    return (
        "not found: run once more, the step's batches give finite numbers (dropout draws other masks; sums over "
        "processes and batches are not repeated)"
    )


class _Seen:
    forward: str | None = None
    backward: str | None = None
    last_finite: str | None = None


@contextmanager
def _watched(model: nn.Module) -> Iterator[_Seen]:
    seen = _Seen()
    handles = [
        module.register_forward_hook(_look_at(f"{plain_name(path)} ({type(module).__name__})", seen), with_kwargs=True)
        for path, module in _looked_at(model)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _looked_at(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules but parts of adapted layers, the head, and what it is in, which returns the loss."""
    head, modules = output_head(model), dict(model.named_modules())
    heads = [path for path, module in modules.items() if module is head or isinstance(module, ChunkedHead)]
    closed = [*heads, *(path for path, module in modules.items() if isinstance(module, LoraLayer))]
    inside = tuple(f"{path}." for path in closed)
    for path, module in modules.items():
        is_around = any(name.startswith(f"{path}.") for name in heads)
        if path and path not in heads and not is_around and not path.startswith(inside or "\0"):
            yield path, module


def _look_at(name: str, seen: _Seen) -> Any:
    def look(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        for tensor in _tensors(output):
            if seen.forward is None and not _is_finite(tensor):
                clean = all(map(_is_finite, _tensors((args, kwargs))))
                origin = "what goes into it is finite" if clean else "what goes into it is not finite either"
                seen.forward = f"in the forward of {name}: its output has NaN or infinity, {origin}"
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: came_back(gradient))

    def came_back(gradient: Tensor) -> None:
        if seen.backward is not None:
            return
        if _is_finite(gradient):
            seen.last_finite = name
        elif seen.last_finite is None:
            seen.backward = f"in the backward of the output head or the loss: what comes back to {name} is not finite"
        else:
            seen.backward = (
                f"in the backward of {seen.last_finite} or right below it: what comes back to it is finite, and what "
                f"comes back to {name} is not"
            )

    return look


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point() and not isinstance(value, LazyLogits):
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _loss_of(output: Any) -> Tensor | None:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) else None


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.detach().isfinite().all())

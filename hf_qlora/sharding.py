"""Adapters whose parameters are sharded over processes (FSDP2's DTensors), put together to be saved.

Gathering takes part in all processes, or hangs. So it happens in `save_pretrained` alone, which is called in all of
them; where a state dict is given, as Trainer gives it to the one process that saves, the tensors are taken from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn


_PARTS = ("lora_", "modules_to_save", "trainable_tokens_")  # what names of an adapter's parameters have in them


@contextmanager
def whole_adapters(model: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> Iterator[bool]:
    """Within it sharded parameters of adapters, and what else is trained, are whole; whether there were any.

    Args:
        state_dict: full tensors to take instead of gathering.

    Raises:
        ValueError: the state dict has not all of them, or they are sharded too.
    """
    sharded = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if is_sharded(parameter) and (parameter.requires_grad or any(part in name for part in _PARTS))
    ]
    full = {name: _whole(name, parameter, state_dict) for name, parameter in sharded}
    try:
        for name, _ in sharded:
            _set(model, name, nn.Parameter(full[name], requires_grad=False))
        yield bool(sharded)
    finally:
        for name, parameter in sharded:
            _set(model, name, parameter)


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


@torch.no_grad()
def _whole(name: str, parameter: nn.Parameter, state_dict: Mapping[str, Tensor] | None) -> Tensor:
    if state_dict is None:
        gathered: Tensor = cast(Any, parameter).full_tensor()
        return gathered
    given = state_dict.get(name)
    if given is None or is_sharded(given) or given.shape != parameter.shape:
        found = "nothing" if given is None else f"a part, {tuple(given.shape)}"
        raise ValueError(
            f"The adapter is sharded over processes, and state_dict has {found} for {name}, {tuple(parameter.shape)}. "
            "Pass the full state dict (accelerator.get_state_dict(model)), or none and call save_pretrained in all "
            "processes."
        )
    return given.detach()


def _set(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    parent, _, own = name.rpartition(".")
    model.get_submodule(parent)._parameters[own] = parameter

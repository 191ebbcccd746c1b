"""A model's second self: other modules, which may hold the very same tensors.

Packed weights are shared always, because nothing writes to them: a merge puts dense layers in their places. So a twin
costs its dense weights and the adapter, and one that shares everything costs nothing.
"""

from __future__ import annotations

import copy
from typing import Any

from bitsandbytes.functional import QuantState
from peft import PeftModel
from torch import nn

from hf_qlora.layers.linear import adopt
from hf_qlora.merge.names import is_of_adapter, wrapped_name
from hf_qlora.quant.base import is_quantized, take_over


def twin(model: PeftModel, share: bool = False) -> PeftModel:
    """A copy with layers of ours, which the model's need not be.

    Args:
        share: share all tensors; for reading only.
    """
    copied: PeftModel = copied_sharing(model, dense=share)
    if is_quantized(copied):
        take_over(copied.get_base_model(), None)
    adopt(copied)
    return copied


def copied_sharing(module: Any, dense: bool = True) -> Any:
    """A copy that holds the very tensors of a module; only the packed ones unless `dense`."""
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        state = getattr(tensor, "quant_state", None)
        if _is_intact(state) and (dense or state is not None):
            memo |= {id(tensor): tensor, id(state): state}
    return copy.deepcopy(module, memo)


def tied_groups(base: nn.Module) -> list[list[str]]:
    """The names, as in the base without wrappers, of parameters that are one."""
    names: dict[int, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        if not is_of_adapter(name):
            names.setdefault(id(parameter), []).append(wrapped_name(name))
    return [group for group in names.values() if len(group) > 1]


def give_own_weights(base: nn.Module, layers: list[nn.Module]) -> None:
    """Give layers about to be merged their own copy of weights that other layers hold too.

    Two names of one layer object (a layer that is used several times) stay one.
    """
    holders: dict[int, int] = {}
    for module in base.modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    for layer in layers:
        for key, parameter in list(layer.named_parameters(recurse=False)):
            if holders[id(parameter)] > 1:
                layer._parameters[key] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)


def untie_split(model: Any, groups: list[list[str]]) -> list[str]:
    """Where parameters that were one are so no more, let the model and its config say so; notes on it."""
    now = dict(model.named_parameters(remove_duplicate=False))
    split = [group for group in groups if len({id(now[name]) for name in group if name in now}) > 1]
    if not split:
        return []
    for group in groups:
        modules = {name: model.get_submodule(name.rpartition(".")[0]) for name in group}
        for name in group[1:]:
            key, parameter = name.rpartition(".")[2], now[name]
            if modules[name] is not modules[group[0]]:
                modules[name]._parameters[key] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
    if hasattr(model, "config"):
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}
    return [
        f"{' and '.join(group)} were tied and are not any more: not all of them were trained alike." for group in split
    ]


def _is_intact(state: QuantState | None) -> bool:
    """False for what bitsandbytes has repacked, which taking over unpacks in place."""
    return not getattr(state, "packing_format_for_cpu", False)

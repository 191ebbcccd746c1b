"""Which layers are quantized: linear ones that are no heads, no routers, not tied, and not named to stay dense."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

import bitsandbytes as bnb
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from hf_qlora.config import NF4Config
from hf_qlora.quant.footprint import footprint


logger = logging.getLogger(__name__)

# Last name components of the linear layers that choose experts: small, and sensitive to rounding.
ROUTER_NAMES = ("gate", "router", "shared_expert_gate", "gate_network")


def quantizable_layers(
    model: nn.Module, config: NF4Config, skip: Collection[str]
) -> tuple[dict[str, nn.Linear | Conv1D], list[str]]:
    """The layers to quantize by name, and the names of the linear layers that stay dense."""
    names = {*config.skip_modules, *skip}
    for prefix, inner in pretrained_parts(model).items():
        # transformers names parameters here, of which it strips ".weight" but not the ".bias" of a last linear layer
        kept = [name.removesuffix(".bias") for name in get_keys_to_not_convert(inner)]
        names.update(prefix + name for name in kept)
        names.update(inner._keep_in_fp32_modules or ())  # components of names, anywhere
    linear: dict[str, Any] = {name: module for name, module in model.named_modules() if _is_linear(module)}
    chosen = {name: module for name, module in linear.items() if not _stays_dense(name, names)}
    # A weight that any other module holds too is tied: an output head to its embedding, or one head to another.
    others = set(model.modules()) - set(chosen.values())
    tied = {id(parameter) for module in others for parameter in module.parameters(recurse=False)}
    layers = {name: module for name, module in chosen.items() if id(module.weight) not in tied}
    while True:
        dense = sorted(linear.keys() - layers.keys())
        # Loading the saved base, transformers takes these names as suffixes too ("classifier" in "pre_classifier").
        convertible = {name: module for name, module in layers.items() if should_convert_module(name, dense)}
        if len(convertible) == len(layers):
            return layers, dense
        layers = convertible


def pretrained_parts(model: nn.Module) -> dict[str, PreTrainedModel]:
    """The outermost models of transformers in a model, which may be one itself, by the prefix of their names."""
    found: dict[str, PreTrainedModel] = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, PreTrainedModel) and not prefix.startswith(tuple(found)):
            found[prefix] = module
    return found


def _is_linear(module: nn.Module) -> bool:
    # Subclasses are left alone: nn.MultiheadAttention's projection is one, and reads `.weight` past its forward. So
    # are reparametrized layers, whose weight is computed from other parameters.
    return type(module) in (nn.Linear, Conv1D) and "weight" in module._parameters


def _stays_dense(name: str, parts: Collection[str]) -> bool:
    """Whether the module is a router, or a run of whole components of its name is in `parts`."""
    return name.rpartition(".")[2] in ROUTER_NAMES or is_named(name, parts)


def is_named(name: str, parts: Collection[str]) -> bool:
    """Whether a run of whole components of a module's name is in `parts`."""
    return any(f".{part}." in f".{name}." for part in parts)


def warn_of_unknown_names(model: nn.Module, config: NF4Config, skip: Collection[str]) -> None:
    names = [name for name, _ in model.named_modules()]
    given = {*config.skip_modules, *skip} - set(NF4Config().skip_modules)
    unknown = sorted(part for part in given if not any(is_named(name, [part]) for name in names))
    if unknown:
        logger.warning("To stay dense: %s are no names of modules in %s.", unknown, type(model).__name__)


def warn_of_other_layers(model: nn.Module, config: NF4Config, skip: Collection[str] = ()) -> None:
    """Say where a 4-bit base without adapters is dense and `quantize_model` would not leave it so, or the reverse."""
    packed = [name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)]
    too_many = [name for name in packed if _stays_dense(name, config.skip_modules)]
    too_few = list(quantizable_layers(model, config, skip)[0])
    for names, found, expected in ((too_many, "4-bit", "dense"), (too_few, "dense", "4-bit")):
        if names:
            logger.warning(
                "%d layers are %s in this base and would be %s in one quantized by the config: %s%s. An adapter "
                "trained on the one computes something else on the other.",
                len(names),
                found,
                expected,
                ", ".join(names[:3]),
                ", …" if len(names) > 3 else "",
            )


def name_dense_experts(model: nn.Module) -> None:
    experts = [
        (f"{owner}.{name}", p)
        for owner, module in model.named_modules()
        for name, p in module.named_parameters(recurse=False)
        # Not the class and position embeddings of vision models, (1, tokens, features), nor convolutions.
        if p.ndim == 3 and p.shape[0] > 1 and p.is_floating_point() and not isinstance(module, _ConvNd)
    ]
    if experts:
        counted = footprint(model)
        share = sum(p.numel() for _, p in experts) / (counted.quantized_params + counted.dense_params)
        logger.warning(
            "%d weights stay dense because bitsandbytes' linear layers cannot hold 3-D parameters: %s, …, %.0f %% of "
            "all.",
            len(experts),
            experts[0][0],
            100 * share,
        )

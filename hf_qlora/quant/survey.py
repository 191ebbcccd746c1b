"""`quantization_report`: what quantizing a model would lose, measured before it is done.

Of a dense model every layer that `quantize_model` would pack is written in a few schemes (`quant/scheme.py`) and
compared with itself (`quant/rounding.py`), one layer at a time; the model stays as it is. The first scheme is that of
the `NF4Config`, and outliers and the skip list (`quant/skip_list.py`) go by it.

A model in NF4 has lost its dense weights: its codes tell bits a parameter, peaks and kurtosis, and no error.
`original=`, the dense model it was made from, brings the error back, however the codes were chosen.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from hf_qlora.config import NF4Config
from hf_qlora.quant import skip_list
from hf_qlora.quant.base import PROGRESS_DELAY_S, checked_config, is_quantized, refuse_interrupted
from hf_qlora.quant.checks import BaseModelError, check_layers
from hf_qlora.quant.footprint import footprint
from hf_qlora.quant.linear4bit import dense_weight
from hf_qlora.quant.packing import unpacked
from hf_qlora.quant.report import LayerQuantization, QuantizationReport
from hf_qlora.quant.rounding import (
    DensePieces,
    PackedPieces,
    Spread,
    distance,
    distances,
    gaussian_error,
    spread,
)
from hf_qlora.quant.scheme import QUANT_TYPES, Scheme, grid
from hf_qlora.quant.selection import quantizable_layers, warn_of_unknown_names
from hf_qlora.validation import ConfigError, check_model


def quantization_report(
    model: nn.Module,
    config: NF4Config | Mapping[str, Any] | None = None,
    *,
    quant_types: Iterable[str] = QUANT_TYPES,
    block_sizes: Iterable[int] = (),
    skip: Collection[str] = (),
    budget: int | str | None = None,
    original: nn.Module | None = None,
) -> QuantizationReport:
    """Measure what each layer loses in 4 bits. The model is not changed.

    Args:
        model: dense, or in NF4; without adapters.
        config: what `quantize_model` would get; `NF4Config()` by default. Not used for a model that is in NF4.
        quant_types: "nf4", "fp4" or both, to compare.
        block_sizes: to compare, beside that of `config`.
        skip: as for `quantize_model`.
        budget: bytes for layers to be left dense, as 50_000_000, "50MiB" or "5%" of what the dense model takes.
        original: the dense model that a model in NF4 was made from.

    Raises:
        BaseModelError: weights that are on the meta device or not finite; no linear layer; adapters; a model of
            another quantization, or an `original` that is not of the same layers.
        ConfigError: an unknown type or block size; a budget that cannot be read or fits no layer, or is for a model
            that is in NF4.
    """
    check_model(model)
    config = checked_config(config)
    schemes = grid(config, quant_types, block_sizes)
    refuse_interrupted(model)
    adapted = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if adapted:
        raise BaseModelError(
            f"{len(adapted)} layers have adapters ({adapted[0]}, …); the report is on a base alone. Load it without "
            "the adapter."
        )
    if is_quantized(model):
        if budget is not None:
            raise ConfigError("budget= needs the dense weights; make the report on the dense model.")
        return _of_packed(model, original)
    if original is not None:
        raise ConfigError("original= is for a model that is in NF4; this one is dense.")
    layers, dense = quantizable_layers(model, config, skip)
    check_layers(model, layers, config)
    warn_of_unknown_names(model, config, skip)
    before = footprint(model).total_bytes
    allowed = None if budget is None else skip_list.bytes_of(budget, before)
    if allowed is not None:
        skip_list.check_enough(allowed, [_cost(layer.weight, schemes[0]) for layer in layers.values()])
    found = QuantizationReport(
        model=_described(model),
        dtype=_names(layer.weight.dtype for layer in layers.values()),
        model_bytes=before,
        schemes=[str(scheme) for scheme in schemes],
        yardsticks={str(scheme): gaussian_error(scheme) for scheme in schemes},
        layers=[_of_dense(name, dense_weight(layers[name]), schemes) for name in _progress(layers)],
        dense_layers=dense,
        skip_modules=list(config.skip_modules),
    )
    if allowed is not None:
        _suggest(found, model, config, skip, allowed)
    return found


def _of_dense(name: str, weight: Tensor, schemes: list[Scheme]) -> LayerQuantization:
    seen = spread(DensePieces(weight, schemes[0].block_size))
    return _layer(name, weight.shape, weight.nbytes, schemes, distances(weight, schemes), seen)


def _of_packed(model: nn.Module, original: nn.Module | None) -> QuantizationReport:
    """On a model in 4 bits, against its original where that is given."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    if not layers or any(getattr(layer.weight, "quant_state", None) is None for layer in layers.values()):
        raise BaseModelError(
            "The model is quantized, but not to 4 bits by bitsandbytes with its weights loaded; make the report on a "
            "dense model, or on one in NF4."
        )
    schemes = sorted({Scheme.of(_packed(layer)[1]) for layer in layers.values()}, key=str)
    if len(schemes) > 1:
        raise BaseModelError(f"The layers are in {[str(s) for s in schemes]}; a report compares layers of one scheme.")
    dense = {} if original is None else _originals(original, layers)
    return QuantizationReport(
        model=_described(model),
        dtype=_names({w.dtype for w in dense.values()} or {_packed(layer)[1].dtype for layer in layers.values()}),
        model_bytes=footprint(model).total_bytes,
        schemes=[str(schemes[0])],
        yardsticks={str(schemes[0]): gaussian_error(schemes[0])},
        layers=[_of_codes(name, *_packed(layers[name]), dense.get(name)) for name in _progress(layers)],
        dense_layers=[name for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)],
    )


def _packed(layer: bnb.nn.Linear4bit) -> tuple[Tensor, QuantState]:
    return unpacked(layer.weight.data, layer.weight.quant_state)


def _of_codes(name: str, packed: Tensor, state: QuantState, dense: Tensor | None) -> LayerQuantization:
    scheme = Scheme.of(state)
    if dense is None:
        return _layer(name, state.shape, None, [scheme], {}, spread(PackedPieces(packed, state)))
    found = {scheme: distance(dense.to(packed.device), packed, state)}
    return _layer(name, dense.shape, dense.nbytes, [scheme], found, spread(DensePieces(dense, state.blocksize)))


def _originals(original: nn.Module, packed: Mapping[str, bnb.nn.Linear4bit]) -> dict[str, Tensor]:
    modules = dict(original.named_modules())
    layers: dict[str, nn.Linear | Conv1D] = {}
    for name, layer in packed.items():
        found = modules.get(name)
        if type(found) not in (nn.Linear, Conv1D):
            raise BaseModelError(f"original= has no dense linear layer {name}, as the model in NF4 has.")
        if dense_weight(found).shape != (layer.out_features, layer.in_features):
            raise BaseModelError(
                f"{name} is {layer.out_features} × {layer.in_features}, and {tuple(dense_weight(found).shape)} in "
                "original=, which is another model."
            )
        layers[name] = found
    check_layers(original, layers, NF4Config())
    return {name: dense_weight(layer) for name, layer in layers.items()}


def _layer(
    name: str,
    shape: Iterable[int],
    dense_bytes: int | None,
    schemes: Iterable[Scheme],
    found: Mapping[Scheme, float],
    seen: Spread,
) -> LayerQuantization:
    rows, columns = shape
    if not all(map(math.isfinite, found.values())):
        raise BaseModelError(f"{name}.weight has values so large that they are infinite in {[*map(str, found)]}.")
    return LayerQuantization(
        name=name,
        shape=(rows, columns),
        dense_bytes=dense_bytes,
        nbytes={str(scheme): scheme.packed_bytes(rows * columns) for scheme in schemes},
        errors={str(scheme): value / seen.norm if seen.norm else 0.0 for scheme, value in found.items()},
        norm=seen.norm,
        peak=seen.peak,
        kurtosis=seen.kurtosis,
    )


def _suggest(
    found: QuantizationReport, model: nn.Module, config: NF4Config, skip: Collection[str], budget: int
) -> None:
    """Fill in the layers to leave dense, and names that do it; a name may make further layers dense, at their cost."""
    scheme = found.schemes[0]
    errors = {layer.name: layer.squared_error(scheme) for layer in found.layers}
    costs = {layer.name: layer.cost(scheme) for layer in found.layers}
    names = skip_list.choose(errors, costs, budget)
    found.budget_bytes = budget
    while names:
        in_order = [layer.name for layer in found.layers if layer.name in names]
        asked = replace(config, skip_modules=(*config.skip_modules, *in_order))
        packed = quantizable_layers(model, asked, skip)[0]
        dense = [layer.name for layer in found.layers if layer.name not in packed]
        if sum(costs[name] for name in dense) <= budget:
            found.left_dense, found.skip_modules = dense, list(asked.skip_modules)
            return
        names = names[:-1]


def _cost(weight: Tensor, scheme: Scheme) -> int:
    return weight.nbytes - scheme.packed_bytes(weight.numel())


def _progress(layers: Mapping[str, Any]) -> Iterable[str]:
    """Their names, but one alone of several layers that share a weight."""
    first: dict[int, str] = {}
    for name, layer in layers.items():
        first.setdefault(id(layer.weight), name)
    return tqdm(first.values(), desc="Measuring", unit="layer", delay=PROGRESS_DELAY_S, leave=False)


def _described(model: nn.Module) -> str:
    name = Path(str(getattr(model, "name_or_path", None) or "")).name
    return f"{type(model).__name__} {name}".strip()


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes}))

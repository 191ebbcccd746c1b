"""What a merge does to one layer, against what was trained.

With W the weight that the adapter was trained on, T = W + ΔW, M the merged weight, and M₀ what merging no adapter in
the same way would give:

    error    ‖M − T‖ / ‖T‖                    of the weight
    noise    ‖M − T‖ / ‖ΔW‖                   of the adapter: 1 is as wrong as leaving the adapter out
    signal   ⟨M − M₀, ΔW⟩ / ‖ΔW‖²             how much of ΔW is in M
    steps    rms(ΔW) / rms(step)              below about ½, rounding to nearest takes nearly every weight back

From a base that lies on NF4's levels, most weights are rounded back to where they were, and signal says so. From one
that does not, the errors hardly depend on ΔW and leave signal at 1, however large they are: noise says that. The step
of an NF4 weight is the width of its level's cell, from midpoint to midpoint with the neighbours, times its block's
absmax; the outermost levels, which have one neighbour, take the whole gap to it.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.functional import QuantState
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_qlora.config import NF4Config
from hf_qlora.layers.errors import MergeError
from hf_qlora.layers.linear import Linear4bit
from hf_qlora.quant.codebook import nf4_levels
from hf_qlora.quant.dequantize import block_scales, wide_weight
from hf_qlora.quant.linear4bit import Linear4bit as BaseLinear4bit
from hf_qlora.quant.packing import quantize_weight


@dataclass(frozen=True)
class LayerMerge:
    """One merged layer.

    Attributes:
        delta_norm: ‖ΔW‖, Frobenius.
        relative_delta: ‖ΔW‖ / ‖W‖.
        error, noise, signal: see above; noise and signal are None where ΔW is zero.
        steps: ΔW in steps of NF4; None where the layer is not in NF4.
    """

    name: str
    delta_norm: float
    relative_delta: float
    error: float
    noise: float | None
    signal: float | None
    steps: float | None


def has_weight(layer: LoraLayer) -> bool:
    """Whether the adapter changes the one weight of its base layer, which can then be compared."""
    return isinstance(getattr(layer.get_base_layer(), "weight", None), Tensor) and not isinstance(layer, ParamWrapper)


def trained_weights(layer: Any, names: list[str]) -> tuple[Tensor, Tensor]:
    """W and T of an adapted layer, (out_features, in_features) where it is linear, in float32.

    Args:
        names: the adapters to add.
    """
    own = [name for name in names if name in layer.r]
    if isinstance(layer, Linear4bit):
        base = layer.base_layer.wide_weight().float()
        return base, layer.add_to(base, own)
    alone = copy.deepcopy(layer).float()
    W = plain_weight(alone.get_base_layer()).clone()
    alone.merge(adapter_names=own)
    return W, plain_weight(alone.get_base_layer())


def plain_weight(layer: Any) -> Tensor:
    """A layer's weight in float32, (out_features, in_features) where it is linear."""
    if isinstance(layer, BaseLinear4bit):
        unpacked: Tensor = layer.wide_weight().float()
        return unpacked
    weight: Tensor = layer.weight.detach().float()
    result: Tensor = weight.t() if isinstance(layer, Conv1D) else weight
    return result


def compare(
    name: str, base: nn.Module, trained: tuple[Tensor, Tensor], merged: nn.Module, without: Tensor | None = None
) -> LayerMerge:
    """Measure one layer.

    Args:
        base: the base layer that the adapter was trained on.
        trained: W and T.
        merged: the merged layer, with M.
        without: M₀, where it is not W.

    Raises:
        MergeError: M is not finite.
    """
    W, T = trained
    M, delta = plain_weight(merged), T - W
    size, rest = _norm(delta), _norm(M - T)
    if not math.isfinite(rest):
        raise MergeError(f"{name}: the merged weight has NaN or infinite values; an adapter or the base is broken.")
    packed = next((layer for layer in (base, merged) if isinstance(layer, BaseLinear4bit)), None)
    if packed is merged and isinstance(merged, BaseLinear4bit):  # a dense base, rounded for the first time
        config = NF4Config(double_quant=merged.state.nested, block_size=merged.state.blocksize)
        without = wide_weight(*quantize_weight(W.to(merged.state.dtype), config), merged.compute_dtype).float()
    start = W if without is None else without
    step = None if packed is None or packed.state.quant_type != "nf4" else step_rms(packed.weight, packed.state)
    return LayerMerge(
        name=name,
        delta_norm=size,
        relative_delta=_ratio(size, _norm(W)),
        error=_ratio(rest, _norm(T)),
        noise=rest / size if size else None,
        signal=float(torch.sum((M - start) * delta, dtype=torch.float64)) / size**2 if size else None,
        steps=size / math.sqrt(delta.numel()) / step if step else None,
    )


def step_rms(packed: Tensor, state: QuantState) -> float:
    """The rms of the steps of an NF4 weight."""
    codes = packed.detach().contiguous().view(torch.uint8).flatten()
    numel, size = state.shape.numel(), state.blocksize
    squares = _cell_widths(codes.device).square()
    cells = squares[torch.stack([codes >> 4, codes & 15], dim=-1).flatten()[:numel].int()]
    cells = nn.functional.pad(cells, (0, -numel % size)).reshape(-1, size).sum(1, dtype=torch.float64)
    total = float((cells * block_scales(state).double().square()).sum())
    return math.sqrt(total / numel)


def _cell_widths(device: torch.device) -> Tensor:
    levels = nf4_levels(device)
    gaps = levels.diff()
    return torch.cat([gaps[:1], (gaps[:-1] + gaps[1:]) / 2, gaps[-1:]])


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0 if not part else math.inf

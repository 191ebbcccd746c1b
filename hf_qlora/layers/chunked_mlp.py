"""MLPs that are computed for some rows of the sequence at a time.

    y = cat(MLP(x₁), MLP(x₂), …),   x = cat(x₁, x₂, …) along the sequence

Each part is checkpointed by itself, so that the intermediate activations, (rows, intermediate), exist for one part at
a time, in backward too; what stays is x and y. Parts draw dropout masks of their own, the same ones in backward; apart
from dropout the result is that of the whole but for the rounding of other products, and sums over rows are in another
order.

An MLP is found by its structure: a module within a layer that has two or more linear layers, adapted or not, beside
activations, norms and dropout, no parameters of its own, and a forward of one tensor. That it treats each row by
itself is tried on four rows of random numbers (an attention of one argument looks alike). A block of experts is none
of it, but the MLPs in it, of each expert or shared by all tokens, are.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from hf_qlora.layers.checkpointable import checkpointable_layers
from hf_qlora.layers.subclassed import Subclassed, restore, subclass
from hf_qlora.validation import ConfigError


logger = logging.getLogger(__name__)

_ROWS = 4
_EQUAL = 0.05  # of the largest result: bfloat16's rounding of two products; another row's share is far above


class ChunkedMLP(Subclassed):
    """What is put before an MLP's own class."""

    _chunk_size: int

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the MLP's own, (..., rows, hidden) to the same."""
        apply: Any = super().forward
        learns = self.training and torch.is_grad_enabled()
        if args or kwargs or not learns or hidden.ndim < 2 or not self._active:
            whole: Tensor = apply(hidden, *args, **kwargs)
            return whole
        parts = hidden.split(self._chunk_size, dim=-2)
        return torch.cat([checkpoint(apply, part, use_reentrant=False) for part in parts], dim=-2)


def chunkable(model: nn.Module, dtype: torch.dtype | None = None) -> list[Any]:
    """The MLPs of a model's layers that can be computed in chunks.

    Args:
        dtype: of what they are tried on; None: they are believed, because their weights are not there.

    Raises:
        ConfigError: there is none.
    """
    layers = checkpointable_layers(model)
    found = [list(_mlps(layer)) for layer in layers]
    kinds: dict[type[nn.Module], bool] = {}
    for mlp in (mlp for of_layer in found for mlp in of_layer):
        if type(mlp) not in kinds:
            kinds[type(mlp)] = dtype is None or _is_rowwise(mlp, dtype)
    chosen = [[mlp for mlp in of_layer if kinds[type(mlp)]] for of_layer in found]
    if not any(chosen):
        raise ConfigError(
            f"chunk_size: {type(model).__name__} has no MLP that can be computed in chunks, which is a module with "
            "two or more linear layers, of one tensor, that treats each token by itself. Blocks of experts are none, "
            "nor are linear layers that stand in the layer itself (BERT). Leave chunk_size out."
        )
    without = sum(not of_layer for of_layer in chosen)
    if without:
        logger.warning(
            "chunk_size: %d of %d layers have no MLP that can be computed in chunks (experts, or another block), and "
            "stay as they are.",
            without,
            len(layers),
        )
    return [mlp for of_layer in chosen for mlp in of_layer]


def chunk(mlps: list[Any], size: int) -> None:
    """Compute these for `size` rows at a time while they are trained."""
    for mlp in mlps:
        subclass(mlp, ChunkedMLP)
        mlp._chunk_size = size


def unchunk(model: nn.Module) -> None:
    """Let MLPs be what they were."""
    for module in model.modules():
        if isinstance(module, ChunkedMLP):
            module.__dict__.pop("_chunk_size", None)
    restore(model, ChunkedMLP)


def _mlps(layer: nn.Module) -> Iterator[Any]:
    for module in layer.modules():
        if not _is_linear(module) and sum(map(_is_linear, module.children())) >= 2 and _takes_one_tensor(module):
            parts = [part for child in module.children() if not _is_linear(child) for part in child.modules()]
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if not own and all(map(_is_elementwise, parts)):
                yield module


def _is_linear(module: nn.Module) -> bool:
    base = module.get_base_layer() if isinstance(module, LoraLayer) else module
    return isinstance(base, nn.Linear | Conv1D)


def _is_elementwise(part: nn.Module) -> bool:
    """Activations and dropout, which have no parameters, and norms."""
    is_norm = type(part).__name__.endswith("Norm") and all(p.ndim == 1 for p in part.parameters())
    return is_norm or not any(True for _ in part.parameters())


def _takes_one_tensor(module: nn.Module) -> bool:
    kinds = inspect.Parameter
    named = [
        parameter
        for parameter in inspect.signature(type(module).forward).parameters.values()
        if parameter.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
    ]
    return len(named) == 2  # with self


def _is_rowwise(mlp: nn.Module, dtype: torch.dtype) -> bool:
    """Whether it gives four rows together what it gives them two by two; weights that are not there are believed."""
    first = next(child for child in mlp.children() if _is_linear(child))
    base: Any = first.get_base_layer() if isinstance(first, LoraLayer) else first
    weight = base.weight
    if weight.device.type == "meta":
        return True
    width: int = base.in_features if isinstance(base, nn.Linear) else weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, _ROWS, width, generator=generator).to(weight.device, dtype)
    # Without dropout, but for linear layers no eval: bitsandbytes' repack their weights in it on some CPUs.
    random = [module for module in mlp.modules() if module.training and not _is_linear(module)]
    try:
        for module in random:
            module.training = False
        with torch.no_grad():
            whole = mlp(rows)
            if not isinstance(whole, Tensor) or whole.shape != rows.shape:
                return False
            halves = torch.cat([mlp(part) for part in rows.split(_ROWS // 2, dim=-2)], dim=-2)
    except (RuntimeError, TypeError, ValueError):  # another width, or more than a tensor: no MLP that we know
        return False
    finally:
        for module in random:
            module.training = True
    return bool((whole - halves).abs().max() <= _EQUAL * whole.abs().max())

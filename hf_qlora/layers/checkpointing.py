"""Gradient checkpointing: what layers keep for backward, and where.

| mode | kept for backward | costs |
| --- | --- | --- |
| `"full"` | of each layer its input | each layer's forward again |
| `"budget"` | of the last layers all, as many as fit; of the others their inputs (`budget.py`) | their forwards |
| `"offload"` | the inputs in pinned host memory (`offload.py`) | as "full", and copies beside the computation |
| `chunk_size=` | with any of them, or alone: MLPs for so many rows at a time (`chunked_mlp.py`) | MLPs again |

All of it is non-reentrant, but for mode "full" where `use_reentrant=True` asks for that, and keeps the state of the
random numbers, so that dropout draws the same masks in backward, and gradients are those without checkpointing.

transformers' layers call a function that `_set_gradient_checkpointing` gives them. That is where modes come in: on the
way of `enable_checkpointing`, of a config's `checkpointing`, and of `gradient_checkpointing_kwargs`, which Trainer and
`gradient_checkpointing_enable` turn into the keywords of that function.

Trainers enable checkpointing without keywords of ours, and disable and enable it around generation. So a model
remembers what a config or `enable_checkpointing` asked for, until `disable_checkpointing`: enabling it again without
keywords of ours brings that back. Without it, such keywords are transformers' own business, as is a function that is
not torch's; `gradient_checkpointing_disable` ends ours as well.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from hf_qlora.config.checkpointing import Checkpointing
from hf_qlora.layers.budget import Budget
from hf_qlora.layers.checkpointable import checkpointable_layers
from hf_qlora.layers.chunked_mlp import chunk, chunkable, unchunk
from hf_qlora.layers.offload import Offload
from hf_qlora.validation import ConfigError, check_model


logger = logging.getLogger(__name__)

_ASKED = "_hf_qlora_checkpointing"  # of a transformers model: what was asked for


def enable_checkpointing(
    model: nn.Module, mode: str | None = "full", budget_bytes: int | str | None = None, chunk_size: int | None = None
) -> None:
    """Let a model keep less for backward while it trains; what it computes stays the same.

    Args:
        model: a transformers model, or a `PeftModel` or other module around one. What was enabled before ends.
        mode: "full": each layer keeps its input and is run again in backward. "budget": only as many layers as
            `budget_bytes` make necessary. "offload": as "full", with the inputs in pinned host memory (CUDA; elsewhere
            it is "full"). None: layers keep what they keep.
        budget_bytes: for mode "budget": what all layers together may keep for backward, as a number or as "4GiB". A
            batch whose layers' inputs alone are more is an error in the first step, which says the least that works,
            and a warning later.
        chunk_size: compute the MLPs for so many tokens of a sequence at a time, so that their intermediate activations
            exist for those only.

    Raises:
        ConfigError: the model, or a layer of it, cannot be checkpointed in that way; the model is as it was.
    """
    settings = {"mode": mode, "budget_bytes": budget_bytes, "chunk_size": chunk_size}
    apply_checkpointing(model, Checkpointing.of(settings))


def disable_checkpointing(model: nn.Module) -> None:
    """Let layers keep their activations again, as `gradient_checkpointing_disable` does, and forget the mode."""
    check_model(model)
    base = _transformers_model(model)
    if base is not None and base.supports_gradient_checkpointing:
        base._set_gradient_checkpointing(enable=False)
        base.__dict__.pop(_ASKED, None)


def apply_checkpointing(model: nn.Module, wanted: Checkpointing) -> None:
    """As `enable_checkpointing`."""
    check_model(model)
    base = _transformers_model(model)
    if base is None:
        raise ConfigError(f"{type(model).__name__} has no transformers model in it, and so no layers to checkpoint.")
    own = type(base)._set_gradient_checkpointing
    if not base.supports_gradient_checkpointing or inspect.unwrap(own) is not _stock():
        raise ConfigError(f"{type(base).__name__} does not support gradient checkpointing in transformers.")
    base._set_gradient_checkpointing(True, functools.partial(checkpoint, **wanted.keywords()))
    base.__dict__[_ASKED] = wanted


def set_gradient_checkpointing(
    original: Callable[..., None],
    model: Any,
    enable: bool = True,
    gradient_checkpointing_func: Callable[..., Any] = checkpoint,
    every_n_layers: int = 1,
) -> None:
    """`PreTrainedModel._set_gradient_checkpointing`, which also knows keywords of ours."""
    wanted = _wanted(model, gradient_checkpointing_func) if enable else None
    if wanted is None:
        unchunk(model)
        original(model, enable, gradient_checkpointing_func, every_n_layers)
        return
    layers = checkpointable_layers(model)
    _check(wanted, every_n_layers, layers)
    mlps = [] if wanted.chunk_size is None else chunkable(model, model.dtype)
    unchunk(model)
    if wanted.chunk_size is not None:
        chunk(mlps, wanted.chunk_size)
    options = {"use_reentrant": False, **wanted.options}
    whole = Offload(options) if wanted.mode == "offload" else functools.partial(checkpoint, **options)
    original(model, wanted.mode is not None, whole, every_n_layers)
    if wanted.mode == "budget":
        assert wanted.budget_bytes is not None
        budget = Budget(wanted.budget_bytes, len(layers), options)
        for number, layer in enumerate(layers):
            layer._gradient_checkpointing_func = functools.partial(budget.call, number)


def _wanted(model: Any, function: Any) -> Checkpointing | None:
    """What keywords of ours ask for, or else what the model remembers; None: what transformers does."""
    keywords = getattr(function, "keywords", {})
    inner = getattr(function, "func", function)
    if inner is not checkpoint:
        is_transformers = getattr(inner, "__module__", None) == PreTrainedModel.__module__
        if is_transformers and Checkpointing.of_keywords(keywords) is not None:
            raise ConfigError(
                "offload=True is transformers' own and does not go with a mode; use mode='offload' instead."
            )
        return None
    wanted = Checkpointing.of_keywords(keywords)
    asked: Checkpointing | None = model.__dict__.get(_ASKED)
    if wanted is None and asked is not None:
        wanted = replace(asked, mode=asked.mode or "full", options=keywords)
        settings = asked.keywords().items()
        _say_once(", ".join(f"{name}={value!r}" for name, value in settings if value is not None))
    return wanted


@functools.cache
def _say_once(asked: str) -> None:
    logger.info(
        "Checkpointing was enabled without a mode; it is what the config or enable_checkpointing asked for: %s. "
        "disable_checkpointing(model) ends that.",
        asked,
    )


def _check(wanted: Checkpointing, every_n_layers: int, layers: list[Any]) -> None:
    if wanted.mode == "budget" and every_n_layers != 1:
        raise ConfigError(f"every_n_layers={every_n_layers} and mode='budget' both choose layers; leave one out.")
    if not layers and wanted.mode in ("budget", "offload"):
        raise ConfigError(f"mode={wanted.mode!r} needs layers that are GradientCheckpointingLayers; use mode='full'.")


def _transformers_model(model: nn.Module) -> Any:
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)


def _stock() -> Any:
    return inspect.unwrap(PreTrainedModel._set_gradient_checkpointing)

"""Checkpointing as the trace runs it: which layers keep their input alone, and what waits on the host.

Layers are transformers' `GradientCheckpointingLayer`s, in the order in which they are called. "full" checkpoints all,
"budget" the first ones (`layers/budget_rule.py`), "offload" all, with the inputs on the host but for those of the last
`IN_FLIGHT` and of the one that backward comes to next.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from hf_qlora.config.checkpointing import Checkpointing
from hf_qlora.layers.budget import Budget
from hf_qlora.layers.checkpointable import checkpointable_layers
from hf_qlora.layers.chunked_mlp import ChunkedMLP, chunk, chunkable, unchunk
from hf_qlora.layers.offload import IN_FLIGHT, Offload
from hf_qlora.train.plan.attention import AttentionOf
from hf_qlora.train.plan.trace import Block, Trace
from hf_qlora.validation import ConfigError


def asked(value: str | Mapping[str, Any] | None, config: Any, model: Any = None) -> Checkpointing:
    """What is to be planned: a mode, or a dict as configs have it; else what is set."""
    if value is None and isinstance(model, PeftModel):
        return as_set(model)
    value = getattr(config, "checkpointing", None) if value is None else value
    return Checkpointing(None) if value is None else Checkpointing.of(value)


def as_set(model: nn.Module) -> Checkpointing:
    """How a model is checkpointed now."""
    chunks = {module._chunk_size for module in model.modules() if isinstance(module, ChunkedMLP)}
    chunk_size = max(chunks, default=None)
    layer = next((layer for layer in checkpointable_layers(model) if layer.gradient_checkpointing), None)
    if layer is None:
        return Checkpointing(None, chunk_size=chunk_size)
    function: Any = layer._gradient_checkpointing_func
    budget = getattr(getattr(function, "func", None), "__self__", None)
    if isinstance(budget, Budget):
        return Checkpointing("budget", budget.limit, chunk_size)
    return Checkpointing("offload" if isinstance(function, Offload) else "full", chunk_size=chunk_size)


def described(wanted: Checkpointing) -> str:
    found = wanted.mode or "none"
    if wanted.budget_bytes is not None:
        found += f" ({wanted.budget_bytes / 2**30:.2f} GiB)"
    return found if wanted.chunk_size is None else f"{found}, MLP in chunks of {wanted.chunk_size}"


def enable(model: nn.Module, number: int, device: str) -> None:
    """Checkpoint the first so many layers.

    Raises:
        ConfigError: the model has no layers that can be.
    """
    layers = checkpointable_layers(model)
    if not layers:
        raise ConfigError(f"{type(model).__name__} has no layers that transformers can checkpoint.")
    for module in model.modules():
        if number and isinstance(module, PreTrainedModel):
            module.config.use_cache = False  # which such layers would say, one by one
    for i, layer in enumerate(layers):
        layer.gradient_checkpointing = i < number
        layer._gradient_checkpointing_func = partial(
            checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), AttentionOf(device))
        )


def chunk_mlps(model: nn.Module, chunk_size: int | None) -> None:
    """Let MLPs take so many tokens of a sequence at a time, as `enable_checkpointing` does; None: all.

    Raises:
        ConfigError: the layers have no MLP that can be computed in chunks.
    """
    unchunk(model)
    if chunk_size is not None:
        chunk(chunkable(model), chunk_size)


class Stages:
    """Tells a trace which layer runs, and moves inputs to the host and back.

    Attributes:
        inputs, outputs: of each layer that has run in forward, in order, the block of its input and of its result.
    """

    def __init__(self, model: nn.Module, trace: Trace, offload: bool) -> None:
        self.trace, self.offload = trace, offload
        self.begin()
        self._handles: list[Any] = []
        for layer in checkpointable_layers(model):
            self._handles.append(layer.register_forward_pre_hook(self._begin, with_kwargs=True))
            self._handles.append(layer.register_forward_hook(self._end))

    def begin(self) -> None:
        """Another forward."""
        self.inputs: list[Block] = []
        self.outputs: list[Block] = []
        self.in_backward = False

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _begin(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        x = args[0] if args else next((v for v in kwargs.values() if isinstance(v, Tensor)), None)
        if not isinstance(x, Tensor):
            return
        block = self.trace.note(x)
        if self.in_backward:
            self._come_back(block)
            return
        self.trace.stage = f"layer {len(self.inputs)}"
        self.inputs.append(block)
        if self.offload and len(self.inputs) > IN_FLIGHT:
            self.trace.move(self.inputs[-IN_FLIGHT - 1], away=True)

    def _end(self, layer: nn.Module, args: Any, result: Any) -> None:
        if not self.in_backward:
            self.trace.stage = "loss"
            first = result[0] if isinstance(result, tuple) else result
            if isinstance(first, Tensor):
                self.outputs.append(self.trace.note(first))

    def _come_back(self, block: Block) -> None:
        if self.offload and block in self.inputs:
            place = self.inputs.index(block)
            for wanted in self.inputs[max(place - 1, 0) : place + 1]:
                self.trace.move(wanted, away=False)

"""Gradients for what comes out of the input embeddings: reentrant checkpointing needs them to reach what follows."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel


def let_gradients_in(model: nn.Module) -> tuple[RemovableHandle, ...]:
    """Let the outputs of a model's input embeddings require gradients while something is checkpointed.

    Returns:
        the handles of the hooks.
    """
    inner = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    embeddings = {id(e): e for module in inner if (e := _input_embeddings(module)) is not None}
    hook = _LetGradientsIn(model)
    return tuple(e.register_forward_hook(hook) for e in embeddings.values())


def _input_embeddings(model: PreTrainedModel) -> nn.Module | None:
    try:
        found: nn.Module | None = model.get_input_embeddings()
    except NotImplementedError:  # transformers': some models of images and sound have none
        return None
    return found


class _LetGradientsIn:
    """A forward hook that makes an embedding's output require gradients while something is checkpointed.

    transformers' `enable_input_require_grads` does so always, which some models' and torch.compile's in-place
    operations do not bear, and with a local function, which cannot be pickled.
    """

    def __init__(self, model: nn.Module) -> None:
        self.checkpointed = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):  # some vision models' embeddings, with the size of the image
            first = self(module, inputs, output[0])
            return None if first is None else (first, *output[1:])
        if not torch.is_grad_enabled() or output.requires_grad:
            return None
        if not any(layer.gradient_checkpointing and layer.training for layer in self.checkpointed):
            return None
        return output.requires_grad_(True).clone()  # no leaf, so that it may be changed in place

"""The layers of a model that can be checkpointed."""

from __future__ import annotations

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def checkpointable_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """In the order of their names."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]

"""For what device a run on tensors without data is a plan."""

from __future__ import annotations

from contextvars import ContextVar

from torch import Tensor


planned_device: ContextVar[str | None] = ContextVar("planned_device", default=None)  # None: the run is a real one


def kind_of(tensor: Tensor) -> str:
    """The type of the device that a tensor is on, or is planned for."""
    return planned_device.get() or tensor.device.type

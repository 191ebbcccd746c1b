"""The gradients of what is trained, watched cheaply: one norm a tensor, all made at once, and read when it is free.

Norms of a step stay on the device. They are read at once where Trainer waits for the device in each step by itself
(`logging_nan_inf_filter`, its default), and with the logs otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


ABSENT = -1.0  # instead of a norm


@dataclass
class Found:
    """What was read: names of tensors, and the step."""

    step: int
    not_finite: list[str] = field(default_factory=list)
    losses_not_finite: bool = False
    idle: list[str] = field(default_factory=list)  # without a gradient, or with a zero one, for `idle_steps` in a row
    never: list[str] = field(default_factory=list)  # of these: without one, which autograd does not reach

    def __bool__(self) -> bool:
        return bool(self.not_finite or self.losses_not_finite or self.idle)


class Gradients:
    """Norms of the gradients of the trained tensors, step after step.

    Args:
        trained: by name; sharded ones have no gradient of their own here and are not for this.
        idle_steps: how many steps in a row a gradient may be zero or absent.
    """

    def __init__(self, trained: Mapping[str, nn.Parameter], idle_steps: int) -> None:
        self.names, self.parameters = list(trained), list(trained.values())
        self.idle_steps = idle_steps
        self.idle = torch.zeros(len(self.names), dtype=torch.long)
        self.absent = torch.zeros(len(self.names), dtype=torch.long)
        self.losses: list[Tensor] = []
        self._norms: list[tuple[int, Tensor, list[Tensor]]] = []

    @torch.no_grad()
    def take(self, step: int) -> None:
        """Remember this step's norms, without waiting for them."""
        gradients = {i: p.grad for i, p in enumerate(self.parameters) if p.grad is not None}
        device = self.parameters[0].device if self.parameters else torch.device("cpu")
        norms = torch.full((len(self.names),), ABSENT, device=device)
        if gradients:
            found = torch._foreach_norm(list(gradients.values()))
            stacked = torch.stack([norm.to(device, torch.float32) for norm in found])
            there = torch.tensor(list(gradients), dtype=torch.long)
            norms = stacked if len(there) == len(norms) else norms.index_copy(0, there.to(device), stacked)
        self._norms.append((step, norms, self.losses))
        self.losses = []

    def read(self) -> list[Found]:
        """What is wrong in the steps since the last reading, in order."""
        taken, self._norms = self._norms, []
        return [found for step, norms, losses in taken if (found := self._judge(step, norms.cpu(), losses))]

    def _judge(self, step: int, norms: Tensor, losses: list[Tensor]) -> Found:
        self.idle = torch.where(norms <= 0, self.idle + 1, 0)
        self.absent = torch.where(norms < 0, self.absent + 1, 0)
        due = (self.idle == self.idle_steps).tolist()  # said once
        return Found(
            step,
            not_finite=self._named((~norms.isfinite()).tolist()),
            losses_not_finite=bool(losses)
            and not bool(torch.stack([loss.float() for loss in losses]).isfinite().all()),
            idle=self._named(due),
            never=self._named([a and b for a, b in zip(due, (self.absent >= self.idle_steps).tolist(), strict=True)]),
        )

    def _named(self, flags: list[bool]) -> list[str]:
        return [name for name, flag in zip(self.names, flags, strict=True) if flag]

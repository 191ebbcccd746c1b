"""The scale of one adapted module: f · g · a (see `layers/depth.py`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_qlora.config import AdaptiveDepthLoRAConfig
from hf_qlora.kernels.shared import is_in_backward


THETA = "bias"


class DepthScale(nn.Module):
    """f · g · a of one adapted module, in float32 whatever the model is cast to.

    Attributes:
        profile: f.
        bias (`torch.nn.Parameter`, (1,)): θ; a buffer where the gain is not learned.
        observed (`torch.Tensor`, (3,)): a, the average c̄ it comes from (NaN before the first), and over how many
            steps; None where attention is not observed (`layers/attention.py`).
        merged_value: the scale with which the adapter was merged last.
    """

    bias: Tensor
    observed: Tensor | None

    def __init__(self, profile: float, config: AdaptiveDepthLoRAConfig, device: torch.device) -> None:
        super().__init__()
        self.profile, self.bound = profile, config.gain_bound
        self.merged_value = math.nan
        self._due: tuple[float, float, float] | None = None  # what `observed` becomes when backward is done
        theta = torch.zeros(1, device=device)
        if config.learn_gain:
            # Not through `__setattr__`: PEFT's low_cpu_mem_usage would put it on meta, and no file brings θ.
            self._parameters[THETA] = nn.Parameter(theta)
        else:
            self.register_buffer(THETA, theta, persistent=False)
        watched = config.attention != "off"
        self.register_buffer("observed", torch.tensor([1.0, math.nan, 0.0], device=device) if watched else None)

    def forward(self) -> Tensor:
        """The scale, (1,), in float32."""
        self._settle()
        scale = self.profile * torch.exp(self.bound * torch.tanh(self.bias / self.bound))
        return scale if self.observed is None else scale * self.observed[:1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DepthScale:
        self._settle()
        exact = {name: tensor.detach().clone() for name, tensor in (*self.named_parameters(), *self.named_buffers())}
        super()._apply(fn, recurse)
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            if tensor.dtype != torch.float32:
                tensor.data = exact[name].to(tensor.device)
        return self

    @property
    def theta(self) -> float:
        return self.bias.detach().item()

    @property
    def gain(self) -> float:
        return math.exp(self.bound * math.tanh(self.theta / self.bound))

    @property
    def attention(self) -> float:
        self._settle()
        return 1.0 if self.observed is None else self.observed[0].item()

    @property
    def concentration(self) -> float | None:
        self._settle()
        average = math.nan if self.observed is None else self.observed[1].item()
        return None if math.isnan(average) else average

    @property
    def observations(self) -> int:
        self._settle()
        return 0 if self.observed is None else int(self.observed[2].item())

    @property
    def value(self) -> float:
        """The scale, in double precision."""
        return self.profile * self.attention * self.gain

    @torch.no_grad()
    def restore(self, theta: float, attention: float, concentration: float | None, observations: int) -> None:
        self.bias.fill_(theta)
        self.see(attention, concentration, observations)

    def see(self, attention: float, concentration: float | None, observations: int) -> None:
        """Set what was observed; within a backward pass, when it is done: it may have to compute the forward again."""
        self._due = attention, math.nan if concentration is None else concentration, float(observations)
        self._settle()

    def _settle(self) -> None:
        if self._due is not None and not is_in_backward():
            if self.observed is not None:  # in a new tensor: a graph that has yet to run backward may hold the old one
                self.observed = torch.tensor(self._due, device=self.observed.device)
            self._due = None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self._settle()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def neutralise(self) -> None:
        """Become 1, and stay it but for what is learned from now on."""
        self.profile = 1.0
        self.restore(0.0, 1.0, None, 0)

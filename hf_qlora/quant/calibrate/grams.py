"""The Gram matrices of a group of layers that read the same inputs, summed up over rows as they come.

    H = Xᵀ X,   D = Xᵀ X₀

with X the inputs in the quantized model and X₀ those in the model that it stands for, (tokens, K). A token may be
weighed down, in both alike: a few that are hundreds of times as large as all others would else be all that H knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


TOKENS_AT_A_TIME = 4096
STRIPES = 4  # of H, which is symmetric: in so many, 10 of its 16 parts are computed


@dataclass
class Grams:
    """Of one group.

    Attributes:
        gram, cross (`torch.Tensor`, (K, K), float32): H, whole after `finish`, and D where it is wanted.
        cap: of `Method`.
        one_stream: whether X₀ = X.
        finite: whether the model itself gave finite inputs.
    """

    gram: Tensor
    cross: Tensor | None
    cap: float | None
    one_stream: bool = True
    finite: bool = True

    def add(self, X0: Tensor, X: Tensor) -> None:
        """Take in inputs of both streams, (tokens, K)."""
        self.one_stream = self.one_stream and torch.equal(X0, X)
        self.finite &= bool(X0.sum(dtype=torch.float32).isfinite())  # which makes no copy
        with torch.autocast(X.device.type, enabled=False), full_float32():
            for part, part0 in zip(X.split(TOKENS_AT_A_TIME), X0.split(TOKENS_AT_A_TIME), strict=True):
                part = part.float()
                weights = None if self.cap is None else _weights(part, self.cap)
                part = part if weights is None else part * weights
                for stripe in self._stripes():
                    self.gram[stripe, stripe.start :].addmm_(part[:, stripe].t(), part[:, stripe.start :])
                if self.cross is not None:
                    part0 = part0.float()
                    self.cross.addmm_(part.t(), part0 if weights is None else part0 * weights)

    def finish(self) -> None:
        """All tokens are there."""
        for stripe in self._stripes():
            self.gram[stripe.stop :, stripe] = self.gram[stripe, stripe.stop :].t()

    def _stripes(self) -> list[slice]:
        K = len(self.gram)
        width = -(-K // STRIPES)
        return [slice(start, min(start + width, K)) for start in range(0, K, width)]

    def are_finite(self) -> bool:
        return all(bool(matrix.isfinite().all()) for matrix in (self.gram, self.cross) if matrix is not None)

    def take_cross(self) -> Tensor | None:
        """D, which is then let go of; None where X₀ = X, or it was not wanted."""
        cross, self.cross = self.cross, None
        return None if self.one_stream else cross


@contextmanager
def full_float32() -> Iterator[None]:
    """Products in float32 are of float32 within it, also where TF32 or bfloat16 is allowed to stand in for it."""
    of_torch: Any = torch.backends
    backends = [of_torch.cuda.matmul, getattr(of_torch.mkldnn, "matmul", None)]
    name, full = ("fp32_precision", "ieee") if hasattr(backends[1], "fp32_precision") else ("allow_tf32", False)
    own = [(backend, getattr(backend, name)) for backend in backends if hasattr(backend, name)]
    try:
        for backend, _ in own:
            setattr(backend, name, full)
        yield
    finally:
        for backend, was in own:
            setattr(backend, name, was)


def _weights(x: Tensor, cap: float) -> Tensor:
    """(tokens, 1): what makes the norms of x's rows at most `cap` times their median, those that are not 0."""
    norms = x.norm(dim=1, keepdim=True)
    weights: Tensor = (cap * norms[norms > 0].median() / norms).clamp(max=1).nan_to_num(1.0)
    return weights

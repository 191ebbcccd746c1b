"""Cross entropy of logits that are never all there: chunk by chunk, with the gradients taken on the way.

    h (T, K), z = logits(h) (T, V), p = softmax(z), q = (1 − ε) · onehot(target) + ε / V

    loss = Σ (log Σ exp z − Σ q z) / n,    dz = (p − q) / n,    dh = dz W

Rows whose target is `ignore_index` are dropped before the head. The rest goes through the head in chunks whose float32
logits fit a budget; what a chunk adds to dh, (T, K), and to the parameters' gradients is all that is kept of it.
Backward multiplies by the incoming gradient. So there is no gradient of second order.

A frozen dense head has its formulas written out, in place in one buffer: z becomes dz. The products are in the dtype
of the model, all between them in float32, a block of rows at a time; with Triton in registers alone. Any other head
goes through autograd, one chunk at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_qlora.kernels.emulated import head_gradient, linear_into
from hf_qlora.kernels.planned import kind_of, planned_device


logger = logging.getLogger(__name__)

# Of float32 logits at a time. CPU: 1,024 rows x 576 -> 49,152 in bfloat16 on one AVX512-BF16 core took 0.67 of the
# time of full logits with 16 MiB, 0.59 with 32, 0.58 with 64 and with 128. H200: 4,096 rows x 4,096 -> 128,256 took 36
# ms with 32 MiB, 19 with 64, 15 with 128, 14 with 256 and more.
CHUNK_BYTES = {"cpu": 2**25, "cuda": 2**28}
# Of those, how many are in float32 at once: on a CPU what its cache holds (0.59; 0.66 with the whole chunk).
BLOCK_BYTES = {"cpu": 2**21}

# The sum of the losses, what it is divided by, the index of the rows kept (None: all), and the gradients of the sum
# with respect to these rows and to the parameters. They are divided in backward, together with the multiplication by
# the incoming gradient: float16 would lose small values in between.
Taken = tuple[Tensor, float, "Tensor | None", "Tensor | None", list[Tensor]]


def linear_cross_entropy(
    hidden: Tensor,
    unpack: Callable[[], Tensor],
    bias: Tensor | None,
    target: Tensor,
    *,
    dtype: torch.dtype | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Cross entropy behind a frozen linear head.

    Args:
        hidden (`torch.Tensor`, (T, K)): what the head is applied to.
        unpack: returns the head's weight, (V, K), in `dtype`; called once.
        bias (`torch.Tensor`, (V,), *optional*).
        target (`torch.Tensor`, (T,), int64): a class for each row, or `ignore_index`.
        dtype: of the products; hidden's by default.
        reduction: "mean" over the rows kept, or "sum".
        chunk_bytes: of float32 logits at a time; by default `CHUNK_BYTES`.

    Returns:
        `torch.Tensor`, (): in float32, or float64 where `dtype` is.
    """
    dtype = dtype or hidden.dtype

    def take(hidden: Tensor) -> Taken:
        index, h, t = _kept(hidden, target, ignore_index)
        W = unpack()
        narrow_bias = None if bias is None else bias.to(dtype)
        total, dh = _frozen_chunks(h, W, narrow_bias, t, label_smoothing, chunk_bytes or _chunk_bytes(h))
        return total, len(t) if reduction == "mean" else 1, index, dh, []

    loss: Tensor = _Chunked.apply(take, hidden)
    return loss


def chunked_cross_entropy(
    hidden: Tensor,
    logits_of: Callable[[Tensor], Tensor],
    parameters: Sequence[Tensor],
    target: Tensor,
    *,
    classes: int,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Cross entropy behind any head that treats each row alike; arguments and result as for `linear_cross_entropy`.

    Args:
        logits_of: from (rows, K) to (rows, V), differentiable.
        parameters: the tensors in it that get a gradient.
        classes: V.
        weight (`torch.Tensor`, (V,), *optional*): of the classes, as in `torch.nn.functional.cross_entropy`.
    """

    def take(hidden: Tensor) -> Taken:
        index, h, t = _kept(hidden, target, ignore_index)
        dh = torch.empty_like(h) if hidden.requires_grad else None
        sums = [torch.zeros_like(p, dtype=_wide(p.dtype), memory_format=torch.contiguous_format) for p in parameters]
        total: Tensor | None = None
        for rows in _chunks(h, classes * _wide(h.dtype).itemsize, chunk_bytes or _chunk_bytes(h)):
            with own_graph():
                part = h[rows].detach().requires_grad_(dh is not None)
                z = logits_of(part)
                loss = torch.nn.functional.cross_entropy(
                    z.to(_wide(z.dtype)), t[rows], weight, reduction="sum", label_smoothing=label_smoothing
                )
                wanted = [part, *parameters] if dh is not None else list(parameters)
                grads = list(torch.autograd.grad(loss, wanted, allow_unused=True))
            total = loss.detach() if total is None else total + loss.detach()
            if dh is not None:
                dh[rows] = grads.pop(0)
            for mine, grad in zip(sums, grads, strict=True):
                if grad is not None:
                    mine += grad
        assert total is not None  # there is always a chunk, be it empty
        count = 1.0 if reduction == "sum" else float(len(t) if weight is None else weight[t].sum())
        return total, count, index, dh, sums

    loss: Tensor = _Chunked.apply(take, hidden, *parameters)
    return loss


class _Chunked(torch.autograd.Function):
    """A loss whose gradients are known when it is."""

    @staticmethod
    def forward(ctx: Any, take: Callable[[Tensor], Taken], hidden: Tensor, *parameters: Tensor) -> Tensor:
        total, count, index, dh, gradients = take(hidden)
        ctx.shape, ctx.dtypes, ctx.scale = hidden.shape, [p.dtype for p in parameters], 1 / count if count else 0.0
        ctx.save_for_backward(index, dh, *gradients)
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        index, dh, *gradients = ctx.saved_tensors
        scale, dx = grad * ctx.scale, None
        if ctx.needs_input_grad[1]:
            dx = dh * scale
            if index is not None:
                dx = dx.new_zeros(ctx.shape).index_copy_(0, index, dx)
        scaled = [(g * scale).to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)]
        return None, dx, *scaled


def _kept(hidden: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor | None, Tensor, Tensor]:
    """The rows with a class: their index (None: all of them), hidden states and targets."""
    index = (target != ignore_index).nonzero().squeeze(1)
    if len(index) == len(target):
        return None, hidden, target
    return index, hidden[index], target[index]


def _frozen_chunks(
    h: Tensor, W: Tensor, bias: Tensor | None, target: Tensor, smoothing: float, chunk_bytes: int
) -> tuple[Tensor, Tensor]:
    """The sum of the losses and its gradient with respect to h, (n, K), in h's dtype."""
    wide = _wide(W.dtype)
    chunks = _chunks(h, len(W) * wide.itemsize, chunk_bytes)
    buffer = W.new_empty(chunks[0].stop, len(W))
    total, dh = W.new_zeros((), dtype=wide), torch.empty_like(h)
    for rows in chunks:
        part, z = h[rows].to(W.dtype), buffer[: rows.stop - rows.start]
        linear_into(part, W, bias, z)
        total += _to_gradient(z, target[rows], smoothing, BLOCK_BYTES.get(z.device.type, chunk_bytes))
        head_gradient(z, W, dh[rows])
    return total, dh


def _to_gradient(z: Tensor, target: Tensor, smoothing: float, block_bytes: int) -> Tensor:
    """Turn logits, (rows, V), into the gradient of the sum of their losses, which is returned."""
    if planned_device.get() == "cuda":  # with Triton, which torch for CUDA brings on Linux
        return z.new_empty(len(z), dtype=torch.float32).sum()
    if z.is_cuda and _triton_is_right(z.device, z.dtype):
        from hf_qlora.kernels.triton import logits_to_gradient

        return logits_to_gradient(z, target, smoothing).sum()
    total = z.new_zeros((), dtype=_wide(z.dtype))
    for block in _chunks(z, z.shape[1] * total.itemsize, block_bytes):
        total += _block_to_gradient(z[block], target[block, None], smoothing)
    return total


def _block_to_gradient(z: Tensor, target: Tensor, smoothing: float) -> Tensor:
    p = z.to(_wide(z.dtype))
    expected = p.gather(1, target).squeeze(1) * (1 - smoothing)  # Σ q z
    if smoothing:
        expected += smoothing * p.mean(1)
    highest = p.amax(1)
    torch.softmax(p, 1, out=p)
    total = (highest - p.amax(1).log() - expected).sum()  # the largest p is exp(highest − log Σ exp z)
    p.scatter_add_(1, target, p.new_full((), smoothing - 1).expand_as(target))
    if smoothing:
        p -= smoothing / p.shape[1]
    if p is not z:
        z.copy_(p)
    return total


@cache
def _triton_is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Compare the kernel with torch on a few logits: it may not compile where it was not tested."""
    if torch.version.hip or find_spec("triton") is None or dtype == torch.float64:
        return False
    try:
        from hf_qlora.kernels.triton import logits_to_gradient

        z = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        target, expected = torch.tensor([0, 500, 999], device=device), z.clone()
        total = _block_to_gradient(expected, target[:, None], 0.1)
        losses = logits_to_gradient(z, target, 0.1)
        torch.testing.assert_close(losses.sum(), total)
        torch.testing.assert_close(z, expected)
    except Exception as error:  # a compiler or a driver may raise anything, and torch serves as well
        logger.warning(
            "The Triton kernel for the loss does not work on %s (%s): %s: %s. torch is used.",
            device,
            dtype,
            type(error).__name__,
            error,
        )
        return False
    return True


def _chunk_bytes(tensor: Tensor) -> int:
    return CHUNK_BYTES.get(kind_of(tensor), CHUNK_BYTES["cuda"])


def _chunks(tensor: Tensor, row_bytes: int, chunk_bytes: int) -> list[slice]:
    """Slices of the rows, nearly of the same size and within the budget; an empty one where there are no rows.

    Of a plan only the first and the last: whoever counts memory learns nothing from those between.
    """
    rows = len(tensor)
    number = max(1, -(-rows * row_bytes // chunk_bytes))
    size = -(-rows // number)
    found = [slice(i, min(i + size, rows)) for i in range(0, rows, size)] if rows else [slice(0, 0)]
    return [found[0], found[-1]] if len(found) > 2 and planned_device.get() is not None else found


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@contextmanager
def own_graph() -> Iterator[None]:
    """A graph that is used up at once, so that no checkpointing or offloading around it takes its tensors."""
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        yield

"""Products in dtypes that the processor does not multiply in.

On a CPU torch leaves products in bfloat16 and float16 to oneDNN, which takes those that the processor has instructions
for. Elsewhere they are plain loops: on a core with AVX2 alone, 256 rows x 576 -> 1,536 in bfloat16 took 10 times as
long as in float32, and the gradient of x 36 times. There, float32 copies are multiplied and the result is rounded
once, as oneDNN does it. For one or two rows, as in generating, the loops are faster.

`WideProducts` does so for torch's own, of dense layers and of attention, in a model that is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from hf_qlora.kernels.planned import kind_of


FEW_ROWS = 2
PART_BYTES = 2**24  # of a float32 copy of a part of a weight


def is_emulated(tensor: Tensor) -> bool:
    """Whether products of tensors like this one are plain loops; compiled ones are the compiler's affair."""
    if torch.compiler.is_compiling() or tensor.dtype not in (torch.bfloat16, torch.float16):
        return False
    return kind_of(tensor) == "cpu" and _has_loops(tensor.dtype)


def widened(tensor: Tensor) -> Tensor:
    """What to multiply in its place."""
    return tensor.float() if is_emulated(tensor) else tensor


def product_in_parts(x: Tensor, W: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """x Wᵀ + b, (rows, N), rounded to `out`'s dtype; of W, (N, K), which is narrow, a part at a time is copied."""
    x = x.float()
    for part in _parts(W):
        product = x @ W[part].float().t()
        out[:, part] = product if bias is None else product.add_(bias[part])


def add_gradient_in_parts(dx: Tensor, g: Tensor, W: Tensor) -> Tensor:
    """Add g W, of the same weight, to a float32 dx, (rows, K), in place."""
    for part in _parts(W):
        dx.addmm_(g[:, part].float(), W[part].float())
    return dx


def linear_into(x: Tensor, W: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """x Wᵀ + b, (rows, N), without gradients, all in one dtype."""
    if is_emulated(W):
        product_in_parts(x, W, bias, out)
    elif bias is None:
        torch.mm(x, W.t(), out=out)
    else:
        torch.addmm(bias, x, W.t(), out=out)


def head_gradient(g: Tensor, W: Tensor, out: Tensor) -> None:
    """g W, (rows, K), in `out`'s dtype."""
    if is_emulated(W):
        out.copy_(add_gradient_in_parts(g.new_zeros(out.shape, dtype=torch.float32), g, W))
    elif W.dtype == out.dtype:
        torch.mm(g, W, out=out)
    else:
        out.copy_(g @ W)


def _parts(W: Tensor) -> list[slice]:
    rows = max(1, PART_BYTES // (4 * W.shape[1]))
    return [slice(start, min(start + rows, len(W))) for start in range(0, len(W), rows)]


@cache
def _has_loops(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return True
    of_onednn = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return not of_onednn[dtype]()


_PRODUCTS = (  # what layers and attention are made of in transformers
    linear,
    scaled_dot_product_attention,
    *(getattr(owner, name) for owner in (torch, Tensor) for name in ("addmm", "baddbmm", "bmm", "matmul", "mm")),
    Tensor.__matmul__,
)


class WideProducts(TorchFunctionMode):
    """Within it, without gradients, they are multiplied in float32 and rounded once where torch has loops for them."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _PRODUCTS or torch.is_grad_enabled() or not _are_emulated(args, kwargs):
            return func(*args, **kwargs)
        if func is linear:
            return _linear(*args, **kwargs)
        named = {name: _widened(value) for name, value in kwargs.items()}
        return func(*map(_widened, args), **named).to(args[0].dtype)


def _are_emulated(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the tensors of a product are, all in one dtype; what torch refuses, or has cast, is left to it."""
    if not (args and isinstance(args[0], Tensor)) or "out" in kwargs or torch.is_autocast_enabled("cpu"):
        return False
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dtype != torch.bool]
    plain = all(type(tensor) in (Tensor, Parameter) and tensor.dtype == tensors[0].dtype for tensor in tensors)
    return plain and is_emulated(args[0])


def _widened(argument: Any) -> Any:
    return widened(argument) if isinstance(argument, Tensor) else argument


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As torch's, by its names."""
    if weight.ndim < 2 or input.numel() <= FEW_ROWS * input.shape[-1]:
        return linear(input, weight, bias)
    result = input.new_empty(*input.shape[:-1], len(weight))
    product_in_parts(input.reshape(-1, input.shape[-1]), weight, bias, result.view(-1, len(weight)))
    return result

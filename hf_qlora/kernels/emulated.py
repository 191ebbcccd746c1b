"""Products in dtypes that the processor does not multiply in.

On a CPU torch leaves products in bfloat16 and float16 to oneDNN, which takes those that the processor has instructions
for. Elsewhere they are plain loops: on a core with AVX2 alone, 256 rows x 576 -> 1,536 in bfloat16 took 9 times as
long as in float32, and the gradient of x 36 times. There, float32 copies are multiplied and the result is rounded
once, as oneDNN does it. Of one or two rows the loops are faster.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from hf_qlora.kernels.planned import kind_of


FEW_ROWS = 2
BLOCK_BYTES = 2**24  # of a float32 copy of a part of a head's weight


def is_emulated(tensor: Tensor) -> bool:
    """Whether products of tensors like this one are plain loops."""
    narrow = tensor.dtype in (torch.bfloat16, torch.float16)
    return narrow and kind_of(tensor) == "cpu" and _has_loops(tensor.dtype)


def widened(tensor: Tensor) -> Tensor:
    """What to multiply in its place."""
    return tensor.float() if is_emulated(tensor) else tensor


def head_product(h: Tensor, W: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """h Wᵀ + b, (rows, V), of a weight, (V, K), that is too large to be copied as a whole."""
    if is_emulated(W) and len(h) > FEW_ROWS:
        h = h.float()
        for part in _parts(W):
            product = h @ W[part].float().t()
            out[:, part] = product if bias is None else product.add_(bias[part])
    elif bias is None:
        torch.mm(h, W.t(), out=out)
    else:
        torch.addmm(bias, h, W.t(), out=out)


def head_gradient(g: Tensor, W: Tensor, out: Tensor) -> None:
    """g W, (rows, K), of the same weight, in `out`'s dtype."""
    if is_emulated(W) and len(g) > FEW_ROWS:
        total = g.new_zeros(len(g), W.shape[1], dtype=torch.float32)
        for part in _parts(W):
            total.addmm_(g[:, part].float(), W[part].float())
        out.copy_(total)
    elif W.dtype == out.dtype:
        torch.mm(g, W, out=out)
    else:
        out.copy_(g @ W)


def _parts(W: Tensor) -> list[slice]:
    rows = max(1, BLOCK_BYTES // (4 * W.shape[1]))
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

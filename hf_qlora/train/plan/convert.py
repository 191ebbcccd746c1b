"""The peak while a dense model becomes NF4 in place, layer by layer (`quant/base.py`).

    at layer i:   dense weights of i and all that follow, packed ones before
                  + the packed weight, its float32 scales and their centred copy
                  + the workspace of one piece of rows (`quant/packing.py`)

and, before the first, the check that all weights are finite, a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hf_qlora.config import NF4Config
from hf_qlora.quant.packing import chunk_of, rows_at_a_time
from hf_qlora.quant.scheme import Scheme


# Bytes for each weight of a piece: on the CPU bitsandbytes compares it with all 16 levels in float32, twice over; on
# CUDA there are its codes alone.
WORKSPACE = {"cpu": 128.0, "cuda": 0.5}


def conversion_peak(
    dense_bytes: int, shapes: Mapping[str, torch.Size], dtype: torch.dtype, nf4: NF4Config, device: str
) -> int:
    """Bytes at the highest moment.

    Args:
        dense_bytes: of the whole dense model.
        shapes: of the weights that are quantized, in order.
        dtype: of theirs.
    """
    place, scheme = torch.device(device), Scheme.of(nf4)
    largest = max((shape.numel() for shape in shapes.values()), default=0)
    # isfinite makes |x| and two masks
    now, peak = dense_bytes, dense_bytes + min(chunk_of(place), largest) * (dtype.itemsize + 2)
    for shape in shapes.values():
        numel, row = shape.numel(), shape[-1]
        piece = min(rows_at_a_time(place, row, nf4.block_size) * row, numel)
        packed, scales = scheme.packed_bytes(numel), 2 * 4 * -(-numel // nf4.block_size)
        peak = max(peak, now + packed + scales + int(piece * WORKSPACE[device]))
        now += packed - numel * dtype.itemsize
    return peak

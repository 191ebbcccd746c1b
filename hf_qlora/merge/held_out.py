"""A merged model against the trained one, on the rows that a calibration held out.

Of causal language models the loss; of every model its outputs y, the logits or else the first tensor that it returns:

    merged     ‖ŷ − y‖ / ‖y‖    with y of the unmerged model, ŷ of the merged one
    without    ‖y₀ − y‖ / ‖y‖   with y₀ of the unmerged model with the adapter switched off

The share that is kept is 1 − (merged / without)². It is of squares, since the loss and KL grow with the square of a
small error too, so that a share means alike by each of them.

Rejected: the weights, which calibration moves away from W + ΔW so that the outputs stay right; and KL, as for prose
(`probe.py`), since what is regressed, embedded or segmented is no distribution over its last dimension.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from hf_qlora.layers.errors import MergeError
from hf_qlora.quant.calibrate.loss import mean_loss, measuring
from hf_qlora.quant.calibrate.rows import CalibrationRows
from hf_qlora.quant.calibrate.run import forward_inputs, measured_inputs


@dataclass(frozen=True)
class OutputError:
    """Relative errors of a model's outputs, of all rows together.

    Attributes:
        merged: of the merged model.
        without: of the unmerged model with the adapter switched off.
        rows: how many.
    """

    merged: float
    without: float
    rows: int

    @property
    def kept(self) -> float:
        """The share that is kept; of an adapter that changes nothing all of it."""
        return 1 - (self.merged / self.without) ** 2 if self.without else 1.0


def losses(trained: PeftModel, rows: CalibrationRows, found: Mapping[str, float]) -> dict[str, float]:
    """Nats a token of the base, of the unmerged model, and of what it was merged into; empty for other models.

    Args:
        found: of the merged model, as its calibration's report has them.
    """
    inputs = measured_inputs(rows)
    unmerged = mean_loss(trained, inputs)
    if unmerged is None:
        return {}
    with trained.disable_adapter():
        without = mean_loss(trained, inputs)
    assert without is not None
    return {"base": without, "unmerged": unmerged, "nearest": found["nearest"], "merged": found["calibrated"]}


def output_error(trained: PeftModel, merged: nn.Module, rows: CalibrationRows) -> OutputError:
    """Compare a PEFT model with what it was merged into, row by row."""
    inputs = forward_inputs(trained.get_base_model(), rows)
    first = rows.count - rows.held_out if rows.held_out else 0
    squares = [0.0, 0.0, 0.0]
    with measuring(trained, merged):
        for row in range(first, rows.count):
            one = {name: value[row : row + 1] for name, value in inputs.items()}
            expected, found = _outputs(trained, one), _outputs(merged, one)
            with trained.disable_adapter():
                plain = _outputs(trained, one)
            for i, part in enumerate((found - expected, plain - expected, expected)):
                squares[i] += float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2
    norm = math.sqrt(squares[2]) or 1.0
    return OutputError(math.sqrt(squares[0]) / norm, math.sqrt(squares[1]) / norm, rows.count - first)


def _outputs(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """In float32, without padding."""
    output = model(**inputs)
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if found is None:
        parts = output.values() if isinstance(output, Mapping) else output
        found = next((part for part in parts if isinstance(part, Tensor)), None)
    if found is None:
        raise MergeError(f"{type(model).__name__} returns no tensor to compare; merge without calibration=.")
    mask = inputs.get("decoder_attention_mask", inputs.get("attention_mask"))
    if mask is not None and found.ndim > 2 and mask.shape == found.shape[:2]:
        found = found[mask.bool()]
    return found.float()

"""What a calibration is asked to do."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Literal

from hf_qlora.quant.calibrate.group import Method
from hf_qlora.validation import ConfigError


@dataclass(frozen=True)
class Calibration:
    """Rows to calibrate on, and how; where the defaults do, the rows alone can be passed instead.

    Attributes:
        rows: whatever `calibration_rows` takes: documents, token ids, a file, a dataset, batches.
        tokenizer: for text; by default the one beside the model.
        method: how weights are rounded.
        scales: "own", of the weight that is rounded; "base", in merges: those of the base, as they are.
        resume: a folder to keep rounded layers in, from which an interrupted run goes on. It is not removed.
    """

    rows: Any
    tokenizer: Any = None
    method: Method = field(default_factory=Method)
    scales: Literal["own", "base"] = "own"
    resume: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if self.scales not in ("own", "base"):
            raise ConfigError(f"scales={self.scales!r} is not known; choose 'own' or 'base'.")
        if not isinstance(self.method, Method):
            raise ConfigError(f"method={self.method!r} must be a Method.")

"""What a calibration is asked to do."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Any, Literal

from hf_qlora.quant.calibrate.group import Method
from hf_qlora.validation import ConfigError


@dataclass(frozen=True)
class Calibration(Method):
    """Rows to calibrate on, and how; where the defaults do, the rows alone can be passed instead.

    Attributes:
        rows: whatever `calibration_rows` takes: documents, token ids, a file, a dataset, batches.
        tokenizer: for text; by default the one beside the model.
        scales: "own", of the weight that is rounded, fitted to its codes; "base", in merges: those of the base, as
            they are. Both kept the same of an adapter (docs/calibrated_nf4.md); it is never chosen by itself.
        cap: a token whose inputs' norm is above so many times the median counts as if it were that; None: never. This
            and those below, to `passes`, by keyword.
        correction: make up in each layer for what earlier layers got wrong.
        damping: how much each of a layer's inputs is taken to weigh beside what the rows say of it, as a share of the
            mean. The fewer the rows, the more it decides.
        correction_damping: likewise, for the correction.
        order: "activation", a layer's largest inputs are rounded first, or "given".
        refits: how often scales are fitted to the codes, where rows of a weight are whole blocks.
        passes: how often codes are gone through again, after each fit of the scales and at least once.
        resume: a folder to keep rounded layers in, from which an interrupted run goes on. It is not removed.
        force: calibrate on token ids of which the model knows less than one that guesses.
    """

    rows: Any
    tokenizer: Any = None
    scales: Literal["own", "base"] = "own"
    resume: str | os.PathLike[str] | None = None
    force: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scales not in ("own", "base"):
            raise ConfigError(f"scales={self.scales!r} is not known; choose 'own' or 'base'.")
        if not isinstance(self.resume, str | os.PathLike | None):
            raise ConfigError(f"resume={self.resume!r} must be the path of a folder, or None.")


def asdict(calibration: Calibration) -> dict[str, Any]:
    """How weights are rounded, as JSON types."""
    return {item.name: getattr(calibration, item.name) for item in fields(Method)} | {"scales": calibration.scales}

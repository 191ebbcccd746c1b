"""What calibration refuses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # there, and not in its __all__


if TYPE_CHECKING:
    from hf_qlora.quant.calibrate.report import CalibrationReport


class CalibrationError(ValueError):
    """Data to calibrate on that cannot be used; the message says what was given, what is allowed, and what to do."""


class CalibrationRefused(CalibrationError):
    """A calibrated rounding that loses more than rounding to nearest; `report` has what was measured."""

    def __init__(self, message: str, report: CalibrationReport) -> None:
        super().__init__(message)
        self.report = report


@contextmanager
def explained() -> Iterator[None]:
    """What torch says of too little memory, or of a matrix that it cannot solve with, with what to do."""
    try:
        yield
    except LinAlgError as error:
        raise CalibrationError(
            f"The rows say too little of a layer's inputs for the damping that was chosen ({error}). Give more rows, "
            "or more damping, as Calibration(rows, damping=0.1)."
        ) from error
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise CalibrationError(
            "There is too little memory to calibrate in: it grows with rows × length. Give fewer rows or shorter ones "
            f"(rows=, length=; --rows, --length), or another device. {str(error).splitlines()[0]}"
        ) from error

"""What calibration refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from hf_qlora.quant.calibrate.report import CalibrationReport


class CalibrationError(ValueError):
    """Data to calibrate on that cannot be used; the message says what was given, what is allowed, and what to do."""


class CalibrationRefused(CalibrationError):
    """A calibrated rounding that loses more than rounding to nearest; `report` has what was measured."""

    def __init__(self, message: str, report: CalibrationReport) -> None:
        super().__init__(message)
        self.report = report

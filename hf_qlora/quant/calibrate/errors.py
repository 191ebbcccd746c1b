"""What calibration refuses."""

from __future__ import annotations


class CalibrationError(ValueError):
    """Data to calibrate on that cannot be used; the message says what was given, what is allowed, and what to do."""

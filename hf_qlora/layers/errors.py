"""What the layers refuse."""

from __future__ import annotations


class FoldError(ValueError):
    """Scales that belong to tensors which are not there."""


class MergeError(ValueError):
    """An adapter that cannot be merged; the message names the layer and the way out."""

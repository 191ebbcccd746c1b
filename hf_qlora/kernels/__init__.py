"""The arithmetic of the training step; knows only torch."""

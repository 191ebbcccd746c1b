"""The arithmetic of the training step; knows only torch, and Triton where it is installed."""

"""What is around the training step: parameter groups, callbacks."""

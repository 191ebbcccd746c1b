"""Sharing: the push, what Trainer pushes, and the model card."""

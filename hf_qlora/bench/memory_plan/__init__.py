"""Planned peaks of memory beside measured ones: `hf-qlora bench memory-plan`."""

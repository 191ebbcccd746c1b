"""Measurements that can be run again: `hf-qlora bench`."""

"""Calibrated NF4: what a model's inputs are, measured on a few rows, decides how its weights are rounded.

rows.py       the rows that are read
packing.py    documents cut into rows
batches.py    given batches as rows
loss.py       the loss that a rounding is judged by
errors.py     what is refused
"""

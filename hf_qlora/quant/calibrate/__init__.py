"""Calibrated NF4: what a model's inputs are, measured on a few rows, decides how its weights are rounded.

rows.py       the rows that are read
reading.py    files, texts, tokens or batches as rows
packing.py    documents cut into rows
batches.py    batches joined
checks.py     what rows are held to
loss.py       the loss that a rounding is judged by
errors.py     what is refused
"""

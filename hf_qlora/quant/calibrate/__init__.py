"""Calibrated NF4: how a model's weights are rounded is decided by what it computes on a few rows.

feedback.py   a weight rounded so that its products stay right
group.py      layers that read the same inputs, rounded together
siblings.py   which layers those are
grams.py      the matrices of what they read
streams.py    one forward that rounds all layers, from the inputs that the quantized model produces
rounder.py    groups of layers to rounded ones, known or new
rounded.py    a rounded layer until its last call: its products, and how wrong they are
turns.py      forwards of some rows each, that wait for each other
run.py        from rows to the report
settings.py   what is asked for
report.py     what was done
kept.py       rounded layers, for going on after an interruption

rows.py       the rows that are read
reading.py    files, texts, tokens or batches as rows
packing.py    documents cut into rows
batches.py    batches joined
checks.py     what rows are held to
loss.py       the loss that a rounding is judged by
errors.py     what is refused
"""

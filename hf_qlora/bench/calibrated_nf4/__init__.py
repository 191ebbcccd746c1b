"""How much of an adapter a 4-bit merge keeps, and how much less a 4-bit base loses, when rounding is calibrated.

data.py     rows of text of two domains, and questions with short answers
models.py   SmolLM2, adapters trained on it, and what is measured of a model
parts.py    the measurements
run.py      which are done, in which processes, and where they are kept
report.py   tables and the picture
"""

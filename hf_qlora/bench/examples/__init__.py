"""The tables of the examples: each row is what an example found when it was run as anybody runs it.

runs.py                   which runs there are, doing them with `python examples/NAME.py`, keeping and reading them
rates.py                  learning rates: at least three for each method, the best on the validation split
statistics.py             paired differences, intervals over seeds and items, and what an interval shows
provenance.py             which seeds and which versions of this package a table is of
pages.py                  the model card and the page of the docs
classification.py         examples/text_classification.py: methods side by side, and what each costs
classification_report.py  its tables and its card
generation.py             examples/text_generation.py: the same for answers
generation_report.py      its tables and its card
generation_cost.py        its memory, times and speed
"""

"""The tables of the examples: each row is what an example found when it was run as anybody runs it.

runs.py                   which runs there are, doing them with `python examples/NAME.py`, keeping and reading them
statistics.py             paired differences over seeds, their intervals, and what an interval shows
classification.py         examples/text_classification.py: methods side by side, and what each costs
classification_report.py  its tables and its card
generation.py             examples/text_generation.py: the same for answers, with its tables and its card
generation_cost.py        its memory, times and speed
"""

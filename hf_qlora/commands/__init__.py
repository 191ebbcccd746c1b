"""The commands of the command line, but those of `bench`: each hands its options on to the module that it imports.

outcome.py, rows.py   what several share
"""

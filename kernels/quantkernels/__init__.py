"""The hot loops: functions on arrays, each with a readable truth beside it.

One folder per operation. In it `__init__.py` checks the arguments and picks a backend, `reference.py` is the truth in
numpy, and the other files are the same numbers faster. Imports numpy, torch, numba and triton, and nothing of ours.
"""

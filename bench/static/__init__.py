"""The static report: every kernel as machine code, with no GPU (`python -m bench --static`).

`metrics.py` has the formulas, `budgets.json` the limits.
"""

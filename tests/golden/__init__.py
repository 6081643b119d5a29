"""Golden cases: numbers computed with the authors' implementations, on weights and inputs that are made from names.

`python -m tests.golden DIR` runs a folder of cases and prints what passes; `test_golden.py` runs those kept here.
"""

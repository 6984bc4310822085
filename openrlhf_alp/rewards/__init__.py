"""Rewards: turn (prompt, response, label) into a number, or say why there is none.

`protocol.py` is all that episodes may import. `math.py` scores mathematical answers in worker
processes that can be killed; `verify.py` judges one answer there. `labels.py` turns data into label
text and `answers.py` finds the final answer. `normalize.py`, `structure.py`, `units.py`, `latex.py`
and `bounded.py` read both into `values.py`; `compare.py` and `equality.py` compare.
"""

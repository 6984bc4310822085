"""Rewards: turn (prompt, response, label) into a number, or say why there is none.

`protocol.py` is all that episodes may import. `math.py` scores mathematical answers in worker
processes that can be killed; `verify.py` judges one answer there. `labels.py` turns data into label
text, `answers.py` finds the final answer, `normalize.py`, `structure.py`, `units.py` and
`expressions.py` read it, `compare.py` and `equality.py` compare. docs/grading.md states the rules.
"""

"""Rewards: from (prompt, response, label) to a number, or to a named reason why there is none.

`protocol.py` is all that episodes may import; `math.py` scores mathematical answers with
math-verify in worker processes that can be killed.
"""

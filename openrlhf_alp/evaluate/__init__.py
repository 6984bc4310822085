"""Evaluation as the paper does it: avg@n and pass@k on problem sets, on inspect-ai.

    suites -> problems -> player (our episodes) -> store -> grading -> numbers -> results

`suites.py` says what is asked, `player.py` plays the episodes that training plays, `store.py` keeps
every answer, `grading.py` grades it, `numbers.py` and `results.py` count. `task.py` and `model.py`
put these parts into Inspect, which runs them and writes the logs; `run.py` drives one run folder.
"""

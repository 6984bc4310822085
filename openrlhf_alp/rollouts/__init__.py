"""Episodes over the services: what turns a prompt into an Episode, a response and its metrics.

`runners.py` builds the episode runner that a configuration asks for, on top of the rollout service;
`interpreter.py` runs an episode's code on the tool service; `response.py` turns an Episode into the
dictionary and the metrics that OpenRLHF reads. Nothing here imports OpenRLHF or Ray.
"""

"""From a prompt to an Episode: async, pure Python, no framework.

    prompt ids --Generate--> Completion --decode, Reward--> Episode

`records.py` states the token axis once; `protocols.py` names what an episode asks of the outside
world; `single_turn.py` is the loop for one answer. Nothing here imports OpenRLHF, Ray, vLLM or the
services: the learner hands in a `Generate` that speaks HTTP, a test hands in a function.
"""

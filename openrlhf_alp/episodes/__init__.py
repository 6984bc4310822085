"""From a prompt to an Episode: async, pure Python, no framework.

    single_turn.py      prompt ids --Generate--> Completion --decode, Reward--> Episode
    tool_integrated.py  prompt ids -> [Generate -> code -> Interpreter -> ids]* -> Reward -> Episode

`records.py` states the token axis once, `transcript.py` is the only place that writes on it;
`protocols.py` names what an episode asks of the outside world; `code_blocks.py` finds code in text
and renders its result, `observation.py` makes ids of that; `void.py` says what is left out of the
loss. Nothing here imports OpenRLHF, Ray, vLLM or the services: the learner hands in a `Generate`
that speaks HTTP, a test hands in a function.
"""

"""From a prompt to an Episode: async, pure Python, no framework.

    SingleTurn       prompt ids --Generate--> Completion --decode, Reward--> Episode
    ToolIntegrated   prompt ids -> [Generate -> code -> Interpreter -> ids]* -> Reward -> Episode

`records.py` states the token axis once, and `transcript.py` is the only place that writes on it.
`runners.py` plays the two kinds of episode over the `protocols.py` of the outside world.
`code_blocks.py` finds the code in the policy's text; `observation.py` turns a program's result into
the ids that the policy reads next. Nothing here imports OpenRLHF, Ray, vLLM or the services:
`rollouts` passes in a `Generate` that speaks HTTP, and a test passes in a function.
"""

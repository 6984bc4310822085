"""Two FastAPI services that know nothing of each other and nothing of the learner.

rollout  tokens in, tokens out over vLLM: exact log-probs, proved weight versions
tool     untrusted Python in an OS sandbox
common   what both share: keys, errors, request ids, logs, the wire
"""

"""Two FastAPI services that know nothing of each other and nothing of the learner.

rollout  tokens in, tokens out over vLLM: exact log-probs, weight versions verified by digest
tool     untrusted Python in an OS sandbox
common   what both share: settings, keys, errors, request ids, logs, routes, serving, the wire
"""

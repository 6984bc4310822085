"""The policy objective with one ratio (arXiv 2603.19470), in plain PyTorch.

    log pi_theta,sigma --+
                         +-> ratio.py: log r per token -> loss.py: clip(r) * advantage -> optimizer
    log mu (rollout) ----+                  |                  ^
                                            v                  |
                             telemetry.py: tails, KL     methods.py: level and clip window

It knows neither the noise (`openrlhf_alp.alp`) nor OpenRLHF, Ray or vLLM.
"""

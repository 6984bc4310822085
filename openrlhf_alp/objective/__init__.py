"""Policy objectives in plain PyTorch: ALP's single ratio (arXiv 2603.19470) and its rivals.

    methods.py: the table of presets  -> config.py: what one loss is made of
                                                    |
    log pi_theta,sigma ----+                        v
                           +-> ratio.py: log r -> loss.py: clip(r) * A * factors.py -> optimizer
    log mu or log pi_old --+                        |
                                                    v
                                             telemetry.py: tails, KL

It knows neither the noise (`openrlhf_alp.alp`) nor OpenRLHF, Ray or vLLM.
"""

"""Adaptive Layerwise Perturbation (arXiv 2603.19470) on OpenRLHF 0.11.2, rollouts as a service.

    prompt --> episode --> experience --> perturbed forward --> one ratio --> loss --> step
               episodes/   learner/       alp/perturbation.py   alp/ratio.py  alp/loss.py
                |    ^     experience.py                                        |
       generate |    | ids, log-probs, versions              theta, never sigma |
                v    |                                                          v
      clients/ --> services/rollout <---- prepare, commit ---------- learner/weight_sync.py

`alp` is pure PyTorch, `episodes` pure Python; only `learner` knows OpenRLHF, and `learner/seams.py`
lists every substitution into it. `cli` parses, wires and calls.
"""

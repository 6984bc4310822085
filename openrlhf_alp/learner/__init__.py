"""Everything that touches OpenRLHF; nobody outside this package imports it.

    cli/train_ppo_ray.py -> seams.py      what replaces what, with a drift guard
    strategy.py                           attaches ALP before DeepSpeed sees the model
    actor.py                              perturbed forward -> one ratio -> loss -> optimizer step
    experience.py                         no "old" log-prob pass, sample ids, groups made whole
    trainer.py                            first push of weights, metrics as JSON lines
    rollout_engine.py                     prompts -> episodes over the rollout service
    weight_sync.py                        theta to the service, never sigma

Importing the package installs the shims of `compat`, without which OpenRLHF does not import on a
machine that lacks flash-attn.
"""

from openrlhf_alp.learner import compat

compat.install()

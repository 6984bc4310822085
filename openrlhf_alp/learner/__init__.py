"""Everything that touches OpenRLHF; nobody outside this package imports it.

    cli/train_ppo_ray.py -> seams.py      what replaces what, with a drift guard
    strategy.py                           attaches ALP before DeepSpeed sees the model
    actor.py                              perturbed forward -> one ratio -> loss -> optimizer step
    experience.py                         no "old" log-prob pass, sample ids, groups made whole
    trainer.py                            sync or async: first push, staleness, JSON lines
    staleness.py                          groups with too old a token, dropped and counted
    rollout_engine.py                     prompts -> groups of episodes over the services
    episode_runner.py, interpreter.py     which kind of episode; the tool service as its interpreter
    agent.py                              the same episodes on OpenRLHF's own engines
    weight_sync.py                        theta to the service, never sigma
    mismatch.py                           clean learner against rollouts, at equal weights:
                                          probe.py before a run, recheck.py within it

Importing the package installs the shims of `compat`, without which OpenRLHF does not import on a
machine that lacks flash-attn.
"""

from openrlhf_alp.learner import compat

compat.install()

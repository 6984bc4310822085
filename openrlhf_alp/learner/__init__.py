"""Everything that touches OpenRLHF, Ray or DeepSpeed, and nothing else.

    cli/train_ppo_ray.py -> launch.py     checks what can be checked before Ray starts
    flags/                                each flag stated once; flags and labels that cannot work
    seams.py                              what replaces what in OpenRLHF, with a drift guard
    strategy.py                           attaches ALP before DeepSpeed sees the model
    actor.py                              perturbed forward -> one ratio -> loss -> optimizer step
    batches.py                            equally many micro-batches for every rank
    experience.py                         no "old" log-prob pass, sample ids, lost groups replaced
    trainer.py                            sync or async: first push, staleness, JSON lines
    evaluation.py                         means over every prompt
    rollout_engine.py                     prompts -> groups of episodes over the services
    server_watch.py                       whether any service is left
    agent.py                              the same episodes on OpenRLHF's own engines
    weight_sync.py                        theta to the service, never sigma
    mismatch/                             clean learner against rollouts, at equal weights

Once this package is imported, an import of OpenRLHF or DeepSpeed installs the shims of `compat`
first, without which OpenRLHF does not import on a machine that lacks flash-attn.
"""

from openrlhf_alp.learner import compat

compat.install_before_use()

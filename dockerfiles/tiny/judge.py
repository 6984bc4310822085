"""What the first step of the tiny recipe shows when everything it went through works."""

from collections.abc import Mapping

LARGEST_KL = 0.01
"""k3 KL of rollout engine and learner without staleness; a mix-up of tokens or weights gives 1."""


def faults_of(step: Mapping[str, float]) -> list[str]:
    """What is wrong with a step, from its line in metrics.jsonl; nothing if it is right."""
    holds = {
        "no program ran": step["tir/status_ok"] > 0,
        # Half of the answers that the policy knows are wrong.
        "every answer got the same reward": 0 < step["reward"] < 1,
        "there is no gradient": step["alp/weight_grad_norm"] > 0,
        "learner and engine disagree": step["alp/clean_start_k3_kl"] < LARGEST_KL,
    }
    return [fault for fault, right in holds.items() if not right]

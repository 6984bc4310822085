"""Evaluation means over every prompt of the set, not over those that happened to be answered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any
from unittest import mock

from openrlhf.trainer import ppo_trainer

from openrlhf_alp.evaluate.numbers import average, pass_at, powers_of_two

_upstream_metrics = ppo_trainer.compute_eval_metrics


def eval_metrics(
    eval_dataloader: Iterable, samples: Sequence[Any], n_samples_per_prompt: int
) -> dict[str, float]:
    """Upstream's `compute_eval_metrics`, with dropped groups counted as not solved.

    Groups are lost where answers are long or slow, so a mean over the others would flatter the
    policy. `eval_dropped_groups` says how many there were. Where rewards are 0 or 1, pass@k is the
    estimate of `openrlhf-alp evaluate`, for each k of its curve, and `pass1` has its interval.
    """
    asked: Counter[str] = Counter()
    source_of: dict[str, str] = {}
    for sources, prompts, *_ in eval_dataloader:
        asked.update(sources)
        source_of.update(zip(prompts, sources, strict=True))
    first_of_groups = samples[::n_samples_per_prompt]
    answered = Counter(source_of[sample.prompts[0]] for sample in first_of_groups)
    logs = _upstream_metrics(eval_dataloader, samples, n_samples_per_prompt)
    for source, num_asked in asked.items():
        for name in {f"pass{n_samples_per_prompt}", "pass1"}:
            key = f"eval_{source}_{name}"
            logs[key] = logs.get(key, 0.0) * answered[source] / num_asked
    for source, num_right in _num_right(samples, source_of, n_samples_per_prompt).items():
        # The groups that are missing have no right answer.
        lost = asked[source] - answered[source]
        logs |= _curve(f"eval_{source}", num_right + [0] * lost, n_samples_per_prompt)
    logs["eval_dropped_groups"] = float(asked.total() - answered.total())
    return logs


def _num_right(
    samples: Sequence[Any], source_of: Mapping[str, str], n: int
) -> dict[str, list[int]]:
    """Right answers of each group, by source; nothing when a reward is neither 0 nor 1."""
    rewards = [float(sample.rewards) for sample in samples]
    if not {0.0, 1.0}.issuperset(rewards):
        return {}
    counts: dict[str, list[int]] = {source: [] for source in source_of.values()}
    for start in range(0, len(samples), n):
        source = source_of[samples[start].prompts[0]]
        counts[source].append(round(sum(rewards[start : start + n])))
    return counts


def _curve(prefix: str, num_right: Sequence[int], n: int) -> dict[str, float]:
    curve = {f"{prefix}_pass{k}": pass_at(num_right, n, k).value for k in powers_of_two(n)}
    estimate = average(num_right, n)
    return {**curve, f"{prefix}_pass1_low": estimate.low, f"{prefix}_pass1_high": estimate.high}


def counting_every_prompt(module: ModuleType) -> AbstractContextManager[Any]:
    """Within the block, an evaluation of this upstream module uses `eval_metrics`."""
    return mock.patch.object(module, "compute_eval_metrics", eval_metrics)

"""Evaluation means over every prompt of the set, not over those that happened to be answered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any
from unittest import mock

from openrlhf.trainer import ppo_trainer

_upstream_metrics = ppo_trainer.compute_eval_metrics


def eval_metrics(
    eval_dataloader: Iterable, samples: Sequence[Any], n_samples_per_prompt: int
) -> dict[str, float]:
    """Upstream's `compute_eval_metrics`, with dropped groups counted as not solved.

    Groups are lost where answers are long or slow, so a mean over the others would flatter the
    policy. `eval_dropped_groups` says how many there were.
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
    logs["eval_dropped_groups"] = float(asked.total() - answered.total())
    return logs


def counting_every_prompt(module: ModuleType) -> AbstractContextManager[Any]:
    """Within the block, an evaluation of this upstream module uses `eval_metrics`."""
    return mock.patch.object(module, "compute_eval_metrics", eval_metrics)

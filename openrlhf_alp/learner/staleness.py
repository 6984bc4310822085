"""How old the tokens of a step are, and which groups are too old to train on.

The staleness of a token is the number of weight pushes between the version that sampled it and the
version that is updated: 0 in a synchronous run; in an asynchronous one the queue lets it grow.
Optimizer steps within one training step do not count.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from openrlhf.trainer.ppo_utils.experience import Experience

TOKEN_VERSIONS = "rollout/token_versions"
"""Key in `Experience.info` of a sample as it comes from the engine: `[((version, num_tokens), ..)]`
in the order of its action tokens. `StalenessGate.admit` takes it out again."""

STALENESS = "rollout/staleness"
"""Key in `Experience.info` of an admitted sample: (1,) float, the staleness of its oldest token."""

METRICS = {
    "rollout/staleness": "mean over samples of the staleness of their oldest token, in pushes",
    "rollout/staleness_mean": "mean staleness of the action tokens trained on",
    "rollout/staleness_max": "largest staleness of an action token trained on",
    "rollout/stale_share": "action tokens older than --rollout.max_staleness, of those that came",
}


class StalenessGate:
    """Lets groups through whose oldest token is young enough, and keeps the size of a step.

    A group is dropped whole: a baseline over the rest would be biased. When groups are dropped, the
    others wait for the next batch, while nothing is updated and so nothing ages; then as many as a
    step takes go on and the rest waits again.

    Args:
        samples_per_prompt: size of a group; the samples of a group follow each other.
        samples_per_step: how many samples a step trains on.
        max_staleness: largest staleness of a token, in weight pushes; None lets everything through.
    """

    def __init__(
        self, *, samples_per_prompt: int, samples_per_step: int, max_staleness: int | None
    ) -> None:
        self.samples_per_prompt = samples_per_prompt
        self.samples_per_step = samples_per_step
        self.max_staleness = max_staleness
        self.waiting: list[Experience] = []
        self._num_dropped_groups = 0
        self._arrived: list[np.ndarray] = []
        self._trained = np.zeros(0)

    def admit(self, samples: Sequence[Experience], version: int) -> list[Experience]:
        """The samples to update `version` with; none while fresh ones are still missing.

        Raises:
            ValueError: a token is newer than `version`, so this is not the version being updated.
        """
        self._arrived += [_staleness(sample, version) for sample in samples]
        groups = _groups([*self.waiting, *samples], self.samples_per_prompt)
        fresh = [group for group in groups if self._is_fresh(group, version)]
        self._num_dropped_groups += len(groups) - len(fresh)
        kept = [sample for group in fresh for sample in group]
        # Upstream's last batch may be short, and is trained on when nothing of it was dropped.
        untouched = len(kept) == len(samples) and not self.waiting
        is_step = untouched or len(kept) >= self.samples_per_step
        size = self.samples_per_step if is_step else 0
        admitted, self.waiting = kept[:size], kept[size:]
        if admitted:
            self._trained = np.concatenate([_settle(sample, version) for sample in admitted])
        return admitted

    def take_dropped_groups(self) -> int:
        """Groups dropped since the last call."""
        dropped, self._num_dropped_groups = self._num_dropped_groups, 0
        return dropped

    def take_metrics(self) -> dict[str, float]:
        """Of the step just admitted; all names but the first of METRICS."""
        arrived, self._arrived = np.concatenate(self._arrived), []
        bound = np.inf if self.max_staleness is None else self.max_staleness
        return {
            "rollout/staleness_mean": float(self._trained.mean()),
            "rollout/staleness_max": float(self._trained.max()),
            "rollout/stale_share": float((arrived > bound).mean()),
        }

    def _is_fresh(self, group: Sequence[Experience], version: int) -> bool:
        if self.max_staleness is None:
            return True
        return max(_staleness(s, version).max() for s in group) <= self.max_staleness


def _groups(samples: Sequence[Experience], size: int) -> list[Sequence[Experience]]:
    return [samples[start : start + size] for start in range(0, len(samples), size)]


def _staleness(sample: Experience, version: int) -> np.ndarray:
    """(num_actions,) weight pushes since each action token was sampled."""
    [spans] = sample.info[TOKEN_VERSIONS]
    versions, counts = np.array(spans).T
    if versions.max() > version:
        raise ValueError(
            f"a token was sampled by version {versions.max()}, but the version updated is "
            f"{version}. Another learner pushes to the same service; give each learner its own."
        )
    return np.repeat(version - versions, counts).astype(np.float64)


def _settle(sample: Experience, version: int) -> np.ndarray:
    """Put the sample's staleness where its versions were; upstream merges tensors only."""
    staleness = _staleness(sample, version)
    del sample.info[TOKEN_VERSIONS]
    sample.info[STALENESS] = torch.tensor([staleness.max()])
    return staleness

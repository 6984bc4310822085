"""A recorded batch as tensors: predictions, advantages, and micro-batches that fit into memory.

Here the token axis (T,) becomes that of predictions (A = T - 1): position t - 1 predicts token t.

Letters: B samples of the batch, A predictions of its longest sample; b, a of a micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from openrlhf_alp.replay.files.records import RecordedSample

_MIN_STD = 1e-9
"""Added to a group's standard deviation, as OpenRLHF's group_norm does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTensors:
    """What a loss reads besides the learner's log-probs; on the CPU."""

    rollout_log_probs: Tensor
    """(B, A) float32, 0.0 off the action mask."""
    advantages: Tensor
    """(B, A) float32, 0.0 off the action mask."""
    action_mask: Tensor
    """(B, A) bool."""

    def rows(self, rows: Sequence[int]) -> "BatchTensors":
        """The same of some samples."""
        index = list(rows)
        return BatchTensors(
            rollout_log_probs=self.rollout_log_probs[index],
            advantages=self.advantages[index],
            action_mask=self.action_mask[index],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Samples of one forward pass, padded on the right."""

    rows: tuple[int, ...]
    """Their places in the batch."""
    token_ids: Tensor
    """(b, a + 1) int64; 0 at padding."""
    attention_mask: Tensor
    """(b, a + 1) int64."""
    action_mask: Tensor
    """(b, a) bool."""
    sample_ids: Tensor
    """(b,) int64, the samples' numbers, which key their noise."""

    def to(self, device: torch.device) -> "MicroBatch":
        return MicroBatch(
            rows=self.rows,
            token_ids=self.token_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            action_mask=self.action_mask.to(device),
            sample_ids=self.sample_ids.to(device),
        )


def batch_tensors(samples: Sequence[RecordedSample]) -> BatchTensors:
    """Pad the samples to the longest one."""
    longest = max(sample.num_tokens for sample in samples) - 1
    advantages = advantages_of(samples)
    mask = torch.zeros(len(samples), longest, dtype=torch.bool)
    rollout, gains = torch.zeros(2, len(samples), longest)
    for row, sample in enumerate(samples):
        length = sample.num_tokens - 1
        mask[row, :length] = torch.from_numpy(sample.action_mask[1:])
        rollout[row, :length] = torch.from_numpy(sample.rollout_log_probs[1:].copy())
        gains[row, :length] = torch.from_numpy(advantages[row][1:].copy())
    return BatchTensors(
        rollout_log_probs=torch.where(mask, rollout, 0.0),
        advantages=torch.where(mask, gains, 0.0),
        action_mask=mask,
    )


def advantages_of(samples: Sequence[RecordedSample]) -> list[np.ndarray]:
    """(T,) float32 for each sample: the recorded ones, or (reward - mean) / std of its group.

    A group of one sample has nothing to be compared with, and gets 0.
    """
    groups: dict[str, list[float]] = {}
    for sample in samples:
        groups.setdefault(sample.group, []).append(sample.reward or 0.0)
    found = []
    for sample in samples:
        if sample.advantages is not None:
            found.append(sample.advantages)
            continue
        rewards: np.ndarray = np.array(groups[sample.group])
        std = rewards.std(ddof=1) if rewards.size > 1 else 0.0
        gain = ((sample.reward or 0.0) - rewards.mean()) / (std + _MIN_STD)
        found.append(np.where(sample.action_mask, np.float32(gain), np.float32(0)))
    return found


def micro_batches(
    samples: Sequence[RecordedSample], max_tokens: int, rows: Sequence[int] | None = None
) -> list[MicroBatch]:
    """Cut samples, similar lengths together, so that none is larger than `max_tokens` with padding.

    Args:
        samples: the whole batch.
        max_tokens: b * (a + 1) of a micro-batch; a longer sample stands alone.
        rows: places of the samples that are cut; None for all.
    """
    places = range(len(samples)) if rows is None else rows
    # The longest first, so that memory is at its largest in the first pass and not after an hour.
    ordered = sorted(places, key=lambda place: -samples[place].num_tokens)
    cut: list[list[int]] = []
    for place in ordered:
        # The first of a micro-batch is its longest.
        if not cut or (len(cut[-1]) + 1) * samples[cut[-1][0]].num_tokens > max_tokens:
            cut.append([])
        cut[-1].append(place)
    return [_padded(samples, rows) for rows in cut]


def _padded(samples: Sequence[RecordedSample], rows: Sequence[int]) -> MicroBatch:
    longest = samples[rows[0]].num_tokens
    token_ids = torch.zeros(len(rows), longest, dtype=torch.long)
    attention_mask = torch.zeros(len(rows), longest, dtype=torch.long)
    action_mask = torch.zeros(len(rows), longest - 1, dtype=torch.bool)
    for row, place in enumerate(rows):
        sample = samples[place]
        length = sample.num_tokens
        token_ids[row, :length] = torch.from_numpy(sample.token_ids.astype(np.int64))
        attention_mask[row, :length] = 1
        action_mask[row, : length - 1] = torch.from_numpy(sample.action_mask[1:])
    return MicroBatch(
        rows=tuple(rows),
        token_ids=token_ids,
        attention_mask=attention_mask,
        action_mask=action_mask,
        sample_ids=torch.tensor([samples[place].sample for place in rows]),
    )

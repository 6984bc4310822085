"""`--alp.record`: every step's batch as one file, written while the step trains.

    RolloutEngine -> Experience.info[EPISODE] -> begin() takes them out -> record() with advantages

Only the controller records: the samples pass through it, and it has nothing to do while the ranks
train. `openrlhf_alp.replay` reads the files.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from openrlhf.trainer.ppo_utils.experience import Experience

from openrlhf_alp.episodes.records import Episode
from openrlhf_alp.learner.experience import EPISODE, SAMPLE_ID
from openrlhf_alp.replay.files.records import RecordedBatch, RecordedSample
from openrlhf_alp.replay.files.schema import BatchInfo
from openrlhf_alp.replay.files.write import BatchWriter


class StepRecorder:
    """Records the steps of one run.

    Args:
        args: the run's settled args; `args.alp.record` is the folder.
    """

    def __init__(self, args: SimpleNamespace) -> None:
        self._args = args
        self._writer = BatchWriter(Path(args.alp.record))
        self._episodes: dict[int, Episode] = {}
        self._info = BatchInfo()

    def begin(self, samples: Sequence[Experience], *, step: int, contract: dict[str, Any]) -> None:
        """Take the episodes out of `samples`, in which OpenRLHF can merge tensors only.

        Args:
            samples: of the step, before upstream batches them.
            step: its number, from 1 on.
            contract: of the rollout service, which still serves the weights that the step updates.
        """
        self._episodes = {}
        for sample in samples:
            [self._episodes[int(sample.info[SAMPLE_ID])]] = sample.info.pop(EPISODE)
        self._info = batch_info(self._args, step=step, contract=contract)

    def record(self, experiences: Sequence[Experience]) -> None:
        """Hand the step's batch, which now has its advantages, to the writer."""
        group_size = self._args.rollout.n_samples_per_prompt
        samples = [
            recorded_sample(
                self._episodes[int(experience.info[SAMPLE_ID][row])],
                experience,
                row,
                group=str(place // group_size),
            )
            for experience in experiences
            for row, place in enumerate(experience.index)
        ]
        self._writer.put(RecordedBatch(info=self._info, samples=tuple(samples)))

    def close(self) -> None:
        """Return when every file is on the disk."""
        self._writer.close()


def recorded_sample(
    episode: Episode, experience: Experience, row: int, *, group: str
) -> RecordedSample:
    """The sample in `row` of `experience`, (B, T-1), on its episode's token axis (T,)."""
    num_tokens = len(episode.token_ids)
    advantages: np.ndarray = np.zeros(num_tokens, dtype=np.float32)
    trained: np.ndarray = np.zeros(num_tokens, dtype=bool)
    # The first token has no prediction. A sample of a batch is padded to its longest one.
    length = min(num_tokens - 1, experience.action_mask.shape[1])
    trained[1 : length + 1] = experience.action_mask[row, :length].bool().numpy()
    advantages[1 : length + 1] = experience.advantages[row, :length].float().numpy()
    edges = np.flatnonzero(np.diff(np.concatenate([[False], trained, [False]])))
    return RecordedSample.of_episode(
        episode,
        action_ranges=tuple((int(s), int(e)) for s, e in edges.reshape(-1, 2)),
        advantages=np.where(trained, advantages, np.float32(0)),
        sample=int(experience.info[SAMPLE_ID][row]),
        group=group,
    )


def batch_info(args: SimpleNamespace, *, step: int, contract: dict[str, Any]) -> BatchInfo:
    """What a file says about a step of this run."""
    return BatchInfo(
        package_version=importlib.metadata.version("openrlhf-alp"),
        step=step,
        policy_version=contract.get("version"),
        model=str(args.actor.model_name_or_path),
        model_digest=contract.get("digest", ""),
        method=args.alp.method if args.alp.enable else args.actor.policy_loss_type,
        contract=contract,
        sampling={
            "temperature": args.rollout.temperature,
            "top_p": args.rollout.top_p,
            "max_tokens": args.rollout.max_new_tokens,
        },
        seeds={"train": args.train.seed, "noise": args.alp.noise.seed},
        training={
            "learning_rate": args.actor.adam.lr,
            "adam_betas": list(args.actor.adam.betas),
            "max_norm": args.actor.max_norm,
            "train_batch_size": args.train.batch_size,
            "advantage_estimator": args.algo.advantage.estimator,
            "kl_coefficient": args.algo.kl.init_coef,
            "alp": asdict(args.alp),
        },
    )

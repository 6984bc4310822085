"""Which recorded batch is meant, and whether a model holds the weights that it was recorded at."""

from collections.abc import Mapping
from pathlib import Path

import torch

from openrlhf_alp.replay.files.records import RecordedBatch
from openrlhf_alp.replay.learner import DTYPES, Learner


def pick_batch(
    batches: Mapping[Path, RecordedBatch], learner: Learner
) -> tuple[Path, RecordedBatch]:
    """The first of the batches that was recorded at the learner's weights, else the first of all.

    Args:
        batches: at least one, from `read_batches`.
    """
    if len(batches) == 1:
        return next(iter(batches.items()))
    digests = learner.digests().values()
    own = [file for file, batch in batches.items() if batch.info.model_digest in digests]
    file = min(own or batches)
    return file, batches[file]


def digest_of(learner: Learner, batch: RecordedBatch) -> str:
    """The learner's digest, to be compared with `batch.info.model_digest`.

    A service digests the tensors of its checkpoint in their own dtype, which need not be the one it
    computes in; so the recorded digest is looked for in every dtype.
    """
    found = learner.digests()
    recorded = batch.info.model_digest
    return recorded if recorded in found.values() else found[serving_dtype(batch)]


def serving_dtype(batch: RecordedBatch) -> torch.dtype:
    """Of the rollout engine; bfloat16 when the file does not say."""
    return DTYPES.get(str(batch.info.contract.get("dtype")), torch.bfloat16)

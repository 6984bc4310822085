"""Which recorded batch is meant, and whether a model holds the weights that it was recorded at."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from openrlhf_alp.replay.files.checks import BatchFileError, Fault
from openrlhf_alp.replay.files.read import read_all
from openrlhf_alp.replay.files.records import RecordedBatch
from openrlhf_alp.replay.files.schema import BatchInfo
from openrlhf_alp.replay.learner import DTYPES, Learner


def pick_batch(
    infos: Mapping[Path, BatchInfo], learner: Learner, say: Callable[[str, str], None]
) -> tuple[Path, RecordedBatch]:
    """The first batch that was recorded at the learner's weights, else the first of all.

    Only what is picked is read: a long run's folder would not fit into memory.

    Args:
        infos: from `find_batches`.
        say: takes "skipped" and what is wrong with a file that would have been picked.

    Raises:
        BatchFileError: every file is faulty.
    """
    digests = learner.digests().values()
    order = sorted(infos, key=lambda file: (infos[file].model_digest not in digests, file))
    faults: list[Fault] = []
    for file, found in read_all(order):
        if isinstance(found, RecordedBatch):
            return file, found
        faults += found
        for fault in found:
            say("skipped", str(fault))
    raise BatchFileError(faults)


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

"""Which recorded batch is meant, and whether a model holds the weights that it was recorded at."""

from collections.abc import Callable
from pathlib import Path

import torch

from openrlhf_alp.replay.files.checks import BatchFileError
from openrlhf_alp.replay.files.read import find_files, read_all, read_batch
from openrlhf_alp.replay.files.records import RecordedBatch
from openrlhf_alp.replay.learner import DTYPES, Learner

Say = Callable[[str, str], None]
"""Takes the name of a stage and a line."""


def pick_batch(
    path: Path, step: int | None, learner: Learner, say: Say
) -> tuple[Path, RecordedBatch]:
    """The batch of a file, or one of a folder; what is wrong with the others is said.

    Args:
        step: of a folder. None: the first that was recorded at the learner's weights, else the
            first of all.

    Raises:
        BatchFileError: the file, or every file of the folder, is faulty.
        ValueError: the folder has no such step.
        OSError: nothing is there.
    """
    if path.is_file():
        return path, read_batch(path)
    files, faults = find_files(path)
    good: dict[Path, RecordedBatch] = {}
    for file, found in read_all(files):
        if isinstance(found, RecordedBatch):
            good[file] = found
        else:
            faults += found
    for fault in faults:
        say("skipped", str(fault))
    if not good:
        raise (
            BatchFileError(faults)
            if faults
            else ValueError(f"{path} has no batch file; --alp.record writes them")
        )
    if step is not None:
        chosen = [file for file, batch in good.items() if batch.info.step == step]
        if not chosen:
            steps = sorted(batch.info.step for batch in good.values())
            raise ValueError(f"--step {step} is not in {path}; readable are {steps}")
        return chosen[0], good[chosen[0]]
    digests = learner.digests().values()
    own = [file for file, batch in good.items() if batch.info.model_digest in digests]
    file = min(own or good)
    return file, good[file]


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

"""What may be wrong with a recorded sample: one sentence for each fault, with its field and value.

Letters: T tokens of the sample.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from openrlhf_alp.replay.files.records import RecordedSample

MAX_LOG_PROB = 1e-4
"""A log-prob is at most 0; a float32 log-softmax exceeds it by this much through rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Something that keeps a file from being used."""

    file: str
    text: str
    """What is wrong, with the value, and what to do about it."""
    sample: int | None = None
    """Row in the file, from 0 on; None: the file as a whole."""
    field: str = ""

    def __str__(self) -> str:
        sample = "" if self.sample is None else f", sample {self.sample}"
        field = f", field {self.field}" if self.field else ""
        return f"{self.file}{sample}{field}: {self.text}"


class BatchFileError(ValueError):
    """A file cannot be used; the message names file, sample and field of the first faults.

    Attributes:
        faults: all of them.
    """

    _SHOWN = 5

    def __init__(self, faults: list[Fault]) -> None:
        lines = [str(fault) for fault in faults[: self._SHOWN]]
        if len(faults) > self._SHOWN:
            lines.append(f"and {len(faults) - self._SHOWN} more faults")
        super().__init__("\n".join(lines))
        self.faults = faults


def sample_faults(sample: RecordedSample) -> Iterator[tuple[str, str]]:
    """(field, fault) of everything that is wrong with one sample."""
    num_tokens = sample.num_tokens
    if num_tokens < 2:
        yield "token_ids", f"{num_tokens} token(s); a prompt and an answer need 2 at least"
        return
    if (sample.token_ids < 0).any():
        place = int(np.argmax(sample.token_ids < 0))
        yield "token_ids", f"id {sample.token_ids[place]} at position {place}; ids begin at 0"
    if text := _range_fault(sample):
        yield "action_ranges", text
        return
    yield from _log_prob_faults(sample)
    yield from _advantage_faults(sample)


def vocabulary_fault(sample: RecordedSample, vocab_size: int) -> str:
    """The fault of an id that the model has no embedding for; empty when there is none."""
    outside = sample.token_ids >= vocab_size
    if not outside.any():
        return ""
    place = int(np.argmax(outside))
    return (
        f"id {sample.token_ids[place]} at position {place} is outside the model's vocabulary of "
        f"{vocab_size}: the tokens are those of another model. Give the model that sampled them "
        "with --model"
    )


def _range_fault(sample: RecordedSample) -> str:
    last = 0
    for start, end in sample.action_ranges:
        if not last <= start < end <= sample.num_tokens:
            return (
                f"{start}..{end} does not follow {last} or ends beyond the {sample.num_tokens} "
                "tokens; ranges are half-open, ascending and within the sample"
            )
        last = end
    if sample.action_ranges and sample.action_ranges[0][0] == 0:
        return "position 0 is an action, but no token before it predicts it; add the prompt"
    return ""


def _log_prob_faults(sample: RecordedSample) -> Iterator[tuple[str, str]]:
    name, log_probs = "rollout_log_probs", sample.rollout_log_probs
    if len(log_probs) != sample.num_tokens:
        yield (
            name,
            f"{len(log_probs)} values for {sample.num_tokens} tokens; one is needed for each",
        )
        return
    actions = sample.action_mask
    for bad, what in (
        (~np.isfinite(log_probs), "is missing or not finite"),
        (log_probs > MAX_LOG_PROB, "is positive: it is no log-probability"),
    ):
        if (bad & actions).any():
            place = int(np.argmax(bad & actions))
            yield (
                name,
                f"{log_probs[place]} at position {place}, an action, {what} "
                f"({int((bad & actions).sum())} such). Sample again with log-probs of every token",
            )


def _advantage_faults(sample: RecordedSample) -> Iterator[tuple[str, str]]:
    advantages = sample.advantages
    if advantages is None:
        if sample.reward is None or not np.isfinite(sample.reward):
            yield (
                "reward",
                f"{sample.reward}, and no advantages; give a finite reward and its group, or "
                "advantages",
            )
        return
    if len(advantages) != sample.num_tokens:
        yield (
            "advantages",
            f"{len(advantages)} values for {sample.num_tokens} tokens; one is needed for each",
        )
    elif not np.isfinite(advantages[sample.action_mask]).all():
        place = int(np.argmax(~np.isfinite(advantages) & sample.action_mask))
        yield "advantages", f"{advantages[place]} at position {place}, an action, is not finite"

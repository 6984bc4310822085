"""Which weights drew which token, recorded at the pause of each update and never guessed later."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

from services.rollout.wire.schemas import Span

_ALL = sys.maxsize
"""Token count of a job that had drawn its last token; its length is known when it ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """A policy version: the learner's counter, and the digest that identifies the weights."""

    number: int
    digest: str


class VersionLog:
    """The serving version, and for each running job the token counts at which it changed.

    `advance` has to be called while the engine is paused, after the new weights are loaded and
    before it draws again: only then are the counts exact.
    """

    def __init__(self, current: Version) -> None:
        self.current = current
        # job -> (version, number of tokens drawn when it was replaced), oldest first
        self._running: dict[str, list[tuple[Version, int]]] = {}

    @property
    def num_running(self) -> int:
        return len(self._running)

    def begin(self, job_id: str) -> None:
        """Start to follow a job. Every job has to be ended with `end`."""
        self._running[job_id] = []

    def advance(self, new: Version, num_tokens: Callable[[str], int | None]) -> None:
        """Close the current version for every running job and make `new` the current one.

        Args:
            new: the version that draws from here on.
            num_tokens: tokens drawn so far by a job; None when it has drawn its last.
        """
        for job_id, replaced in self._running.items():
            count = num_tokens(job_id)
            replaced.append((self.current, _ALL if count is None else count))
        self.current = new

    def end(self, job_id: str, total: int) -> list[Span]:
        """Stop following a job of `total` tokens and return its spans, which cover [0, total)."""
        spans = []
        start = 0
        for version, count in [*self._running.pop(job_id), (self.current, _ALL)]:
            # A failed job has a total of 0, below the counts taken while it was running.
            stop = min(count, total)
            # A version that drew none of this job's tokens gets no span.
            if stop > start:
                spans.append(
                    Span(version=version.number, digest=version.digest, start=start, end=stop)
                )
                start = stop
        return spans

"""Which weights drew which token. Stamped here, at the pause boundary, never guessed afterwards."""

from collections.abc import Callable
from dataclasses import dataclass, field

from services.rollout.wire.schemas import Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """A policy version: the learner's counter and the digest that proves what is served."""

    number: int
    digest: str


@dataclass(slots=True)
class _Boundaries:
    """(version, number of tokens drawn when it ended) of one running job, oldest first."""

    ended: list[tuple[Version, int]] = field(default_factory=list)


class VersionLog:
    """The serving version, and for each running job the token counts at which it changed.

    `advance` has to be called while the engine is paused, after the new weights are in and before
    it draws again: then the counts are exact.
    """

    def __init__(self, current: Version) -> None:
        self._current = current
        self._running: dict[str, _Boundaries] = {}

    @property
    def current(self) -> Version:
        return self._current

    @property
    def num_running(self) -> int:
        return len(self._running)

    def begin(self, job_id: str) -> None:
        """Start to follow a job; it must be ended with `end`."""
        self._running[job_id] = _Boundaries()

    def advance(self, new: Version, num_tokens: Callable[[str], int | None]) -> None:
        """Close the current version for every running job and make `new` the current one.

        Args:
            new: the version that draws from here on.
            num_tokens: tokens drawn so far by a job; None when it has drawn its last.
        """
        for job_id, boundaries in self._running.items():
            count = num_tokens(job_id)
            boundaries.ended.append((self._current, -1 if count is None else count))
        self._current = new

    def end(self, job_id: str, total: int) -> list[Span]:
        """Stop following a job of `total` tokens and return its spans, which cover [0, total)."""
        boundaries = self._running.pop(job_id)
        spans = []
        start = 0
        for version, count in [*boundaries.ended, (self._current, -1)]:
            stop = total if count < 0 else min(count, total)
            if stop > start:
                spans.append(
                    Span(version=version.number, digest=version.digest, start=start, end=stop)
                )
                start = stop
        return spans

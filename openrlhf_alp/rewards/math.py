"""Rewards mathematical answers in worker processes with a hard time limit.

sympy may work for minutes on a few characters, in C code that no signal interrupts. So every
comparison runs in a process of a pebble pool: past its limit the process is killed and replaced,
and the answer has no reward. A reward that could not be computed is counted by name and raised,
never turned into 0.0. An answer that cannot be read is wrong; a label that cannot is a fault.
"""

import asyncio
import concurrent.futures
import logging
import multiprocessing
from collections import Counter
from typing import Any

import pebble

from openrlhf_alp.rewards.labels import LabelNotParsableError
from openrlhf_alp.rewards.protocol import RewardResult, RewardUnavailable
from openrlhf_alp.rewards.values import Tolerance
from openrlhf_alp.rewards.verify import Verdict, judge, limit_memory

logger = logging.getLogger(__name__)

_WORKER_MEMORY_BYTES = 2 << 30
"""Memory by which one worker may grow."""

LABEL_NOT_PARSABLE = "label_not_parsable"
"""Reason for a label that no answer can be compared with."""

_TEXT_IN_LOG_CHARS = 200


class MathReward:
    """Scores 1.0 when the final answer equals the label, otherwise 0.0; see docs/grading.md.

    The first call starts the workers from a fork server, which is safe in a process with threads
    (a Ray actor). They end with `close()`, or when this process ends in whatever way.

    Args:
        num_workers: number of comparisons that run at the same time.
        timeout_s: time limit of one comparison, from the moment a worker starts it.

    Attributes:
        counts: number of answers that were `scored`, and number without a reward by reason:
            `timeout`, `crashed` (the worker died), `out_of_memory`, `label_not_parsable`, `error`.
    """

    def __init__(self, *, num_workers: int = 1, timeout_s: float = 5.0) -> None:
        if num_workers < 1 or timeout_s <= 0:
            raise ValueError(
                f"num_workers={num_workers}, timeout_s={timeout_s}: needs at least one worker "
                "and a time above 0"
            )
        self._num_workers = num_workers
        self._timeout_s = timeout_s
        self._pool: pebble.ProcessPool | None = None
        self.counts: Counter[str] = Counter()

    async def score(
        self, *, prompt: str, response: str, label: Any, tolerance: Tolerance | None = None
    ) -> RewardResult:
        """Scores the final answer of `response`; the prompt is not needed.

        Args:
            label: a text, a number, or a list whose members are forms of one answer.
            tolerance: how far a number may be from a numeric label; None: it must be equal.

        Raises:
            RewardUnavailable: with one of the reasons listed under `counts`.
        """
        try:
            verdict = await self._judge_in_worker(response, label, tolerance)
        except Exception as error:
            # Every fault is named: an unnamed one would end the run or be taken for a wrong answer.
            reason, detail = self._explain(error)
            self.counts[reason] += 1
            logger.warning(
                "no reward (%s): %s; label %r, answer ends %r",
                *(reason, detail, label, response[-_TEXT_IN_LOG_CHARS:]),
            )
            raise RewardUnavailable(reason=reason, detail=detail) from error
        self.counts["scored"] += 1
        return RewardResult(
            value=float(verdict.correct),
            detail={
                "answered": float(verdict.answered),
                "unevaluated": float(verdict.unevaluated),
            },
            answer=verdict.answer,
            choice=verdict.choice,
        )

    def close(self) -> None:
        """Stops the workers, also busy ones. A later `score` starts new ones."""
        if self._pool is not None:
            # Not close(): it waits for a worker that may be busy for minutes.
            self._pool.stop()
            self._pool.join()
            self._pool = None

    async def _judge_in_worker(
        self, response: str, label: Any, tolerance: Tolerance | None
    ) -> Verdict:
        future = self._active_pool().schedule(
            judge, args=(response, label, tolerance), timeout=self._timeout_s
        )
        verdict: Verdict = await asyncio.wrap_future(future)
        return verdict

    def _active_pool(self) -> pebble.ProcessPool:
        if self._pool is None or not self._pool.active:
            context = multiprocessing.get_context("forkserver")
            # The fork server imports sympy once: replacing a killed worker takes milliseconds.
            context.set_forkserver_preload([judge.__module__])
            self._pool = pebble.ProcessPool(
                max_workers=self._num_workers,
                context=context,
                initializer=limit_memory,
                initargs=(_WORKER_MEMORY_BYTES,),
            )
        return self._pool

    def _explain(self, error: Exception) -> tuple[str, str]:
        """Returns the name of the reason and a sentence for people."""
        match error:
            case concurrent.futures.TimeoutError():
                return "timeout", f"comparing took longer than {self._timeout_s} s"
            case pebble.ProcessExpired():
                return "crashed", f"the worker ended with exit code {error.exitcode}"
            case MemoryError():
                return "out_of_memory", f"comparing asked for over {_WORKER_MEMORY_BYTES} bytes"
            case LabelNotParsableError():
                return LABEL_NOT_PARSABLE, str(error)
        return "error", f"{type(error).__name__}: {error}"

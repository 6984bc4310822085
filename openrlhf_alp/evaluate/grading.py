"""Grades answers with the reward of training, and shows where plain math-verify differs."""

from __future__ import annotations

import asyncio
import concurrent.futures
import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pebble

from openrlhf_alp.evaluate.records import Answer, Grade
from openrlhf_alp.evaluate.suites import LoadedSuite, Problem, SuiteError
from openrlhf_alp.rewards.math import LABEL_NOT_PARSABLE, MathReward
from openrlhf_alp.rewards.protocol import RewardUnavailable
from openrlhf_alp.rewards.verify import limit_memory

_TIMEOUT_S = 20.0
"""Time limit of one comparison; longer than in training, because nothing waits for it."""

_WORKER_MEMORY_BYTES = 2 << 30
_QUEUED = 512
"""Answers that wait for a worker at once."""


class Grader:
    """Our reward on answers of problem sets; close it after use.

    Args:
        num_workers: comparisons that run at the same time.
    """

    def __init__(self, *, num_workers: int = 1, timeout_s: float = _TIMEOUT_S) -> None:
        self._reward = MathReward(num_workers=num_workers, timeout_s=timeout_s)

    async def grade(self, problem: Problem, response: str) -> Grade:
        """The verdict on one response. A fault of the grader is a verdict of its own."""
        try:
            result = await self._reward.score(
                prompt="", response=response, label=problem.label, tolerance=problem.tolerance
            )
        except RewardUnavailable as error:
            broken = isinstance(error.__cause__, concurrent.futures.BrokenExecutor)
            if broken:
                raise SuiteError(f"the processes that grade do not start: {error}") from error
            return Grade(right=None, answer=None, reason=error.reason, detail=error.detail)
        return Grade(
            right=result.value == 1.0,
            answer=result.answer,
            choice=result.choice,
            unevaluated=result.detail["unevaluated"] == 1.0,
        )

    async def grade_all(
        self, pairs: Sequence[tuple[Problem, str]], on_done: Callable[[], None] = lambda: None
    ) -> list[Grade]:
        """Verdicts in order; `on_done` is called after each."""
        room = asyncio.Semaphore(_QUEUED)

        async def one(problem: Problem, response: str) -> Grade:
            async with room:
                grade = await self.grade(problem, response)
            on_done()
            return grade

        return await asyncio.gather(*(one(*pair) for pair in pairs))

    def close(self) -> None:
        """Stops the workers."""
        self._reward.close()


def boxed(label: str) -> str:
    """A response that gives the label itself as its answer."""
    return f"The answer is $\\boxed{{{label.strip('$')}}}$."


def check_references(loaded: LoadedSuite, grader: Grader) -> None:
    """Checks that each reference answer can be read and would be graded as right.

    Raises:
        SuiteError: names the rows; no answer to them could ever be right.
    """
    pairs = [(problem, boxed(problem.label)) for problem in loaded.problems]
    grades = asyncio.run(grader.grade_all(pairs))
    unreadable = [
        f"{problem.id}: {problem.label!r} ({grade.detail or 'not found equal to itself'})"
        for problem, grade in zip(loaded.problems, grades, strict=True)
        if grade.right is not True and not grade.unevaluated and grade.reason in _LABEL_FAULTS
    ]
    if unreadable:
        raise SuiteError(
            f"{loaded.origin}: {len(unreadable)} reference answers cannot be graded, so no answer "
            "to them could be right:\n  "
            + "\n  ".join(unreadable[:10])
            + "\nFix: write each as a number, as LaTeX or as a few words, or remove its row"
        )


_LABEL_FAULTS = (None, LABEL_NOT_PARSABLE)
"""A time limit is not among them: it may be met on a quieter machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Disagreement:
    """An answer that the two graders judge differently."""

    problem_id: str
    sample: int
    label: str
    answer: str | None
    ours: str
    math_verify: str

    def to_json(self) -> dict[str, Any]:
        """For the list of the run folder."""
        return {name: getattr(self, name) for name in self.__slots__}


def compare_graders(
    problems: Sequence[Problem], answers: Sequence[Answer], grades: Sequence[Grade], *, workers: int
) -> list[Disagreement]:
    """The answers on which plain math-verify and our reward differ.

    math-verify gets the label and the whole response and its defaults, as the authors call it.
    """
    by_id = {problem.id: problem for problem in problems}
    pairs = [(by_id[answer.problem_id].label, answer.response) for answer in answers]
    theirs = _plain_verdicts(pairs, workers)
    found = []
    for answer, grade, plain in zip(answers, grades, theirs, strict=True):
        ours = _word(grade.right)
        if ours != plain:
            found.append(
                Disagreement(
                    problem_id=answer.problem_id,
                    sample=answer.sample,
                    label=by_id[answer.problem_id].label,
                    answer=grade.answer,
                    ours=ours,
                    math_verify=plain,
                )
            )
    return found


def _word(right: bool | None) -> str:
    return "not graded" if right is None else "right" if right else "wrong"


def _plain_verdicts(pairs: Sequence[tuple[str, str]], workers: int) -> list[str]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([Grader.__module__])
    pool = pebble.ProcessPool(
        max_workers=workers,
        context=context,
        initializer=limit_memory,
        initargs=(_WORKER_MEMORY_BYTES,),
    )
    with pool:
        futures = [
            pool.schedule(plain_math_verify, args=pair, timeout=_TIMEOUT_S) for pair in pairs
        ]
        verdicts = []
        for future in futures:
            try:
                verdicts.append(_word(future.result()))
            except Exception as error:  # named: a fault of one comparison must not end the others
                verdicts.append(f"not graded ({type(error).__name__})")
        return verdicts


def plain_math_verify(label: str, response: str) -> bool:
    """What math-verify alone says, with its defaults; runs in a worker."""
    # Imported here because it takes a second, and only this comparison needs it.
    from math_verify import parse, verify

    gold = label if "$" in label else f"${label}$"
    return bool(verify(parse(gold), parse(response)))

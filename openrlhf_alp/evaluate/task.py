"""A problem set as a task of Inspect: its solver plays our episodes, its scorer is our reward."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from inspect_ai import Epochs, Task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageUser,
    ModelOutput,
)
from inspect_ai.scorer import Score, Scorer, Target, mean, scorer, stderr
from inspect_ai.solver import Generate, Solver, TaskState, solver

from openrlhf_alp.clients.errors import DeadlineExceeded, InvalidReply
from openrlhf_alp.episodes.records import BadCompletionError, ToolLostError, TurnKind
from openrlhf_alp.evaluate.grading import Grader
from openrlhf_alp.evaluate.model import usage
from openrlhf_alp.evaluate.numbers import powers_of_two
from openrlhf_alp.evaluate.player import Player, Prompts
from openrlhf_alp.evaluate.records import Answer, AnswerKey, Grade
from openrlhf_alp.evaluate.store import AnswerStore
from openrlhf_alp.evaluate.suites import LoadedSuite, Problem

LOST = (DeadlineExceeded, InvalidReply, BadCompletionError, ToolLostError)
"""What costs one answer and not the run: the next start tries it again."""

_CHECK_EVERY_S = 0.5


@dataclass(slots=True, kw_only=True)
class Session:
    """One suite of one run, as solver and scorer see it."""

    loaded: LoadedSuite
    store: AnswerStore
    grader: Grader
    player: Player | None
    """None: only stored answers are graded."""

    prompts: Prompts | None
    check_services: Callable[[], None]
    """Raises when a service that this run started has ended."""

    begin: Callable[[], Callable[[], None]]
    """Called when the suite begins; returns what to call after each answer."""

    counts_stored: bool = False
    """Whether a stored answer counts as progress: when only grading is left to do."""

    failure: BaseException | None = None
    """What ended the run. Inspect's log keeps only its text."""

    on_answer: Callable[[], None] = lambda: None
    grades: dict[AnswerKey, Grade] = field(default_factory=dict)
    lost: dict[AnswerKey, str] = field(default_factory=dict)
    """Why an answer is missing."""

    def start(self) -> None:
        """Begins the suite."""
        self.on_answer = self.begin()

    async def answer(self, problem: Problem, sample: int) -> Answer | None:
        """The stored answer, or a new one that is stored; None when it is lost.

        Raises:
            ServiceError, StoreError: the run cannot continue.
        """
        stored = self.store.get((problem.id, sample))
        if stored is not None or self.player is None or self.prompts is None:
            if self.counts_stored:
                self.on_answer()
            return stored
        playing = self.player.play(self.loaded.name, problem, sample, self.prompts)
        try:
            answer = await self._watched(playing)
            self.store.add(answer)
        except LOST as error:
            self.lost[problem.id, sample] = f"{type(error).__name__}: {error}"
            return None
        except Exception as error:
            self.failure = self.failure or error
            raise
        self.on_answer()
        return answer

    async def _watched(self, playing: Coroutine[Any, Any, Answer]) -> Answer:
        # A client cannot tell a service that has ended from a slow one; it would retry for minutes.
        running = asyncio.ensure_future(playing)
        try:
            while not running.done():
                await asyncio.wait([running], timeout=_CHECK_EVERY_S)
                self.check_services()
        finally:
            running.cancel()
        return running.result()


def build_task(session: Session, *, n: int, metadata: dict[str, Any]) -> Task:
    """The task of a suite: `n` epochs, reduced to avg@n and pass@k of Inspect's own."""
    loaded = session.loaded
    by_id = {problem.id: problem for problem in loaded.problems}
    reducers = ["mean", *(f"pass_at_{k}" for k in powers_of_two(n))]
    return Task(
        name=loaded.name,
        dataset=MemoryDataset(list(map(_sample, loaded.problems)), name=loaded.name),
        solver=_episodes(session, by_id)(),
        scorer=_equals_label(session, by_id)(),
        epochs=Epochs(n, reducers),
        metadata=metadata,
        # What costs one answer only is caught in the solver; anything else would repeat itself.
        fail_on_error=True,
    )


def _sample(problem: Problem) -> Sample:
    known = {"subject": problem.subject, "level": problem.level}
    return Sample(
        id=problem.id,
        input=problem.text,
        target=problem.label,
        metadata={name: value for name, value in known.items() if value is not None},
    )


def _episodes(session: Session, by_id: dict[str, Problem]) -> Callable[[], Solver]:
    @solver(name="openrlhf_alp_episodes")
    def episodes() -> Solver:
        async def solve(state: TaskState, generate: Generate) -> TaskState:
            problem = by_id[str(state.sample_id)]
            answer = await session.answer(problem, state.epoch - 1)
            if answer is not None:
                _show(state, answer)
            return state

        return solve

    return episodes


def _show(state: TaskState, answer: Answer) -> None:
    """Writes an answer into Inspect's record of the sample."""
    state.messages += [_message(turn.kind, turn.text) for turn in answer.turns]
    said = [turn.text for turn in answer.turns if turn.kind == TurnKind.ACTION]
    num_prompt = answer.action_ranges[0][0]
    state.output = ModelOutput(
        model=str(state.model),
        choices=[
            ChatCompletionChoice(
                message=ChatMessageAssistant(content=said[-1] if said else ""),
                stop_reason="max_tokens" if answer.truncated else "stop",
            )
        ],
        usage=usage(num_prompt, answer.num_tokens),
    )
    state.metadata["answer"] = answer.to_json()


def _message(kind: str, text: str) -> ChatMessage:
    # A program's output is shown as the user's turn: it is what the policy reads next.
    return (
        ChatMessageAssistant(content=text)
        if kind == TurnKind.ACTION
        else ChatMessageUser(content=text)
    )


def _equals_label(session: Session, by_id: dict[str, Problem]) -> Callable[[], Scorer]:
    @scorer(name="openrlhf_alp_reward", metrics=[mean(), stderr()])
    def equals_label() -> Scorer:
        async def score(state: TaskState, target: Target) -> Score:
            key = (str(state.sample_id), state.epoch - 1)
            answer = session.store.get(key)
            if answer is None:
                lost = session.lost.get(key, "it was not generated")
                return Score.unscored(reason="no_response", explanation=lost)
            grade = await session.grader.grade(by_id[key[0]], answer.response)
            session.grades[key] = grade
            return to_score(grade)

        return score

    return equals_label


def to_score(grade: Grade) -> Score:
    """Inspect's record of a grade. An answer without a grade is not right, and says why.

    It is not left out of the mean: answers that cannot be graded are the long and strange ones, so
    a mean over the others would flatter the policy.
    """
    if grade.right is None:
        return Score(
            value=0.0, reason="scoring_failed", explanation=f"{grade.reason}: {grade.detail}"
        )
    reason = None if grade.answer is not None else "no_response"
    why = "equal only once its sums are worked out" if grade.unevaluated else None
    return Score(value=float(grade.right), answer=grade.answer, reason=reason, explanation=why)

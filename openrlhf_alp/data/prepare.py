"""Turns problem sets into prompts that OpenRLHF reads and records why a row was rejected.

    rows -> problems -> one answer each -> rewardable -> no problem twice -> neither too hard nor
    too easy -> prompts that fit

Each stage filters the problems of the stage before it and adds to the rejected rows; none changes a
problem. Labels are checked before duplicates are searched, so that a row with a broken label does
not conflict with a good one.
"""

import itertools
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from openrlhf_alp.data.formats import IMAGE_TAG, Problem, RowFormat, to_problem
from openrlhf_alp.data.pass_rates import PassRates
from openrlhf_alp.data.sources import Row
from openrlhf_alp.data.templates import INPUT_KEY, LABEL_KEY, Message, PromptTemplate
from openrlhf_alp.data.verdicts import Comparison, Verdict, check_labels, compare

_TYPOGRAPHY = re.compile(r"\s+|\$|\\[()\[\],;!: ]|\\(?:left|right)(?![A-Za-z])|~")
"""Spaces, dollar signs and bracket sizes, in which two copies of a problem often differ."""


class Reason(StrEnum):
    """Why a row was rejected."""

    BROKEN_ROW = "broken_row"
    """Not a JSON object."""
    NO_PROBLEM = "no_problem"
    NO_LABEL = "no_label"
    NEEDS_IMAGE = "needs_image"
    """The problem contains OpenRLHF's image tag, which OpenRLHF would replace by a picture."""
    DUPLICATE = "duplicate"
    """An earlier row has the same problem and an equal answer."""
    CONFLICTING_LABELS = "conflicting_labels"
    """Another row has the same problem and another answer; all of them are rejected."""
    SEVERAL_LABELS = "several_labels"
    """A list of different answers: it does not say whether one of them or all of them are asked."""
    LABEL_NOT_PARSABLE = "label_not_parsable"
    """The reward cannot read it: every group of the problem would be dropped in training."""
    LABEL_NOT_REWARDED = "label_not_rewarded"
    """The reward does not find the label equal to itself: no answer can earn the reward."""
    LABEL_NOT_CHECKED = "label_not_checked"
    """The comparison exceeded its time or memory limit, as it would in training."""
    NO_PASS_RATE = "no_pass_rate"
    """The evaluation that the pass rates come from did not ask it."""
    PASS_RATE = "pass_rate"
    """The policy solves it too rarely or too often."""
    PROMPT_TOO_LONG = "prompt_too_long"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A rejected row, unchanged, with the reason."""

    row: Row
    reason: Reason
    detail: str

    def to_json(self) -> dict[str, Any]:
        """A line of the rejected file."""
        return {
            "reason": self.reason,
            "detail": self.detail,
            "source": self.row.source,
            "row_number": self.row.number,
            "row": self.row.content,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A row of the prepared file."""

    input: str | list[Message]
    problem: Problem
    num_tokens: int | None
    """Length of the rendered prompt; None when no tokenizer was given."""

    def to_json(self) -> dict[str, Any]:
        """A line of the prepared file. OpenRLHF groups its evaluation by `datasource`."""
        return {
            INPUT_KEY: self.input,
            LABEL_KEY: self.problem.label,
            "datasource": self.problem.datasource,
            "id": self.problem.id,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """The result: each row is in exactly one of the two, in input order."""

    prompts: tuple[Prompt, ...]
    rejected: tuple[Rejected, ...]


CountTokens = Callable[[Sequence[str | list[Message]]], list[int]]
"""Returns token counts of rendered prompts, in order."""


OnProgress = Callable[[int, int], None]
"""Called with the number of labels checked so far and the total."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Settings of one preparation."""

    template: PromptTemplate
    num_workers: int
    count_tokens: CountTokens | None = None
    max_prompt_tokens: int | None = None
    pass_rates: PassRates | None = None

    def __post_init__(self) -> None:
        if self.max_prompt_tokens is not None and self.count_tokens is None:
            raise ValueError("a limit on prompt tokens needs a tokenizer to count them")


def prepare(
    rows: Iterable[tuple[Row, RowFormat]],
    options: Options,
    on_progress: OnProgress = lambda done, total: None,
) -> Prepared:
    """Splits rows into prompts to train on and rejected rows."""
    rejected: list[Rejected] = []
    found = list(rows)
    problems = _read(found, rejected)
    unambiguous = _with_one_answer(problems, options.num_workers, rejected)
    rewardable = _rewardable(unambiguous, options.num_workers, on_progress, rejected)
    distinct = _one_per_problem(rewardable, options.num_workers, rejected)
    learnable = _learnable(distinct, options.pass_rates, rejected)
    prompts = _fitting(learnable, options, rejected)
    # Stages reject in their own order; readers look for rows in the order of the file.
    order = {row_key(row): i for i, (row, _) in enumerate(found)}
    rejected.sort(key=lambda one: order[row_key(one.row)])
    return Prepared(prompts=tuple(prompts), rejected=tuple(rejected))


RowKey = tuple[str, int]

Refusal = tuple[Reason, str]
"""The reason and a sentence with the values."""


def row_key(row: Row) -> RowKey:
    """Identifies a row among all sources."""
    return row.source, row.number


def problem_key(text: str) -> str:
    """Returns a key that is equal for problems that differ only in typography."""
    return _TYPOGRAPHY.sub("", unicodedata.normalize("NFKC", text))


def _read(rows: Iterable[tuple[Row, RowFormat]], rejected: list[Rejected]) -> list[Problem]:
    problems = []
    for row, row_format in rows:
        if not isinstance(row.content, dict):
            detail = "not a JSON object"
            rejected.append(Rejected(row=row, reason=Reason.BROKEN_ROW, detail=detail))
            continue
        problem = to_problem(row, row_format)
        problems += _accepted([(problem, _what_is_missing(problem, row_format))], rejected)
    return problems


def _what_is_missing(problem: Problem, row_format: RowFormat) -> Refusal | None:
    if not problem.text:
        return Reason.NO_PROBLEM, f"nothing in {' or '.join(row_format.problem)}"
    if problem.label_fault:
        return Reason.LABEL_NOT_PARSABLE, problem.label_fault
    if not problem.labels:
        return Reason.NO_LABEL, f"nothing in {' or '.join(row_format.label)}"
    if IMAGE_TAG in problem.text:
        return Reason.NEEDS_IMAGE, f"the problem has {IMAGE_TAG}; rollouts are text only"
    return None


def _accepted(
    refusals: Iterable[tuple[Problem, Refusal | None]], rejected: list[Rejected]
) -> list[Problem]:
    """Returns the problems without a refusal and records the others."""
    accepted = []
    for problem, refusal in refusals:
        if refusal is None:
            accepted.append(problem)
        else:
            rejected.append(Rejected(row=problem.row, reason=refusal[0], detail=refusal[1]))
    return accepted


def _with_one_answer(
    problems: Sequence[Problem], num_workers: int, rejected: list[Rejected]
) -> list[Problem]:
    """Rejects the problems whose list of answers contains different ones."""
    members = (
        (problem, Comparison(answer=member, label=problem.label))
        for problem in problems
        for member in problem.labels[1:]
    )
    ambiguous = _unequal(members, num_workers)

    def refusal(problem: Problem) -> Refusal | None:
        if row_key(problem.row) not in ambiguous:
            return None
        labels = ", ".join(map(repr, problem.labels))
        return Reason.SEVERAL_LABELS, f"not equal to each other: {labels}"

    return _accepted(((problem, refusal(problem)) for problem in problems), rejected)


def _rewardable(
    problems: Sequence[Problem],
    num_workers: int,
    on_progress: OnProgress,
    rejected: list[Rejected],
) -> list[Problem]:
    done = itertools.count(1)
    verdicts = check_labels(
        [problem.label for problem in problems],
        num_workers=num_workers,
        on_done=lambda: on_progress(next(done), len(problems)),
    )
    refusals = map(_why_not_rewardable, problems, verdicts)
    return _accepted(zip(problems, refusals, strict=True), rejected)


def _why_not_rewardable(problem: Problem, verdict: Verdict) -> Refusal | None:
    if verdict.equal:
        return None
    if verdict.unavailable is None:
        detail = f"the reward does not find {problem.label!r} equal to itself"
        return Reason.LABEL_NOT_REWARDED, detail
    is_unreadable = verdict.unavailable == Reason.LABEL_NOT_PARSABLE
    return (
        Reason.LABEL_NOT_PARSABLE if is_unreadable else Reason.LABEL_NOT_CHECKED,
        verdict.detail,
    )


def _one_per_problem(
    problems: Sequence[Problem], num_workers: int, rejected: list[Rejected]
) -> list[Problem]:
    """Keeps the first of each group of equal problems, unless their answers differ."""
    groups: dict[str, list[Problem]] = {}
    for problem in problems:
        groups.setdefault(problem_key(problem.text), []).append(problem)
    others_of_first = (
        (other, Comparison(answer=other.label, label=first.label))
        for first, *others in groups.values()
        for other in others
    )
    conflicts = _unequal(others_of_first, num_workers)
    refusals: list[tuple[Problem, Refusal | None]] = []
    for group in groups.values():
        first, *others = group
        # Nobody knows which of two answers is right, so that all rows of the problem go.
        if any(row_key(other.row) in conflicts for other in others):
            labels = "; ".join(f"{p.label!r} ({_where(p)})" for p in group)
            conflict = Reason.CONFLICTING_LABELS, f"the same problem has {labels}"
            refusals += [(problem, conflict) for problem in group]
        else:
            duplicate = Reason.DUPLICATE, f"the same problem as {_where(first)}"
            refusals += [(first, None), *((other, duplicate) for other in others)]
    return _accepted(refusals, rejected)


def _learnable(
    problems: Sequence[Problem], rates: PassRates | None, rejected: list[Rejected]
) -> Sequence[Problem]:
    if rates is None:
        return problems

    def refusal(problem: Problem) -> Refusal | None:
        share = rates.of.get(problem_key(problem.text))
        if share is None:
            detail = "the evaluation did not ask it, or none of its answers could be graded"
            return Reason.NO_PASS_RATE, detail
        fault = rates.fault_of(share)
        return (Reason.PASS_RATE, fault) if fault else None

    return _accepted(((problem, refusal(problem)) for problem in problems), rejected)


def _unequal(pairs: Iterable[tuple[Problem, Comparison]], num_workers: int) -> set[RowKey]:
    """Returns the rows of the problems whose comparison fails."""
    # Equal texts need no comparison; most duplicates have them.
    doubtful = [(p, comparison) for p, comparison in pairs if comparison.answer != comparison.label]
    verdicts = compare([comparison for _, comparison in doubtful], num_workers=num_workers)
    return {
        row_key(problem.row)
        for (problem, _), verdict in zip(doubtful, verdicts, strict=True)
        if not verdict.equal
    }


def _fitting(
    problems: Sequence[Problem], options: Options, rejected: list[Rejected]
) -> list[Prompt]:
    inputs = [options.template.render(problem.text) for problem in problems]
    counts: Sequence[int | None] = [None] * len(inputs)
    if options.count_tokens is not None:
        counts = options.count_tokens(inputs)
    limit = options.max_prompt_tokens
    prompts = []
    for problem, rendered, num_tokens in zip(problems, inputs, counts, strict=True):
        refusal = None
        if limit is not None and num_tokens is not None and num_tokens > limit:
            refusal = Reason.PROMPT_TOO_LONG, f"{num_tokens} tokens, {limit} are allowed"
        if _accepted([(problem, refusal)], rejected):
            prompts.append(Prompt(input=rendered, problem=problem, num_tokens=num_tokens))
    return prompts


def _where(problem: Problem) -> str:
    return f"row {problem.row.number} of {problem.row.source}"

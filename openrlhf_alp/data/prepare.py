"""Problem sets -> prompts that OpenRLHF reads; every row that is left out is kept with its reason.

    rows -> problems -> one answer each -> rewardable -> no problem twice -> prompts that fit

Each stage takes what the one before kept and adds to the rejected rows; none changes a problem.
Labels are checked before equal problems are: a row with a broken label then makes no conflict with
a good one.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from openrlhf_alp.data.formats import Problem, RowFormat, to_problem
from openrlhf_alp.data.sources import Row
from openrlhf_alp.data.templates import Message, PromptTemplate
from openrlhf_alp.data.verdicts import Comparison, compare

INPUT_KEY = "input"
LABEL_KEY = "label"

_IMAGE_TAG = "<image>"

_TYPOGRAPHY = re.compile(r"\s+|\$|\\[()\[\],;!: ]|\\(?:left|right)(?![A-Za-z])|~")
"""Spaces, dollar signs and the size of brackets: two sets differ in these, not in the problem."""


class Reason(StrEnum):
    """Why a row was left out."""

    BROKEN_ROW = "broken_row"
    """Not a JSON object."""
    NO_PROBLEM = "no_problem"
    NO_LABEL = "no_label"
    NEEDS_IMAGE = "needs_image"
    """The problem has OpenRLHF's image tag, which would be taken for a picture."""
    DUPLICATE = "duplicate"
    """An earlier row asks the same problem with an equal answer."""
    CONFLICTING_LABELS = "conflicting_labels"
    """Another row asks the same problem with another answer; all of them are left out."""
    SEVERAL_LABELS = "several_labels"
    """A list of answers that are not equal: one cannot tell whether each is right, or all are."""
    LABEL_NOT_PARSABLE = "label_not_parsable"
    """math-verify reads no mathematics in it: every group of it would be dropped in training."""
    LABEL_NOT_REWARDED = "label_not_rewarded"
    """math-verify does not find the label equal to itself: no answer can earn the reward."""
    LABEL_NOT_CHECKED = "label_not_checked"
    """The comparison ran into its limits of time or memory, as it then would in training."""
    PROMPT_TOO_LONG = "prompt_too_long"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A row that is left out, as it was found."""

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
    """Of the prompt as the policy reads it; None when no tokenizer was given."""

    def to_json(self) -> dict[str, Any]:
        """A line of the prepared file. `datasource` is what OpenRLHF groups its evaluation by."""
        return {
            INPUT_KEY: self.input,
            LABEL_KEY: self.problem.label,
            "datasource": self.problem.datasource,
            "id": self.problem.id,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What became of the rows: each is in exactly one of the two, in the order of reading."""

    prompts: tuple[Prompt, ...]
    rejected: tuple[Rejected, ...]


class CountTokens(Protocol):
    """Token counts of rendered prompts, in order."""

    def __call__(self, inputs: Sequence[str | list[Message]]) -> list[int]: ...


OnProgress = Callable[[int, int], None]
"""Labels checked so far, and of how many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to prepare."""

    template: PromptTemplate
    num_workers: int
    count_tokens: CountTokens | None = None
    max_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.max_prompt_tokens is not None and self.count_tokens is None:
            raise ValueError("a limit on prompt tokens needs a tokenizer to count them")


def prepare(
    rows: Iterable[tuple[Row, RowFormat]],
    options: Options,
    on_progress: OnProgress = lambda done, total: None,
) -> Prepared:
    """Sorts rows into prompts to train on and rows to leave out."""
    rejected: list[Rejected] = []
    found = list(rows)
    problems = _read(found, rejected)
    unambiguous = _with_one_answer(problems, options.num_workers, rejected)
    rewardable = _rewardable(unambiguous, options.num_workers, on_progress, rejected)
    distinct = _one_per_problem(rewardable, options.num_workers, rejected)
    prompts = _fitting(distinct, options, rejected)
    order = {row_key(row): i for i, (row, _) in enumerate(found)}
    rejected.sort(key=lambda one: order[row_key(one.row)])
    return Prepared(prompts=tuple(prompts), rejected=tuple(rejected))


RowKey = tuple[str, int]


def row_key(row: Row) -> RowKey:
    """What tells a row from all others."""
    return row.source, row.number


def problem_key(text: str) -> str:
    """Equal for problems that differ only in typography."""
    return _TYPOGRAPHY.sub("", unicodedata.normalize("NFKC", text))


def _read(rows: Iterable[tuple[Row, RowFormat]], rejected: list[Rejected]) -> list[Problem]:
    problems = []
    for row, row_format in rows:
        if not isinstance(row.content, dict):
            detail = "not a JSON object"
            rejected.append(Rejected(row=row, reason=Reason.BROKEN_ROW, detail=detail))
            continue
        problem = to_problem(row, row_format)
        if found := _what_is_missing(problem, row_format):
            rejected.append(Rejected(row=row, reason=found[0], detail=found[1]))
        else:
            problems.append(problem)
    return problems


def _what_is_missing(problem: Problem, row_format: RowFormat) -> tuple[Reason, str] | None:
    if not problem.text:
        return Reason.NO_PROBLEM, f"nothing in {' or '.join(row_format.problem)}"
    if not problem.labels:
        return Reason.NO_LABEL, f"nothing in {' or '.join(row_format.label)}"
    if _IMAGE_TAG in problem.text:
        return Reason.NEEDS_IMAGE, f"the problem has {_IMAGE_TAG}; rollouts are text only"
    return None


def _with_one_answer(
    problems: Sequence[Problem], num_workers: int, rejected: list[Rejected]
) -> list[Problem]:
    """Without the problems whose list of answers holds different ones."""
    members = (
        (problem, Comparison(answer=member, label=problem.label))
        for problem in problems
        for member in problem.labels[1:]
    )
    ambiguous = _unequal(members, num_workers)
    kept = []
    for problem in problems:
        if row_key(problem.row) in ambiguous:
            detail = f"not equal to each other: {', '.join(map(repr, problem.labels))}"
            rejected += _reject([problem], Reason.SEVERAL_LABELS, detail)
        else:
            kept.append(problem)
    return kept


def _rewardable(
    problems: Sequence[Problem],
    num_workers: int,
    on_progress: OnProgress,
    rejected: list[Rejected],
) -> list[Problem]:
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        on_progress(done, len(problems))

    verdicts = compare(
        [Comparison(answer=problem.label, label=problem.label) for problem in problems],
        num_workers=num_workers,
        on_done=count,
    )
    kept = []
    for problem, verdict in zip(problems, verdicts, strict=True):
        if verdict.equal:
            kept.append(problem)
        elif verdict.unavailable is None:
            detail = f"math-verify does not find {problem.label!r} equal to itself"
            rejected += _reject([problem], Reason.LABEL_NOT_REWARDED, detail)
        else:
            is_unreadable = verdict.unavailable == Reason.LABEL_NOT_PARSABLE
            reason = Reason.LABEL_NOT_PARSABLE if is_unreadable else Reason.LABEL_NOT_CHECKED
            rejected += _reject([problem], reason, verdict.detail)
    return kept


def _one_per_problem(
    problems: Sequence[Problem], num_workers: int, rejected: list[Rejected]
) -> list[Problem]:
    """The first of each group of equal problems, unless their answers differ."""
    groups: dict[str, list[Problem]] = {}
    for problem in problems:
        groups.setdefault(problem_key(problem.text), []).append(problem)
    others_of_first = (
        (other, Comparison(answer=other.label, label=first.label))
        for first, *others in groups.values()
        for other in others
    )
    conflicts = _unequal(others_of_first, num_workers)
    for key, group in groups.items():
        first, *others = group
        if conflicts & {row_key(other.row) for other in others}:
            labels = "; ".join(f"{p.label!r} ({_where(p)})" for p in group)
            rejected += _reject(group, Reason.CONFLICTING_LABELS, f"the same problem has {labels}")
            groups[key] = []
        else:
            rejected += _reject(others, Reason.DUPLICATE, f"the same problem as {_where(first)}")
    return [group[0] for group in groups.values() if group]


def _unequal(pairs: Iterable[tuple[Problem, Comparison]], num_workers: int) -> set[RowKey]:
    """The rows of the problems whose comparison fails; equal texts are not compared."""
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
    prompts = []
    for problem, rendered, num_tokens in zip(problems, inputs, counts, strict=True):
        limit = options.max_prompt_tokens
        if limit is not None and num_tokens is not None and num_tokens > limit:
            detail = f"{num_tokens} tokens, {limit} are allowed"
            rejected += _reject([problem], Reason.PROMPT_TOO_LONG, detail)
        else:
            prompts.append(Prompt(input=rendered, problem=problem, num_tokens=num_tokens))
    return prompts


def _reject(problems: Iterable[Problem], reason: Reason, detail: str) -> list[Rejected]:
    return [Rejected(row=problem.row, reason=reason, detail=detail) for problem in problems]


def _where(problem: Problem) -> str:
    return f"row {problem.row.number} of {problem.row.source}"

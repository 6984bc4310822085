"""From answers and grades to the numbers of a run, as JSON and as the table of the paper."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from openrlhf_alp.evaluate.numbers import (
    Estimate,
    average,
    majority,
    mean_estimate,
    pass_at,
    powers_of_two,
)
from openrlhf_alp.evaluate.records import Answer, AnswerKey, Grade
from openrlhf_alp.evaluate.store import StoreError
from openrlhf_alp.evaluate.suites import LoadedSuite, Problem

Results = dict[str, Any]


def summarise(
    loaded: LoadedSuite,
    answers: Sequence[Answer],
    grades: Mapping[AnswerKey, Grade],
    *,
    n: int,
) -> Results:
    """The numbers of one suite. Every problem has exactly `n` answers.

    An answer that could not be graded counts as not right and is listed; `avg_if_right` is the
    average if all of these were right.

    Raises:
        StoreError: the answers are not of one set of weights.
    """
    weights = dict.fromkeys(version for answer in answers for version in answer.versions)
    if len({digest for _, digest in weights}) > 1:
        raise StoreError(
            f"the answers of {loaded.name} come from {len(weights)} weights: "
            f"{', '.join(digest[:12] for _, digest in weights)}. The service was updated while it "
            "was evaluated. Fix: evaluate again into another --output, and pause training"
        )
    of_problem = {
        problem.id: [grades[problem.id, i] for i in range(n)] for problem in loaded.problems
    }
    right = {name: _num_right(found) for name, found in of_problem.items()}
    ungraded = {
        name: sum(grade.right is None for grade in found) for name, found in of_problem.items()
    }
    counts = list(right.values())
    return {
        "suite": loaded.name,
        "title": loaded.title,
        "origin": loaded.origin,
        "problems_digest": loaded.digest,
        "num_problems": len(loaded.problems),
        "n": n,
        "avg": asdict(average(counts, n)),
        "avg_if_right": fmean((right[name] + ungraded[name]) / n for name in right),
        "pass_at": {str(k): asdict(pass_at(counts, n, k)) for k in powers_of_two(n)},
        "majority": asdict(mean_estimate([majority(_votes(f)) for f in of_problem.values()])),
        "shares": _shares(answers, list(grades.values())),
        "mean_tokens": fmean(answer.num_tokens for answer in answers),
        "mean_tool_calls": fmean(len(answer.tool_calls) for answer in answers),
        "tool_statuses": dict(Counter(s for answer in answers for s in answer.tool_calls)),
        "by_subject": _by(loaded.problems, lambda problem: problem.subject, right, n),
        "by_level": _by(loaded.problems, lambda problem: problem.level, right, n),
        "ungraded": list_ungraded(grades),
        "weights": [{"version": version, "digest": digest} for version, digest in weights],
    }


def list_ungraded(grades: Mapping[AnswerKey, Grade]) -> list[dict[str, Any]]:
    """The answers without a verdict, with the reason."""
    return [
        {"problem_id": key[0], "sample": key[1], "reason": grade.reason, "detail": grade.detail}
        for key, grade in grades.items()
        if grade.right is None
    ]


def average_over_suites(suites: Sequence[Results]) -> Results:
    """The last column of the paper's tables: the plain mean over benchmarks, with its error.

    The sets are independent, so variances add up. So do the squares of the distances from each mean
    to the end of its interval, which makes an interval that is not symmetric either (Zou and Donner
    2008, doi 10.1002/sim.3095).
    """
    averages = [suite["avg"] for suite in suites]
    value = fmean(one["value"] for one in averages)
    below, above = (
        math.hypot(*(one[edge] - one["value"] for one in averages)) / len(averages)
        for edge in ("low", "high")
    )
    return {
        "value": value,
        "stderr": math.hypot(*(one["stderr"] for one in averages)) / len(averages),
        "low": value - below,
        "high": value + above,
    }


def markdown(run: Results) -> str:
    """The table in the paper's form, and pass@k and shares below it."""
    suites = run["suites"]
    n = run["n"]
    head = [f"avg@{n}, %", *(suite["title"] for suite in suites)]
    row = [run["model"], *(_percent(suite["avg"]) for suite in suites)]
    if len(suites) > 1:
        head.append("Average")
        row.append(_percent(run["average"]))
    curve = [
        [suite["title"], *(_percent(suite["pass_at"][str(k)]) for k in powers_of_two(n))]
        for suite in suites
    ]
    shares = [
        [
            suite["title"],
            str(suite["num_problems"]),
            _percent(suite["majority"]),
            *(f"{100 * suite['shares'][name]:.1f}" for name in _SHARES),
            f"{suite['mean_tokens']:.0f}",
            f"{suite['mean_tool_calls']:.2f}",
        ]
        for suite in suites
    ]
    columns = ["", "problems", f"majority@{n}, %", *(f"{name}, %" for name in _SHARES)]
    parts = [
        markdown_table(head, [row]),
        markdown_table(["pass@k, %", *(f"k = {k}" for k in powers_of_two(n))], curve),
        markdown_table([*columns, "tokens", "tool calls"], shares),
        *_parts_of_suites(suites, n),
        "In brackets: 95 % intervals, clustered by problem.",
        f"Weights {run['weights_digest'][:16]}, version {run['weights_version']}; contract "
        f"{run['contract_hash'][:16]}; temperature {run['plan']['temperature']:g}, top_p "
        f"{run['plan']['top_p']:g}, {run['plan']['max_new_tokens']} new tokens, template "
        f"{run['plan']['template']}, seed {run['plan']['seed']}.",
    ]
    for suite in suites:
        if suite["ungraded"]:
            reasons = Counter(one["reason"] for one in suite["ungraded"])
            listed = ", ".join(f"{name} {count}" for name, count in reasons.items())
            parts.append(
                f"{suite['title']}: {len(suite['ungraded'])} answers could not be graded "
                f"({listed}). They count as not right; if all were right, avg@{n} would be "
                f"{100 * suite['avg_if_right']:.1f} %. They are listed in ungraded.jsonl."
            )
    return "\n\n".join(parts) + "\n"


def _parts_of_suites(suites: Sequence[Results], n: int) -> list[str]:
    """A table for each set with subjects, and for each with levels."""
    tables = []
    for suite in suites:
        for what in ("subject", "level"):
            groups = suite[f"by_{what}"]
            rows = [
                [name, str(group["num_problems"]), _percent(group["avg"])]
                for name, group in groups.items()
            ]
            if rows:
                tables.append(
                    markdown_table([f"{suite['title']}: {what}", "problems", f"avg@{n}, %"], rows)
                )
    return tables


_SHARES = ("truncated", "invalid", "unevaluated", "void", "ungraded")


def _shares(answers: Sequence[Answer], grades: Sequence[Grade]) -> dict[str, float]:
    num = len(answers)
    counts = {
        "truncated": sum(answer.truncated for answer in answers),
        # Graded, and without anything that could be a final answer.
        "invalid": sum(grade.right is not None and grade.answer is None for grade in grades),
        "unevaluated": sum(grade.unevaluated for grade in grades),
        "void": sum(answer.void for answer in answers),
        "ungraded": sum(grade.right is None for grade in grades),
    }
    return {name: count / num for name, count in counts.items()}


def _num_right(grades: Sequence[Grade]) -> int:
    return sum(grade.right is True for grade in grades)


def _votes(grades: Sequence[Grade]) -> list[tuple[str | None, bool]]:
    return [(grade.choice, grade.right is True) for grade in grades]


def _by(
    problems: Sequence[Problem],
    name_of: Callable[[Problem], str | None],
    right: Mapping[str, int],
    n: int,
) -> dict[str, Results]:
    groups: dict[str, list[int]] = {}
    for problem in problems:
        if (name := name_of(problem)) is not None:
            groups.setdefault(name, []).append(right[problem.id])
    return {
        name: {"num_problems": len(counts), "avg": asdict(average(counts, n))}
        for name, counts in sorted(groups.items())
    }


def _percent(estimate: Mapping[str, float] | Estimate) -> str:
    fields = asdict(estimate) if isinstance(estimate, Estimate) else estimate
    value, low, high = (100 * fields[name] for name in ("value", "low", "high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown; no cell can break it."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    # Names of files, subjects and models come from the user, and may hold the table's own signs.
    return " ".join(text.split()).replace("|", "\\|")

"""Measures the grader on published problem sets: right answers, coincidences and speed.

    python benchmarks/grading.py DATA_FOLDER

The problem sets are those of `openrlhf-alp evaluate`; DATA_FOLDER holds their files as their
authors publish them (`--list` names them), and sets whose file is missing are left out. A reference
solution should earn the reward of its own label, and the label of another problem of the set should
not, unless both are equal to a reader: the pairs found are printed.
"""

import argparse
import asyncio
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from openrlhf_alp.evaluate.grading import boxed
from openrlhf_alp.evaluate.suites import LoadedSuite, Problem, load_suite, registry
from openrlhf_alp.rewards.answers import last_box
from openrlhf_alp.rewards.math import MathReward
from openrlhf_alp.rewards.values import Tolerance
from openrlhf_alp.rewards.verify import LabelNotParsableError, judge

_NUM_PAIRS = 10_000
_NUM_TIMED = 4_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A text and the label it is graded against."""

    name: str
    response: str
    label: str
    tolerance: Tolerance | None


def read_suites(folder: Path) -> list[LoadedSuite]:
    """The sets whose files are in `folder`."""
    return [
        load_suite(suite, data_dir=folder)
        for suite in registry()[0].values()
        if any((folder / name).is_file() for name in suite.files)
    ]


def reference(suite: str, problem: Problem) -> str:
    """What the authors give as the solution, as a response."""
    solution = problem.solution or ""
    if suite == "svamp":
        return f"{solution} = {problem.label}"
    # Solutions of OlympiadBench and AIME tell the answer in prose, mostly without a box: there the
    # label itself is the answer.
    is_answered = last_box(solution) is not None or suite == "gsm8k"
    return solution if is_answered and suite != "aime24" else boxed(problem.label)


def own_pairs(loaded: LoadedSuite) -> list[Pair]:
    """Each reference solution with its own label."""
    return [
        Pair(
            name=problem.id,
            response=reference(loaded.name, problem),
            label=problem.label,
            tolerance=problem.tolerance,
        )
        for problem in loaded.problems
    ]


def other_pairs(loaded: LoadedSuite, num: int) -> Iterator[Pair]:
    """Labels of other problems of the set as answers; none has the text of the right label."""
    order = random.Random(0)
    while num:
        first, second = order.sample(loaded.problems, k=2)
        if first.label != second.label:
            yield Pair(
                name=first.id,
                response=boxed(first.label),
                label=second.label,
                tolerance=second.tolerance,
            )
            num -= 1


def grade(pair: Pair) -> str:
    """Returns `right`, `unevaluated`, `wrong`, `no answer` or `label`."""
    try:
        verdict = judge(pair.response, pair.label, pair.tolerance)
    except LabelNotParsableError:
        return "label"
    if verdict.correct:
        return "right"
    if verdict.unevaluated:
        return "unevaluated"
    return "wrong" if verdict.answered else "no answer"


def report_references(suites: list[LoadedSuite], *, verbose: bool) -> None:
    """Prints how many reference solutions earn the reward of their label."""
    print(f"{'reference solutions':<24}{'right':>7}{'of':>7}{'share':>8}{'CPU ms for one':>18}")
    for loaded in suites:
        started_s = time.process_time()
        grades = [(pair, grade(pair)) for pair in own_pairs(loaded)]
        took_ms = (time.process_time() - started_s) / len(grades) * 1000
        right = sum(found == "right" for _, found in grades)
        share = f"{right / len(grades):.1%}"
        print(f"{loaded.title:<24}{right:>7}{len(grades):>7}{share:>8}{took_ms:>18.2f}")
        for pair, found in grades:
            if verbose and found != "right":
                print(f"  {pair.name} {found}: {pair.label!r} {pair.response[-100:]!r}")


def report_coincidences(suites: list[LoadedSuite]) -> None:
    """Prints answers of other problems that are graded as right, each pair of labels once."""
    print(f"\n{'answers of other problems':<24}{'right':>7}{'of':>7}")
    for loaded in suites:
        right = [pair for pair in other_pairs(loaded, _NUM_PAIRS) if grade(pair) == "right"]
        print(f"{loaded.title:<24}{len(right):>8}{_NUM_PAIRS:>7}")
        for pair in {(pair.response, pair.label): pair for pair in right}.values():
            print(f"  {last_box(pair.response)!r} answers {pair.label!r}")


async def report_speed(suites: list[LoadedSuite], num_workers: int) -> None:
    """Prints answers per minute through the worker pool, each answer graded once."""
    order = random.Random(1)
    pairs = [pair for loaded in suites for pair in own_pairs(loaded)]
    timed = order.sample(pairs, k=min(_NUM_TIMED, len(pairs)))
    reward = MathReward(num_workers=num_workers)
    await reward.score(prompt="", response="7", label="7")
    started_s = time.monotonic()
    await asyncio.gather(
        *(reward.score(prompt="", response=pair.response, label=pair.label) for pair in timed)
    )
    per_minute = len(timed) / (time.monotonic() - started_s) * 60
    reward.close()
    print(f"\n{per_minute:,.0f} answers a minute with {num_workers} workers")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder of the problem sets")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--verbose", action="store_true", help="list what is not graded right")
    arguments = parser.parse_args()
    suites = read_suites(arguments.data)
    if not suites:
        known = ", ".join(name for suite in registry()[0].values() for name in suite.files)
        parser.error(f"{arguments.data} holds none of {known}")
    report_references(suites, verbose=arguments.verbose)
    report_coincidences(suites)
    asyncio.run(report_speed(suites, arguments.workers))


if __name__ == "__main__":
    main()

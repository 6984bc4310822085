"""Measures the grader on published problem sets: right answers, coincidences and speed.

    python benchmarks/grading.py DATA_FOLDER

DATA_FOLDER holds math500.jsonl, gsm8k_test.jsonl, svamp_test.jsonl, minerva.jsonl and
olympiadbench_oe_to_maths_en.jsonl as their authors publish them; files that are missing are left
out. A reference solution should earn the reward of its own label, and the label of another problem
should not, unless both are equal to a reader: the pairs found are printed.
"""

import argparse
import asyncio
import json
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openrlhf_alp.data.labels import label_texts
from openrlhf_alp.rewards.math import MathReward
from openrlhf_alp.rewards.verify import LabelNotParsableError, judge

_NUM_PAIRS = 10_000
_NUM_TIMED = 4_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A text and the label it is graded against."""

    name: str
    response: str
    label: str


def _boxed(answer: str) -> str:
    return f"The answer is $\\boxed{{{answer.strip('$')}}}$."


def _math500(row: dict[str, Any]) -> tuple[str, str]:
    return row["solution"], label_texts(row["answer"])[0]


def _gsm8k(row: dict[str, Any]) -> tuple[str, str]:
    return row["answer"], label_texts(row["answer"])[0]


def _svamp(row: dict[str, Any]) -> tuple[str, str]:
    label = label_texts(row["Answer"])[0]
    return f"{row['Equation']} = {row['Answer']}", label


def _olympiad(row: dict[str, Any]) -> tuple[str, str]:
    answer = row["answer"][0]
    (label,) = label_texts(answer)
    return _boxed(label), label


def _minerva(row: dict[str, Any]) -> tuple[str, str]:
    return row["solution"], label_texts(row["answer"])[0]


SETS: dict[str, tuple[str, Callable[[dict[str, Any]], tuple[str, str]]]] = {
    "MATH500": ("math500.jsonl", _math500),
    "GSM8K": ("gsm8k_test.jsonl", _gsm8k),
    "SVAMP": ("svamp_test.jsonl", _svamp),
    "OlympiadBench": ("olympiadbench_oe_to_maths_en.jsonl", _olympiad),
    "Minerva": ("minerva.jsonl", _minerva),
}


def read_pairs(folder: Path) -> Iterator[Pair]:
    """Yields each reference solution with its own label."""
    for name, (file, fields) in SETS.items():
        path = folder / file
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        for number, line in enumerate(lines, start=1):
            response, label = fields(json.loads(line))
            yield Pair(name=f"{name}:{number}", response=response, label=label)


def grade(pair: Pair) -> str:
    """Returns `right`, `unevaluated`, `wrong`, `no answer` or `label`."""
    try:
        verdict = judge(pair.response, pair.label)
    except LabelNotParsableError:
        return "label"
    if verdict.correct:
        return "right"
    if verdict.unevaluated:
        return "unevaluated"
    return "wrong" if verdict.answered else "no answer"


def report_references(pairs: list[Pair], *, verbose: bool) -> None:
    """Prints how many reference solutions earn the reward of their label."""
    print(f"{'reference solutions':<24}{'right':>7}{'of':>7}{'CPU ms for one':>18}")
    for name in SETS:
        own = [pair for pair in pairs if pair.name.startswith(f"{name}:")]
        started_s = time.process_time()
        grades = {pair: grade(pair) for pair in own}
        took_ms = (time.process_time() - started_s) / max(1, len(own)) * 1000
        right = [pair for pair, found in grades.items() if found == "right"]
        print(f"{name:<24}{len(right):>7}{len(own):>7}{took_ms:>18.2f}")
        for pair, found in grades.items():
            if verbose and found != "right":
                boxes = re.findall(r"\\boxed\{.*", pair.response)
                print(f"  {pair.name} {found}: {pair.label!r} {boxes[-1:]!r}")


def report_coincidences(pairs: list[Pair]) -> None:
    """Prints the labels of different problems that are graded as equal."""
    order = random.Random(0)
    labels = sorted({pair.label for pair in pairs})
    chosen = [tuple(order.sample(labels, k=2)) for _ in range(_NUM_PAIRS)]
    equal = [
        (a, b) for a, b in chosen if grade(Pair(name="", response=_boxed(a), label=b)) == "right"
    ]
    print(f"\n{len(chosen)} pairs of different labels, {len(equal)} graded as equal")
    for first, second in equal:
        print(f"  {first!r} = {second!r}")


async def report_speed(pairs: list[Pair], num_workers: int) -> None:
    """Prints answers per minute through the worker pool, each answer graded once."""
    order = random.Random(1)
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
    pairs = list(read_pairs(arguments.data))
    if not pairs:
        parser.error(
            f"{arguments.data} holds none of {', '.join(file for file, _ in SETS.values())}"
        )
    report_references(pairs, verbose=arguments.verbose)
    report_coincidences(pairs)
    asyncio.run(report_speed(pairs, arguments.workers))


if __name__ == "__main__":
    main()

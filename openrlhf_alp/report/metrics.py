"""Reads the metrics.jsonl of a run folder, one JSON object per step, also while a run trains."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

RECIPE, ENVIRONMENT, SUMMARY = "recipe.toml", "environment.json", "summary.json"
"""Files of a run folder: what was asked for, versions and machine, how a finished run ended."""

METRICS = "metrics.jsonl"
"""Name of the file in a run folder."""

BATCHES = "batches"
"""Folder of a run with the recorded steps, if its recipe asks for them."""

EDGE_STEPS = 3
"""Rewards are compared over this many steps at the start and at the end of a run."""

STEP = "global_step"
REWARD = "rollout/reward_mean"
RESPONSE_LENGTH = "rollout/response_length_mean"
NUM_SAMPLES = "rollout/num_samples"
GENERATION_S = "timing/generation"
LARGEST = 3.5e38
"""The trainer's tensors are float32: a larger number has run over, and no chart holds it."""

LARGEST_STEP = 2**53
"""Whole numbers up to here are exact in a chart."""

_BROKEN = (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError)
"""What reading a line can end with that is not the metrics of a step."""

_MOST_NAMED = 6
"""Metrics and lines that a note names; the others are counted."""

LOG_RATIO_QUANTILES = {
    1: "alp/log_ratio_p01",
    25: "alp/log_ratio_p25",
    50: "alp/log_ratio_p50",
    75: "alp/log_ratio_p75",
    99: "alp/log_ratio_p99",
}
"""Percent to metric name, of log pi_perturbed(token) - log mu(token) over the step's tokens."""


class MetricsFileError(ValueError):
    """A line of the file is not what the trainer writes. The message names file and line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """What the trainer logged for one global step."""

    step: int
    """Counts from 1."""

    values: Mapping[str, float]
    """Metric name to value, without the step. A metric that was not computed is absent."""

    @property
    def tokens_per_s(self) -> float | None:
        """Sampled tokens per second of generation; None when a metric for it is missing."""
        try:
            tokens = self.values[NUM_SAMPLES] * self.values[RESPONSE_LENGTH]
            return tokens / self.values[GENERATION_S]
        except (KeyError, ZeroDivisionError):
            return None


class MetricsFollower:
    """Returns each step of a growing file once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset_bytes = 0
        self._num_lines = 0

    def new_steps(self) -> list[StepMetrics]:
        """Steps written since the last call; none while the file does not exist.

        Raises:
            MetricsFileError: a whole line is not a JSON object of numbers with a global step.
        """
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset_bytes)
            # What follows the last newline is still being written; the next call reads it.
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offset_bytes += len(whole) + len(newline)
        return [self._parse(line) for line in whole.splitlines()]

    def _parse(self, line: bytes) -> StepMetrics:
        self._num_lines += 1
        try:
            values = {name: float(value) for name, value in json.loads(line).items()}
            step = int(values.pop(STEP))
        except _BROKEN as error:
            raise MetricsFileError(
                f"{self._path}, line {self._num_lines}: not the metrics of a step "
                f"({type(error).__name__}: {error}). --logger.metrics_jsonl writes this file; was "
                "it edited, or written by two runs at once?"
            ) from error
        return StepMetrics(step=step, values=values)


def read_steps(path: Path) -> list[StepMetrics]:
    """All complete steps of `path`, in the order of the file; raises MetricsFileError."""
    return MetricsFollower(path).new_steps()


def salvage_steps(path: Path) -> tuple[list[StepMetrics], list[str]]:
    """The steps of a file of which some lines or values may be broken, and what is left out of it.

    A step that stands there twice, of a run that was started again, counts as it was made last.

    Returns:
        The steps in their order with finite values only, and what was left out, as sentences.

    Raises:
        OSError: the file cannot be read.
    """
    # What follows the last newline is still being written.
    lines = path.read_bytes().rpartition(b"\n")[0].splitlines()
    steps: dict[int, StepMetrics] = {}
    broken: list[int] = []
    missing: dict[str, list[int]] = {}
    num_again = 0
    for number, line in enumerate(lines, start=1):
        found = _salvaged(line)
        if found is None:
            broken.append(number)
            continue
        step, values = found
        num_again += step in steps
        finite = {name: v for name, v in values.items() if v is not None}
        steps[step] = StepMetrics(step=step, values=finite)
        for name in values.keys() - finite.keys():
            missing.setdefault(name, []).append(step)
    notes = []
    if broken:
        notes.append(
            f"{len(broken)} of the {len(lines)} lines of {path.name} are not the metrics of a step "
            f"and are left out (line {_listed(broken)}). Was it edited, or written by two runs at "
            "once?"
        )
    if num_again:
        notes.append(
            f"{num_again} lines of {path.name} repeat a step, as after a second start of the run: "
            "the last line of a step counts."
        )
    notes += [
        f"{name} is not a finite number at {len(at)} of {len(steps)} steps (step {_listed(at)}); "
        "its numbers and curves are of the others."
        for name, at in sorted(missing.items())[:_MOST_NAMED]
    ]
    if len(missing) > _MOST_NAMED:
        notes.append(f"the same holds for {len(missing) - _MOST_NAMED} more metrics.")
    return [steps[step] for step in sorted(steps)], notes


def _salvaged(line: bytes) -> tuple[int, dict[str, float | None]] | None:
    """Step and values of a line, None for a value that is no finite number; None without a step."""
    try:
        row = dict(json.loads(line))
        step = row.pop(STEP)
        if not 0 <= int(step) <= LARGEST_STEP:
            return None
        return int(step), {str(name): _finite(value) for name, value in row.items()}
    except _BROKEN:
        return None


def _finite(value: object) -> float | None:
    if not isinstance(value, int | float):
        return None
    # NaN compares as False, and an int may be too large for a float.
    return float(value) if abs(value) <= LARGEST else None


def _listed(numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - _MOST_NAMED} more" if len(numbers) > _MOST_NAMED else ""
    return ", ".join(map(str, numbers[:_MOST_NAMED])) + more


def reward_at_edges(steps: Sequence[StepMetrics]) -> tuple[float, float] | None:
    """Mean reward of the first and of the last EDGE_STEPS; None if these would share a step."""
    rewards = [step.values[REWARD] for step in steps if REWARD in step.values]
    if len(rewards) < 2 * EDGE_STEPS:
        return None
    return statistics.fmean(rewards[:EDGE_STEPS]), statistics.fmean(rewards[-EDGE_STEPS:])

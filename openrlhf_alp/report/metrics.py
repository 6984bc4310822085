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
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise MetricsFileError(
                f"{self._path}, line {self._num_lines}: not the metrics of a step "
                f"({type(error).__name__}: {error}). --logger.metrics_jsonl writes this file; was "
                "it edited, or written by two runs at once?"
            ) from error
        return StepMetrics(step=step, values=values)


def read_steps(path: Path) -> list[StepMetrics]:
    """All complete steps of `path`, in the order of the file; raises MetricsFileError."""
    return MetricsFollower(path).new_steps()


def reward_at_edges(steps: Sequence[StepMetrics]) -> tuple[float, float] | None:
    """Mean reward of the first and of the last EDGE_STEPS; None if these would share a step."""
    rewards = [step.values[REWARD] for step in steps if REWARD in step.values]
    if len(rewards) < 2 * EDGE_STEPS:
        return None
    return statistics.fmean(rewards[:EDGE_STEPS]), statistics.fmean(rewards[-EDGE_STEPS:])

"""Follows a training process by the metrics it writes, and keeps its services running meanwhile."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from openrlhf_alp.launch.processes.servers import Services
from openrlhf_alp.launch.processes.supervisor import Child
from openrlhf_alp.launch.view import LaunchView
from openrlhf_alp.report.metrics import MetricsFollower, StepMetrics

_POLL_S = 0.3
_ASK_EVERY_S = 2.0
_VERDICTS = ("ok", "suspicious", "broken")


def count_steps(prompts: Path, shape: Mapping[str, int]) -> int | None:
    """How many steps the prompts are for; None when they cannot be counted here."""
    if not prompts.is_file() or prompts.suffix != ".jsonl":
        return None
    with prompts.open("rb") as lines:
        rows = min(sum(1 for _ in lines), shape["max_samples"])
    return math.ceil(rows / shape["batch_size"]) * shape["num_episodes"]


def follow_training(
    train: Child,
    metrics: Path,
    services: Services,
    num_steps: int | None,
    view: LaunchView,
    on_step: Callable[[StepMetrics], None],
    on_poll: Callable[[], None],
) -> list[StepMetrics]:
    """Shows each step as it is logged, until training ends.

    Args:
        on_step: called with each new step.
        on_poll: called several times a second.

    Returns:
        all steps of `metrics`, those of an earlier part of the run included.

    Raises:
        ProcessFailedError: a service ended for good.
        MetricsFileError: a line of `metrics` is not that of a step.
    """
    follower = MetricsFollower(metrics)
    steps = follower.new_steps()  # of a run that continues
    asked_s = 0.0
    with view.training(num_steps, steps) as on_change:
        while True:
            # Asked before reading, so that what is logged just before the end is still read.
            is_running = train.is_running
            for step in follower.new_steps():
                steps.append(step)
                on_change(services.all, step)
                on_step(step)
                _say_verdict(step, view)
            if not is_running:
                return steps
            services.keep_running()
            on_poll()
            if view.is_live and time.monotonic() - asked_s > _ASK_EVERY_S:
                services.poll()
                on_change(services.all, None)
                asked_s = time.monotonic()
            time.sleep(_POLL_S)


def _say_verdict(step: StepMetrics, view: LaunchView) -> None:
    if (verdict := step.values.get("preflight/verdict")) is not None:
        kl = step.values.get("preflight/k3_kl", math.nan)
        text = f"{_VERDICTS[int(verdict)]}: learner and service differ by a k3 KL of {kl:.1e}"
        view.say("preflight", text)

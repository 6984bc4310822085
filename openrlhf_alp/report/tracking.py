"""Steps of a run as they are made, in a project of Trackio: `[run] trackio`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from openrlhf_alp.report.metrics import StepMetrics

INSTALL = "pip install --no-deps trackio==0.43.0 gradio-client==2.7.2 brotli==1.2.1"
"""Without its requirements, which ask for an older pillow; what it needs of the others is here."""


def is_installed() -> bool:
    """Whether `tracking` can be used with a project."""
    return importlib.util.find_spec("trackio") is not None


@contextmanager
def tracking(
    project: str | None, *, name: str, settings: Mapping[str, Any], continues: bool
) -> Iterator[Callable[[StepMetrics], None]]:
    """Yields what to call with each step; without a project that does nothing.

    Args:
        name: of the run within the project.
        continues: the steps belong to the latest run of this name.
    """
    if project is None:
        yield lambda step: None
        return
    import trackio  # type: ignore[import-not-found, unused-ignore]

    run = trackio.init(
        project=project,
        name=name,
        config=dict(settings),
        resume="allow" if continues else "never",
        embed=False,
        # The run's own metrics only: it would start threads that watch the machine.
        auto_log_gpu=False,
        auto_log_cpu=False,
    )
    try:
        yield lambda step: run.log(dict(step.values), step=step.step)
    finally:
        run.finish()

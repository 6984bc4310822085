"""Trackio itself, which the locked environment lacks: `make trackio` runs this."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from openrlhf_alp.report.metrics import StepMetrics
from openrlhf_alp.report.tracking import is_installed, tracking

needs_trackio = pytest.mark.skipif(not is_installed(), reason="trackio: make trackio")


def test_without_a_project_nothing_is_logged() -> None:
    with tracking(None, name="n", settings={}, continues=False) as log_step:
        log_step(StepMetrics(step=1, values={}))


@needs_trackio
def test_steps_are_in_the_project_under_the_name_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Read when it is imported, which happens here for the first time.
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    for continues, steps in ((False, (1, 2)), (True, (3,))):
        with tracking("p", name="n", settings={"run.seed": 1}, continues=continues) as log_step:
            for step in steps:
                log_step(StepMetrics(step=step, values={"rollout/reward_mean": step / 4}))
    with closing(sqlite3.connect(tmp_path / "p.db")) as database:
        rows = database.execute("select run_name, step, metrics from metrics").fetchall()
        runs = database.execute("select count(*) from configs").fetchone()
    assert [(name, step, json.loads(text)) for name, step, text in rows] == [
        ("n", step, {"rollout/reward_mean": step / 4}) for step in (1, 2, 3)
    ]
    assert runs == (1,)

"""Real programs stopped and killed at some stages; benchmarks/launch_stops.py takes every stage."""

import json
import signal
import time
from pathlib import Path

import pytest

from benchmarks.common.launching import STAGES, StartLaunch, start_until, wait_until_gone
from openrlhf_alp.launch.weights_folder import weights_dir

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1500)]

MOST_S = 20.0
"""From a stop signal to the last process gone."""
MOST_AFTER_KILL_S = 5.0
"""The same from the end of the launch itself by kill -9."""


@pytest.mark.parametrize("stage", ["warm-up", "evaluation of a step"])
def test_ctrl_c_leaves_nothing_behind(start_real: StartLaunch, tmp_path: Path, stage: str) -> None:
    launch = start_until(stage, start_real, tmp_path)
    family = launch.family()
    asked_s = time.monotonic()
    launch.process.send_signal(signal.SIGINT)
    status, output = launch.finish(timeout=60)
    assert time.monotonic() - asked_s < MOST_S
    assert wait_until_gone(family, 0.5) == []
    assert status == 128 + signal.SIGINT, output
    assert not weights_dir(launch.run).exists()


def test_a_launch_that_is_killed_takes_its_processes_with_it(
    start_real: StartLaunch, tmp_path: Path
) -> None:
    launch = start_until("training", start_real, tmp_path)
    family = launch.family()
    launch.process.kill()
    launch.process.wait()
    assert wait_until_gone(family, MOST_AFTER_KILL_S) == []


def test_a_tool_service_that_is_killed_in_the_warm_up_ends_the_run_by_name(
    start_real: StartLaunch, tmp_path: Path
) -> None:
    launch = start_until("warm-up", start_real, tmp_path)
    family = launch.family()
    launch.kill("services.tool")
    status, output = launch.finish(timeout=60)
    assert status == 1, output
    assert "tool-0 was ended by SIGKILL" in output
    assert wait_until_gone(family, 0.5) == []


def test_servers_that_are_killed_in_training_come_back_and_no_other_weights_are_evaluated(
    start_real: StartLaunch, tmp_path: Path
) -> None:
    """The tool service dies while the learner starts, the rollout service in an evaluation: it then
    serves the weights of the beginning until they are pushed again."""
    launch = start_until("learner starts", start_real, tmp_path)
    launch.kill("services.tool")
    launch.wait_until(lambda: STAGES["evaluation of a step"](launch))
    launch.kill("services.rollout")
    status, output = launch.finish()
    assert status == 0, output
    for name in ("tool-0", "rollout-0"):
        assert f"{name} was ended by SIGKILL; started again (1 of 3)" in output
    assert "step 1 is not evaluated: rollout-0 lost the weights of the step" in output
    assert not (launch.run / "evaluation" / "step-1" / "results.json").exists()
    digests = _digests(launch.run, "before", "step-2", "after")
    # The last step's weights are the trained policy's.
    assert digests[0] != digests[1] == digests[2]


def test_a_run_that_was_killed_in_an_evaluation_resumes_and_finishes_it(
    start_real: StartLaunch, tmp_path: Path
) -> None:
    settings = ("model.warm_up_steps=0", "train.ckpt.save_steps=1")
    launch = start_until("evaluation of a step", start_real, tmp_path, settings=settings)
    family = launch.family()
    launch.process.kill()
    launch.process.wait()
    assert wait_until_gone(family, MOST_AFTER_KILL_S) == []
    status, output = start_real("--resume", str(launch.run), run=launch.run).finish()
    assert status == 0, output
    assert "continues after step 1" in output
    lines = (launch.run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["global_step"] for line in lines] == [1, 2]
    assert len(set(_digests(launch.run, "before", "step-1", "step-2"))) == 3


def _digests(run: Path, *names: str) -> list[str]:
    """Of the weights that each evaluation asked; every one is whole."""
    digests = []
    for name in names:
        results = json.loads((run / "evaluation" / name / "results.json").read_text())
        assert [(suite["num_problems"], suite["n"]) for suite in results["suites"]] == [(3, 2)]
        digests.append(results["weights_digest"])
    return digests

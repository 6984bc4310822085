"""A launch as a user meets it: a process with signals, logs, a run folder and an exit status."""

import json
import signal
import time

import psutil
import pytest

pytestmark = pytest.mark.e2e

EVALUATION = """
import pathlib, signal, sys
folder = pathlib.Path(sys.argv[2])
folder.mkdir(parents=True, exist_ok=True)
starts = folder / "starts"
is_first = not starts.exists()
if {made} or not is_first:
    (folder / "results.json").touch()
with starts.open("a") as file:
    file.write("x")
if is_first:
    signal.pause()
"""
"""Hangs at its first start, with or without results; counts its starts."""

MOST_S = 20.0
"""From a stop signal to the last process gone."""


def test_a_run_ends_with_numbers_plots_and_no_process_left(start_launch):
    launch = start_launch()
    status, output = launch.finish()
    assert status == 0, output
    assert launch.still_running() == []
    assert len(launch.started_pids()) == 4

    run = launch.folder / "run"
    assert {path.name for path in run.iterdir()} >= {
        *("recipe.toml", "environment.json", "metrics.jsonl", "logs", "data", "plots"),
        "summary.json",
    }
    assert (run / "plots" / "reward.png").exists()
    # The fake service answers 0 before and the sum after; 3 steps of 0.1 0.2 0.3 and 0.8 0.9 1.0.
    assert json.loads((run / "summary.json").read_text()) == {
        "steps": 10,
        "before": {"greedy": 0.0, "temperature_1": 0.0},
        "after": {"greedy": 1.0, "temperature_1": 1.0},
        "reward_first_steps": pytest.approx(0.2),
        "reward_last_steps": pytest.approx(0.9),
        "restarts": {"rollout-0": 0},
    }
    assert "10/10  reward 1.00  ratio P99 1.000" in output
    assert "256 tokens/s" in output
    assert "+100 points" in output


@pytest.mark.parametrize(
    ("options", "num_processes", "signum"),
    [
        pytest.param({"check": "hangs"}, 0, signal.SIGTERM, id="while flags are checked"),
        pytest.param({"tool": "never_ready"}, 2, signal.SIGTERM, id="while a tool service starts"),
        pytest.param({"rollout": "never_ready"}, 2, signal.SIGINT, id="while a server starts"),
        pytest.param({"rollout": "hangs_when_asked"}, 2, signal.SIGTERM, id="before training"),
        pytest.param({"train": "hangs"}, 4, signal.SIGINT, id="in training"),
        pytest.param({"train": "hangs", "tool": "ok"}, 6, signal.SIGHUP, id="no terminal"),
        pytest.param(
            {"train": "stubborn", "rollout": "stubborn"}, 4, signal.SIGTERM, id="none obeys"
        ),
    ],
)
def test_a_stop_signal_ends_everything_in_time_at_every_stage(
    start_launch, options, num_processes, signum
):
    launch = start_launch(**options)
    if "check" in options:
        launch.read_until("checking")
    launch.wait_for_pids(num_processes)
    asked_s = time.monotonic()
    launch.process.send_signal(signum)
    status, output = launch.finish()
    assert time.monotonic() - asked_s < MOST_S
    assert status == 128 + signum, output
    assert f"by {signum.name}; every process of the run has been ended" in output
    assert launch.still_running() == []


def test_a_launch_that_is_killed_takes_everything_with_it(start_launch):
    launch = start_launch(train="stubborn", tool="stubborn", rollout="stubborn")
    launch.wait_for_pids(6)
    family = psutil.Process(launch.process.pid).children(recursive=True)
    launch.process.kill()
    assert psutil.wait_procs(family, timeout=5)[1] == []
    assert launch.still_running() == []


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        pytest.param(
            {"train": "fails"},
            [
                "Training ended with exit status 1. Last lines of",
                "error: a loss of NaN; fix: lower the learning rate",
            ],
            id="training fails",
        ),
        pytest.param(
            {"train": "is_killed"},
            ["Training was ended by SIGKILL", "usually because memory ran out"],
            id="training is killed",
        ),
        pytest.param(
            {"rollout": "dies"},
            [
                "rollout-0 ended with exit status 1",
                "error: no such model folder; fix: name another",
            ],
            id="the service does not start",
        ),
        pytest.param(
            {"rollout": "dies_when_asked"},
            ["rollout-0 was ended by SIGSEGV"],
            id="the service dies while accuracy is measured",
        ),
        pytest.param(
            {"train": "kills_always"},
            ["started again (1 of 1)", "rollout-0 was ended by SIGKILL. Last lines of"],
            id="the service dies more often than it may",
        ),
    ],
)
def test_a_process_that_fails_ends_the_run_and_is_shown_with_the_end_of_its_log(
    start_launch, options, shown
):
    launch = start_launch(**options)
    status, output = launch.finish()
    assert status == 1, output
    for text in shown:
        assert text in output
    assert launch.still_running() == []


def test_a_service_that_is_killed_in_training_comes_back_and_the_run_goes_on(start_launch):
    launch = start_launch(train="kills_service")
    status, output = launch.finish()
    assert status == 0, output
    assert "rollout-0 was ended by SIGKILL; started again (1 of 1)" in output
    summary = json.loads((launch.folder / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["restarts"]) == (10, {"rollout-0": 1})
    assert launch.still_running() == []


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        ("print('fine')", "results   "),
        (
            "import sys; sys.exit('no such set')",
            "step 2 is not evaluated: Evaluating step 2 ended with exit status 1",
        ),
        (
            "import os, signal, sys; "
            "os.kill(int(open(sys.argv[1]).read().split()[0]), 9); signal.pause()",
            "step 2 is not evaluated: rollout-0 lost the weights of the step",
        ),
    ],
    ids=["made", "fails", "the service dies"],
)
def test_the_learner_waits_for_an_evaluation_and_continues_whatever_becomes_of_it(
    start_launch, code, shown
):
    launch = start_launch(train="holds", evaluate=code, steps=4)
    status, output = launch.finish()
    assert status == 0, output
    assert shown in output
    assert output.index(shown) < output.index("3/4  reward")
    assert launch.still_running() == []


def test_a_run_that_failed_continues_after_its_newest_checkpoint(start_launch):
    """It fails in step 3, whose metrics are written; the checkpoint is that of step 2."""
    first = start_launch(train="fails_later", steps=4)
    status, output = first.finish()
    assert status == 1
    assert f"--resume {first.folder}/run" in output
    status, output = start_launch(resume=True, steps=4).finish()
    assert status == 0, output
    assert "continues after step 2; 1 later steps are repeated" in output
    rows = (first.folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["global_step"] for row in rows] == [1, 2, 3, 4]
    undone = (first.folder / "run" / "metrics.undone.jsonl").read_text().splitlines()
    assert [json.loads(row)["global_step"] for row in undone] == [3]


@pytest.mark.parametrize(
    ("stage", "options", "starts"),
    [
        pytest.param("step-2", {"train": "holds"}, 2, id="cut off during training"),
        pytest.param("after", {"after": True}, 2, id="cut off after training"),
        pytest.param("step-2", {"train": "holds", "made": True}, 1, id="made before the end"),
    ],
)
def test_an_evaluation_that_the_end_of_a_run_cut_off_continues_with_the_run(
    start_launch, stage, options, starts
):
    """Checkpoints are those of steps 2 and 4, the last one. What was answered is still there."""
    made = options.pop("made", False)
    code = EVALUATION.format(made=made)
    launch = start_launch(evaluate=code, steps=4, **options)
    folder = launch.folder / "run" / "evaluation" / stage
    while not (folder / "starts").exists():
        assert launch.process.poll() is None, launch.finish()
        time.sleep(0.05)
    launch.process.send_signal(signal.SIGTERM)
    assert launch.finish()[0] == 143
    assert (folder / "results.json").exists() == made

    status, output = start_launch(evaluate=code, steps=4, resume=True, **options).finish()
    assert status == 0, output
    assert (folder / "starts").read_text() == "x" * starts
    assert (folder / "results.json").exists()
    # At the weights of its step, and before they change.
    assert stage == "after" or made or output.index(str(folder)) < output.index("3/4  reward")


def test_two_launches_run_at_once_but_not_in_one_folder(start_launch, tmp_path):
    one, two = (
        start_launch(folder=tmp_path / name, steps=4, train="hangs") for name in ("one", "two")
    )
    for launch in (one, two):
        launch.wait_for_pids(4)
    status, output = start_launch(folder=tmp_path / "one", resume=False).finish()
    assert status == 2
    assert "holds an earlier run" in output
    for launch in (one, two):
        launch.process.send_signal(signal.SIGTERM)
        assert launch.finish()[0] == 143
        assert launch.still_running() == []

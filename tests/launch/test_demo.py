"""The demo's orchestration as a user meets it: a process with signals, logs and an exit status."""

import json
import signal

import pytest

pytestmark = pytest.mark.e2e


def test_a_run_ends_with_numbers_plots_and_no_process_left(start_demo):
    demo = start_demo("ok", "ok")
    status, output = demo.finish()
    assert status == 0, output
    assert demo.still_running() == []
    assert len(demo.started_pids()) == 4

    run = demo.folder / "run"
    assert (run / "reward.png").exists()
    assert (run / "log_ratio.png").exists()
    # The fake service answers 0 before and the sum after; 3 steps of 0.1 0.2 0.3 and 0.8 0.9 1.0.
    assert json.loads((run / "summary.json").read_text()) == {
        "steps": 10,
        "before": {"greedy": 0.0, "temperature_1": 0.0},
        "after": {"greedy": 1.0, "temperature_1": 1.0},
        "reward_first_steps": pytest.approx(0.2),
        "reward_last_steps": pytest.approx(0.9),
    }
    assert "10/10  reward 1.00  ratio P99 1.000  256 tokens/s" in output
    assert "+100 points" in output


@pytest.mark.parametrize(
    ("signum", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
)
def test_a_stop_signal_during_training_ends_everything(start_demo, signum, status):
    demo = start_demo("ok", "hangs")
    demo.read_until("1/10")
    demo.process.send_signal(signum)
    returned, output = demo.finish()
    assert returned == status
    assert f"by {signum.name}; every process of the demo has been ended" in output
    assert len(demo.started_pids()) == 4
    assert demo.still_running() == []


def test_a_training_run_that_fails_is_shown_with_the_end_of_its_log(start_demo):
    demo = start_demo("ok", "fails")
    status, output = demo.finish()
    assert status == 1
    assert "Training ended with exit status 1. Last lines of" in output
    assert "error: a loss of NaN; fix: lower the learning rate" in output
    assert demo.still_running() == []


def test_a_service_that_does_not_start_is_shown_with_the_end_of_its_log(start_demo):
    demo = start_demo("dies", "ok")
    status, output = demo.finish()
    assert status == 1
    assert "The rollout service ended with exit status 1" in output
    assert "error: no such model folder; fix: name another" in output


def test_a_service_that_dies_during_training_ends_the_demo_at_once(start_demo):
    demo = start_demo("ok", "kills_service")
    status, output = demo.finish()
    assert status == 1
    assert "The rollout service was ended by SIGKILL" in output
    assert "usually because memory ran out" in output
    assert demo.still_running() == []


def test_a_service_that_dies_while_it_is_measured_is_noticed_at_once(start_demo):
    demo = start_demo("dies_when_asked", "ok")
    status, output = demo.finish()
    assert status == 1
    assert "The rollout service was ended by SIGSEGV" in output
    assert demo.still_running() == []

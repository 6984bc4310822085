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


@pytest.mark.parametrize(
    ("service_mode", "train_mode", "shown"),
    [
        pytest.param(
            "ok",
            "fails",
            [
                "Training ended with exit status 1. Last lines of",
                "error: a loss of NaN; fix: lower the learning rate",
            ],
            id="training fails",
        ),
        pytest.param(
            "dies",
            "ok",
            [
                "The rollout service ended with exit status 1",
                "error: no such model folder; fix: name another",
            ],
            id="the service does not start",
        ),
        pytest.param(
            "ok",
            "kills_service",
            ["The rollout service was ended by SIGKILL", "usually because memory ran out"],
            id="the service dies during training",
        ),
        pytest.param(
            "dies_when_asked",
            "ok",
            ["The rollout service was ended by SIGSEGV"],
            id="the service dies while accuracy is measured",
        ),
    ],
)
def test_a_process_that_fails_ends_the_demo_and_is_shown_with_the_end_of_its_log(
    start_demo, service_mode, train_mode, shown
):
    demo = start_demo(service_mode, train_mode)
    status, output = demo.finish()
    assert status == 1
    for text in shown:
        assert text in output
    assert demo.still_running() == []

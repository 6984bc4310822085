import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from openrlhf_alp.launch.processes.supervisor import ProcessFailedError, Supervisor, tail

HERE = Path(__file__).parents[1]
WITH_A_DAEMON = (
    f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
    "import os, signal, time\n"
    "from fake_train import start_daemon\n"
    "print(os.getpid(), start_daemon(), flush=True)\n"
)
"""Prints its process id and that of a daemon that ignores SIGTERM and is nobody's child."""


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_child_gets_its_environment_and_writes_to_its_log(tmp_path):
    log = tmp_path / "log"
    with Supervisor({"SECRET": "42"}) as supervisor:
        command = python("import os; print(os.environ['SECRET'])")
        child = supervisor.start("A child", command, log=log, grace_s=1.0)
        supervisor.wait(child)
    assert log.read_text() == "42\n"


def test_a_child_that_ignores_sigterm_is_killed_when_its_grace_is_over(tmp_path):
    log = tmp_path / "log"
    code = "import signal; signal.signal(15, signal.SIG_IGN); print(1, flush=True); signal.pause()"
    with Supervisor() as supervisor:
        child = supervisor.start("A child", python(code), log=log, grace_s=0.1)
        while not log.read_text():
            assert child.is_running
    assert child.process.returncode == -9


def test_a_failed_child_is_explained_by_status_log_and_place_to_look(tmp_path):
    log = tmp_path / "log"
    with Supervisor() as supervisor:
        code = "import sys; print('line', end=''); sys.exit(3)"
        child = supervisor.start("Training", python(code), log=log, grace_s=1.0)
        with pytest.raises(ProcessFailedError) as caught:
            supervisor.wait(child)
    message = str(caught.value)
    assert message.startswith("Training ended with exit status 3. Last lines of")
    assert "\n\nline\n\n" in message
    assert message.endswith(f"first error in {log}, above these lines.")


def test_a_child_that_runs_and_is_late_is_explained_by_how_long_it_was_waited_for(tmp_path):
    with Supervisor() as supervisor:
        code = "import signal; signal.pause()"
        child = supervisor.start("late", python(code), log=tmp_path / "log", grace_s=1.0)
        message = str(child.failure(waited_s=600.2))
    assert message.startswith("late did not answer within 600 s")
    assert "the machine may be too busy" in message and str(tmp_path / "log") in message


def test_only_the_last_lines_of_a_long_log_are_shown(tmp_path: Path):
    log = tmp_path / "log"
    log.write_bytes(b"\xff broken\n" * 100_000 + b"first\nsecond\n")
    assert tail(log, num_lines=2) == "first\nsecond"
    assert tail(tmp_path / "absent") == "(no output)"


def test_the_work_ends_before_the_services_it_talks_to(tmp_path):
    """Each writes when it is asked to end; the service was started last and must end last."""
    order = tmp_path / "order"
    code = (
        "import signal, sys, time\n"
        "def end(*_):\n"
        "    open({file!r}, 'a').write({name!r})\n"
        "    sys.exit()\n"
        "signal.signal(15, end)\n"
        "print(1, flush=True)\n"
        "while True: time.sleep(0.05)\n"
    )
    with Supervisor() as supervisor:
        for name, is_service in (("work ", False), ("service", True)):
            log = tmp_path / name
            command = python(code.format(file=str(order), name=name))
            supervisor.start(name, command, log=log, grace_s=5.0, is_service=is_service)
            while not log.read_text():
                pass
    assert order.read_text() == "work service"


def test_a_log_keeps_what_an_earlier_process_wrote(tmp_path):
    log = tmp_path / "log"
    with Supervisor() as supervisor:
        for text in ("first", "second"):
            child = supervisor.start("A", python(f"print({text!r})"), log=log, grace_s=1.0)
            assert supervisor.ended(child)[0] == 0
    assert log.read_text() == "first\nsecond\n"


@pytest.mark.parametrize(("code", "status"), [("", 0), ("os.kill(os.getpid(), 11)", -11)])
def test_what_a_child_leaves_behind_ends_with_it_and_its_own_status_is_told(tmp_path, code, status):
    log = tmp_path / "log"
    with Supervisor() as supervisor:
        child = supervisor.start("A", python(WITH_A_DAEMON + code), log=log, grace_s=1.0)
        ended, output = supervisor.ended(child)
        assert ended == status
        assert not any(psutil.pid_exists(int(pid)) for pid in output.split())


@pytest.mark.parametrize("killed", ["starter", "guardian"])
def test_a_killed_starter_or_guardian_takes_everything_with_it(tmp_path, killed):
    """The killed one cannot do anything; what it started includes a daemon in its own session."""
    log = tmp_path / "log"
    starter = f"""
import pathlib
from openrlhf_alp.launch.processes.supervisor import Supervisor
with Supervisor() as supervisor:
    command = {python(WITH_A_DAEMON + "signal.pause()")!r}
    child = supervisor.start("A", command, log=pathlib.Path({str(log)!r}), grace_s=1.0)
    print(child.process.pid, flush=True)
    child.process.wait()
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        python(starter), stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        guardian = int(process.stdout.readline())
        while not log.exists() or not log.read_text().endswith("\n"):
            assert process.poll() is None
        family = psutil.Process(process.pid).children(recursive=True)
        assert {int(pid) for pid in log.read_text().split()} < {child.pid for child in family}
        os.kill(process.pid if killed == "starter" else guardian, signal.SIGKILL)
        assert psutil.wait_procs(family, timeout=5)[1] == []


def test_a_child_that_cannot_be_started_says_why_in_its_log(tmp_path):
    log = tmp_path / "log"
    with Supervisor() as supervisor:
        child = supervisor.start("A", [str(tmp_path / "none")], log=log, grace_s=1.0)
        status, output = supervisor.ended(child)
    assert status == 1
    assert "FileNotFoundError" in output

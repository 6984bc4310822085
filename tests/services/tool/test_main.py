"""`python -m services.tool` as an operator meets it."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from tool_privileges import command, environment, unavailable

REPOSITORY = Path(__file__).parents[3]
ARGV = [sys.executable, "-m", "services.tool"]
SMALL = ["--port", "0", "--presets", "numpy", "--slots", "1", "--log-level", "WARNING"]
START_S = 60


def refused(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*ARGV, *SMALL, *flags], cwd=REPOSITORY, capture_output=True, text=True, timeout=START_S
    )


@contextlib.contextmanager
def running(*flags: str, user: str | None = None) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The service in its own process; yields it and its URL."""
    # Not pytest's own folder: an ordinary user could not enter it.
    folder = tempfile.mkdtemp(dir="/tmp")
    os.chmod(folder, 0o777)
    url_file = Path(folder) / "url"
    argv = [*ARGV, *SMALL, "--url-file", str(url_file), "--api-key", "operators-key", *flags]
    env = dict(os.environ)
    if user is not None:
        argv, env = command(user, argv), environment(user)
    env["TMPDIR"] = folder
    process = subprocess.Popen(argv, cwd=REPOSITORY, env=env, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_S
        while not url_file.exists():
            assert process.poll() is None, "the service ended instead of starting"
            assert time.monotonic() < deadline, "the service did not start"
            time.sleep(0.05)
        yield process, url_file.read_text().strip()
    finally:
        # With another user the service is a child of `unshare`, whose death signal it outlives.
        started = below(process.pid)
        process.kill()
        process.wait()
        for child in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        shutil.rmtree(folder)


def post(url: str, path: str, **body: object) -> httpx.Response:
    headers = {"Authorization": "Bearer operators-key"}
    return httpx.post(url + path, json=body, headers=headers, timeout=30)


def below(pid: int) -> list[psutil.Process]:
    """Every process below `pid`, if that one still runs; slots come and go while it looks."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_an_address_others_can_reach_needs_a_key() -> None:
    key = "--api-key or $OPENRLHF_ALP_TOOL_API_KEY"
    done = refused("--host", "0.0.0.0")
    assert done.returncode == 2 and key in done.stderr
    opened = refused("--host", "0.0.0.0", "--open-loopback")
    assert opened.returncode == 2 and "loopback" in opened.stderr and key in opened.stderr


def test_too_little_isolation_is_refused_with_a_table() -> None:
    done = refused("--isolation", "uid", "--min-isolation", "full")
    assert done.returncode == 3
    assert "below --min-isolation full" in done.stderr
    assert "how to get it" in done.stderr and "user namespaces" in done.stderr


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--slots", "0"], "--slots"),
        (["--presets", "scipy"], "--presets"),
        (["--default-timeout-s", "500"], "--max-timeout-s"),
        (["--max-body-bytes", "10"], "--max-body-bytes"),
    ],
)
def test_a_wrong_setting_names_the_flag_to_change(flags: list[str], named: str) -> None:
    done = refused(*flags)
    assert done.returncode == 2 and named in done.stderr


def test_a_stop_signal_ends_everything_cleanly() -> None:
    with running() as (process, url):
        assert post(url, "/v1/execute", code="print(1)").json()["stdout"] == "1\n"
        started = below(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert not any(map(alive, started))


def test_nothing_survives_a_killed_service() -> None:
    with running() as (process, url):
        session = post(url, "/v1/sessions").json()["session_id"]
        post(
            url,
            f"/v1/sessions/{session}/execute",
            code="import os\nif os.fork() == 0:\n    while 1: pass",
        )
        started = below(process.pid)
        assert len(started) > 5
        process.kill()
        killed = time.monotonic()
        while any(map(alive, started)):
            assert time.monotonic() - killed < 5.0, "processes survived the service"
            time.sleep(0.01)


def test_a_client_that_hangs_up_frees_its_slot() -> None:
    """One slot: the second request can only run because the first one was killed."""
    with running() as (_, url):
        headers = {"Authorization": "Bearer operators-key"}
        with pytest.raises(httpx.ReadTimeout):
            body = {"code": "import time\ntime.sleep(60)", "timeout_s": 60}
            httpx.post(f"{url}/v1/execute", json=body, headers=headers, timeout=1.0)
        answer = post(url, "/v1/execute", code="print(2)", deadline_s=20)
        assert answer.json()["stdout"] == "2\n"


@pytest.mark.parametrize("level", ["full", "basic"])
def test_an_ordinary_user_can_serve(level: str) -> None:
    reason = unavailable("ordinary")
    if reason:
        pytest.skip(reason)
    with running("--isolation", level, user="ordinary") as (_, url):
        answer = post(url, "/v1/execute", code="import os\nprint(os.getuid() != 0)")
        assert (answer.json()["stdout"], answer.headers["x-sandbox-level"]) == ("True\n", level)
        session = post(url, "/v1/sessions").json()["session_id"]
        post(url, f"/v1/sessions/{session}/execute", code="x = 6")
        cell = post(url, f"/v1/sessions/{session}/execute", code="x * 7").json()
        assert (cell["result"], cell["snapshot"]) == ("42", level == "full")


def test_an_open_loopback_needs_no_key() -> None:
    with running("--open-loopback") as (_, url):
        answer = httpx.post(f"{url}/run_code", json={"code": "print(3)", "language": "python"})
        assert answer.json()["run_result"]["stdout"] == "3\n"

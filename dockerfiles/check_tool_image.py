"""Build the tool image, run it hardened, and attack it: `make docker-test`.

    python dockerfiles/check_tool_image.py [--base IMAGE] [--pip-conf FILE] [--ca FILE] [--keep]

An engine that answers is used; otherwise one is started on a private socket and ended afterwards
(root only). Exit status 0: every check passed; 1: one failed; 77: no engine is to be had. It needs
the repository's environment, from which the expected answers come.
"""

import argparse
import contextlib
import json
import os
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
THREATS = REPOSITORY / "tests/services/tool/sandbox"
IMAGE = "openrlhf-alp/tool:check"
MAX_IMAGE_BYTES = 400_000_000
MAX_SLOWDOWN = 1.3
START_S = 180.0
NO_ENGINE = 77
NUM_CALLS = 300

HARDENED = [
    *("--init", "--read-only", "--user", "1000:1000", "--cap-drop", "ALL", "--network", "host"),
    *("--security-opt", "no-new-privileges", "--security-opt", "systempaths=unconfined"),
    *("--security-opt", f"seccomp={REPOSITORY / 'dockerfiles/seccomp-tool.json'}"),
    *("--tmpfs", "/tmp:size=256m,mode=1777", "--tmpfs", "/var/tmp:size=64m,mode=1777"),
    *("--memory", "4g", "--pids-limit", "4096"),
]
"""As README.md tells, but for the network: a private engine has no bridge."""


class CheckError(Exception):
    """A check failed; the message says which."""


def main() -> int:
    """Run every check; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python dockerfiles/check_tool_image.py", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--base", help="base image (default: the Dockerfile's)")
    parser.add_argument("--pip-conf", type=Path, help="pip's configuration for the build")
    parser.add_argument("--ca", type=Path, help="certificates for the build's downloads")
    parser.add_argument("--keep", action="store_true", help="keep the image")
    arguments = parser.parse_args()
    try:
        with contextlib.ExitStack() as stack:
            if not engine_answers():
                stack.enter_context(private_engine())
            check(arguments)
    except CheckError as error:
        print(f"docker-test: FAILED: {error}", file=sys.stderr)
        return 1
    except FileNotFoundError as error:
        print(f"docker-test: skipped, no engine is to be had: {error}", file=sys.stderr)
        return NO_ENGINE
    print("docker-test: every check passed")
    return 0


def docker(*arguments: object, timeout_s: float = 1800.0) -> str:
    """Run the docker client; return what it prints."""
    command = ["docker", *map(str, arguments)]
    environment = {**os.environ, "DOCKER_BUILDKIT": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_s, env=environment, check=False
    )
    if done.returncode != 0:
        raise CheckError(f"{' '.join(command[:4])} ...: {done.stderr[-2000:]}")
    return done.stdout


def engine_answers() -> bool:
    try:
        docker("version", "--format", "{{.Server.Version}}", timeout_s=30)
    except CheckError:
        return False
    return True


@contextlib.contextmanager
def private_engine() -> Iterator[None]:
    """An engine of our own, with its data in a temporary folder; gone afterwards."""
    if shutil.which("dockerd") is None or os.geteuid() != 0:
        raise FileNotFoundError("none answers, and one can be started by root with dockerd only")
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
            os.environ.pop("DOCKER_HOST")
            if before is not None:
                os.environ["DOCKER_HOST"] = before


def check(arguments: argparse.Namespace) -> None:
    """Build, inspect, serve and attack; remove what was made."""
    build(arguments)
    try:
        check_image()
        check_threats()
        check_service()
    finally:
        if not arguments.keep:
            docker("image", "rm", "--force", IMAGE)


def build(arguments: argparse.Namespace) -> None:
    print("docker-test: build", flush=True)
    options = ["--network", "host", "--file", REPOSITORY / "dockerfiles/tool.Dockerfile"]
    if arguments.base:
        options += ["--build-arg", f"BASE={arguments.base}"]
    for name, path in (("pip", arguments.pip_conf), ("ca", arguments.ca)):
        if path:
            options += ["--secret", f"id={name},src={path}"]
    docker("build", "--quiet", *options, "--tag", IMAGE, REPOSITORY)


def check_image() -> None:
    """Size, user, health check, labels, and no secret in the history."""
    (image,) = json.loads(docker("image", "inspect", IMAGE))
    size, config = image["Size"], image["Config"]
    print(f"docker-test: image of {size / 1e6:.0f} MB (at most {MAX_IMAGE_BYTES / 1e6:.0f})")
    require(size <= MAX_IMAGE_BYTES, f"the image has {size} bytes")
    require(config["User"] == "1000:1000", f"it runs as {config['User'] or 'root'}")
    require("probe.py" in str(config["Healthcheck"]), "it has no health check")
    require("org.opencontainers.image.version" in config["Labels"], "it has no labels")
    history = docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", IMAGE)
    require("API_KEY" not in history + str(config["Env"]), "a key is in its history")


def check_service() -> None:
    """It reaches level full, becomes healthy, and answers nearly as fast as without a container."""
    load = os.getloadavg()[0]
    busy = load > (os.cpu_count() or 1)
    key = secrets.token_hex(16)
    variables = {"HOST": "127.0.0.1", "PORT": "8090", "API_KEY": key, "MIN_ISOLATION": "full"}
    given = {f"OPENRLHF_ALP_TOOL_{name}": value for name, value in variables.items()}
    environment = [option for item in given.items() for option in ("--env", "=".join(item))]
    container = docker("run", "--detach", *HARDENED, *environment, IMAGE).strip()
    try:
        wait(lambda: ready("http://127.0.0.1:8090"), "the tool service", container)
        wait(lambda: health(container) == "healthy", "its health check", container)
        report = call("http://127.0.0.1:8090/v1/isolation", key)
        print(f"docker-test: level {report['level']}, layers:", end=" ")
        print(", ".join(name for name, layer in report["layers"].items() if layer["active"]))
        require(report["level"] == "full", f"level {report['level']}")
        with outside(key) as url:
            inside_ms, outside_ms = quick_ms(["http://127.0.0.1:8090", url], key)
    finally:
        docker("rm", "--force", container)
    ratio = inside_ms / outside_ms
    print(f"docker-test: print(1+1) {inside_ms:.1f} ms, {ratio:.2f} times that of the same outside")
    if busy:
        # The scheduler gives a container the share of one process, however many others there are.
        print(f"docker-test: speed is not judged: load {load:.0f} on {os.cpu_count()} cores")
        return
    require(ratio <= MAX_SLOWDOWN, f"{ratio:.2f} times slower than outside")


@contextlib.contextmanager
def outside(key: str) -> Iterator[str]:
    """The same service without a container."""
    with tempfile.TemporaryDirectory() as folder:
        url_file = Path(folder, "url")
        command = [sys.executable, "-m", "services.tool", "--port", "0", "--url-file", url_file]
        environment = {**os.environ, "OPENRLHF_ALP_TOOL_API_KEY": key}
        quiet = subprocess.DEVNULL
        service = subprocess.Popen(
            command, env=environment, cwd=REPOSITORY, stdout=quiet, stderr=quiet
        )
        try:
            wait(url_file.exists, "the tool service outside")
            yield url_file.read_text().strip()
        finally:
            service.terminate()
            service.wait(START_S)


def check_threats() -> None:
    """Run the threat list inside the container; compare with the answers that are right."""
    print("docker-test: the threat list at level full, inside", flush=True)
    volume = ["--volume", f"{THREATS}:/threats:ro", "--entrypoint", "python"]
    printed = docker("run", "--rm", *HARDENED, *volume, IMAGE, "/threats/run_threats.py", "full")
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    answers = {line["row"]: line for line in lines}
    sys.path[:0] = [str(THREATS), str(REPOSITORY)]
    from tool_threats import THREATS as threats

    wanted = [threat for threat in threats if "full" in threat.levels]
    wrong = [threat.row for threat in wanted if not is_right(threat, answers.get(threat.row))]
    for row in wrong:
        print(f"docker-test: {json.dumps(answers.get(row))[:500]}")
    summary = answers["summary"]
    print(f"docker-test: {len(wanted)} threats, {len(wrong)} not answered as they must be")
    require(not wrong, f"threats {', '.join(wrong)}")
    require(summary["after"] == summary["idle"], f"something was left: {summary}")


def is_right(threat: Any, answer: dict[str, Any] | None) -> bool:
    """Whether a threat got the answer that is right."""
    if answer is None or answer["status"] not in threat.expect:
        return False
    if threat.signal is not None and answer["signal"] != threat.signal:
        return False
    if threat.errors and answer["status"] == "error":
        return answer["error"]["type"] in threat.errors
    if threat.says is not None and answer["status"] in ("ok", "timeout", "crashed"):
        return threat.says in answer["stdout"]
    return True


def quick_ms(urls: Sequence[str], key: str) -> list[float]:
    """Time of a small program over HTTP at each service that nine of ten calls exceed.

    The services take turns, and the quickest tenth is taken: a container is scheduled as one group,
    so on a busy machine its median tells of the other work.
    """
    program = {"code": "print(1+1)"}
    times: list[list[float]] = [[] for _ in urls]
    for _ in range(NUM_CALLS):
        for url, taken in zip(urls, times, strict=True):
            started_s = time.perf_counter()
            answer = call(f"{url}/v1/execute", key, program)
            taken.append(1000 * (time.perf_counter() - started_s))
            require(answer["stdout"] == "2\n", f"print(1+1) was answered {answer}")
    return [statistics.quantiles(taken, n=10)[0] for taken in times]


def call(url: str, key: str, body: object = None) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as reply:
        answer: dict[str, Any] = json.load(reply)
    return answer


def ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def health(container: str) -> str:
    return docker("inspect", "--format", "{{.State.Health.Status}}", container).strip()


def wait(holds: Any, what: str, container: str | None = None) -> None:
    deadline = time.monotonic() + START_S
    while not holds():
        if time.monotonic() > deadline:
            log = "" if container is None else docker("logs", container)
            raise CheckError(f"{what} did not answer within {START_S:.0f} s. {log}")
        time.sleep(0.5)


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise CheckError(otherwise)


if __name__ == "__main__":
    sys.exit(main())

"""The image of the tool service: inspected, attacked, and compared with the service outside."""

import contextlib
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from check_image import check_health, check_image, size_of
from engine import REPOSITORY, START_S, docker, require, wait

THREATS = REPOSITORY / "tests/services/tool/sandbox"
IMAGE = "openrlhf-alp/tool:check"
MAX_IMAGE_BYTES = 400_000_000
MAX_SLOWDOWN = 1.3
NUM_CALLS = 300
CPU_ROOTS = (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup"))
"""Where CPU groups are made: version 1 of cgroups, and version 2."""

HARDENED = [
    *("--init", "--read-only", "--user", "1000:1000", "--cap-drop", "ALL", "--network", "host"),
    *("--security-opt", "no-new-privileges", "--security-opt", "systempaths=unconfined"),
    *("--security-opt", f"seccomp={REPOSITORY / 'dockerfiles/seccomp-tool.json'}"),
    *("--tmpfs", "/tmp:size=256m,mode=1777", "--tmpfs", "/var/tmp:size=64m,mode=1777"),
    *("--memory", "4g", "--pids-limit", "4096"),
]
"""As README.md tells, but for the network: a private engine has no bridge."""


def check_tool_image() -> None:
    """Inspect, attack and serve the image IMAGE."""
    size = size_of(IMAGE)
    print(f"docker-test: image of {size / 1e6:.0f} MB (at most {MAX_IMAGE_BYTES / 1e6:.0f})")
    require(size <= MAX_IMAGE_BYTES, f"the image has {size} bytes")
    check_health(IMAGE)
    check_image(IMAGE, has={"numpy", "openrlhf-alp"}, lacks=frozenset({"torch", "pip"}))
    check_threats()
    check_service()


def check_service() -> None:
    """It reaches level full, becomes healthy, and answers nearly as fast as without a container."""
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
        with cpu_group() as group, outside(key, group) as url:
            inside_ms, outside_ms = quick_ms(["http://127.0.0.1:8090", url], key)
    finally:
        docker("rm", "--force", container)
    ratio = inside_ms / outside_ms
    print(f"docker-test: print(1+1) {inside_ms:.1f} ms, {ratio:.2f} times that of the same outside")
    load = os.getloadavg()[0]
    if group is None and load > (os.cpu_count() or 1):
        print(f"docker-test: speed is not judged: load {load:.0f} and no CPU group for the other")
        return
    require(ratio <= MAX_SLOWDOWN, f"{ratio:.2f} times slower than outside")


@contextlib.contextmanager
def cpu_group() -> Iterator[Path | None]:
    """A CPU group for the service outside, or None where none can be made.

    The scheduler shares a busy machine between groups, and a container is one: without a group of
    its own, each process of the service outside would count as much as the whole container.
    """
    roots = [root for root in CPU_ROOTS if os.access(root / "cgroup.procs", os.W_OK)]
    if not roots:
        yield None
        return
    group = roots[0] / f"docker-test-{os.getpid()}"
    group.mkdir()
    try:
        yield group
    finally:
        wait(lambda: not (group / "cgroup.procs").read_text(), "the end of the service outside")
        group.rmdir()


@contextlib.contextmanager
def outside(key: str, group: Path | None) -> Iterator[str]:
    """The same service without a container, in a CPU group."""

    def join() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    with tempfile.TemporaryDirectory() as folder:
        url_file = Path(folder, "url")
        command = [sys.executable, "-m", "services.tool", "--port", "0", "--url-file", url_file]
        environment = {**os.environ, "OPENRLHF_ALP_TOOL_API_KEY": key}
        quiet = subprocess.DEVNULL
        service = subprocess.Popen(
            command, env=environment, cwd=REPOSITORY, stdout=quiet, stderr=quiet, preexec_fn=join
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

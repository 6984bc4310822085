"""Tell the truth about the sandbox: try every forbidden thing once at start and report what
happened.

A layer is active only if each of its canaries, small programs run like any snippet, was blocked in
this very run. Nothing is concluded from configuration. The strongest level whose layers are all
active is used; below `min_isolation` the service does not start.
"""

import datetime
import os
import platform
import secrets
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from services.tool.sandbox.engine import Sandbox
from services.tool.sandbox.execution import Job, Limits
from services.tool.sandbox.plan import STRENGTH, Level
from services.tool.sandbox.verdict import Outcome, Status
from services.tool.schemas import IsolationReport, LayerReport
from services.tool.settings import Settings

REQUIRED = {
    Level.FULL: ("process", "rlimits", "seccomp", "landlock", "namespaces", "private_files"),
    Level.UID: ("process", "rlimits", "seccomp", "landlock", "user"),
    Level.BASIC: ("process", "rlimits", "seccomp", "landlock", "no_fork"),
    Level.NONE: (),
}
"""Layers without which a level does not count as reached."""

FIXES = {
    "process": "report this: it needs nothing from the system",
    "rlimits": "raise the hard limits of the service (ulimit -H) or lower what is configured",
    "seccomp": "a kernel with CONFIG_SECCOMP_FILTER; apt-get install libseccomp2",
    "landlock": "Linux 6.12 or later with landlock in the lsm= list (signal scopes)",
    "namespaces": "allow user namespaces: sysctl user.max_user_namespaces, "
    "kernel.apparmor_restrict_unprivileged_userns=0; in Docker a seccomp profile with clone, "
    "unshare, setns, mount, umount2, pivot_root and chroot",
    "private_files": "as for namespaces",
    "user": "run the service as root with CAP_SETUID, CAP_SETGID and CAP_KILL",
    "no_fork": "as for seccomp",
    "memory_watchdog": "a mountable /proc in the sandbox's pid namespace (Docker masks it)",
    "cgroup": "not used by this version; the watchdog and RLIMIT_DATA stand in for it",
}
_LIMITS = Limits(
    wall_s=5.0, cpu_s=5, memory_bytes=128 << 20, output_bytes=1 << 16, fetch_bytes=1 << 16
)
_BLOCKED = "blocked\n"


class IsolationError(RuntimeError):
    """The required level is not reached. The message is a table of what is missing and how to get
    it.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """A program that tries one forbidden thing, prints `blocked` or is stopped with `status`."""

    layer: str
    name: str
    code: str
    status: Status = Status.OK

    def blocked(self, outcome: Outcome) -> bool:
        if outcome.status is not self.status:
            return False
        return self.status is not Status.OK or outcome.stdout == _BLOCKED


def _attempt(body: str, errors: str = "OSError") -> str:
    """A program that runs `body` and prints whether one of `errors` stopped it."""
    indented = "\n".join(f"    {line}" for line in body.splitlines())
    return f"try:\n{indented}\nexcept {errors}:\n    print('blocked')\nelse:\n    print('OPEN')\n"


def _system_call(numbers: dict[str, int], *arguments: int) -> str:
    number = numbers.get(platform.machine())
    call = ", ".join(str(argument) for argument in (number, *arguments))
    return (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        f"failed = libc.syscall({call}) == -1 and ctypes.get_errno() in (1, 38)\n"
        "print('blocked' if failed else 'OPEN')\n"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Bait:
    """Things outside of the sandbox that the canaries try to reach."""

    secret: str
    file: str
    port: int
    abstract: str
    pid: int
    shared: str


@asynccontextmanager
async def laid_out_bait() -> AsyncIterator[Bait]:
    """A world-readable file, a TCP listener, an abstract socket and a secret in our environment."""
    name = "TOOL_SERVICE_CANARY_" + secrets.token_hex(4)
    abstract = "\0" + name
    with (
        tempfile.TemporaryDirectory(prefix="tool-canary-", dir="/var/tmp") as folder,
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as unix,
    ):
        unix.bind(abstract)
        unix.listen()
        os.chmod(folder, 0o777)
        path = Path(folder) / "bait"
        path.write_text("bait")
        path.chmod(0o666)
        os.environ[name] = "secret"
        try:
            yield Bait(
                secret=name,
                file=str(path),
                port=tcp.getsockname()[1],
                abstract=abstract,
                pid=os.getpid(),
                shared=folder,
            )
        finally:
            del os.environ[name]


def canaries(bait: Bait) -> list[Canary]:
    """Every forbidden thing that is tried, with the layer that is to stop it."""
    show = "print('blocked' if {} else 'OPEN')"
    many = "import os\nfds = [os.open('/dev/null', 0) for _ in range(100_000)]"
    threads = (
        "import threading\nstop = threading.Event()\n"
        "for _ in range(3000): threading.Thread(target=stop.wait, daemon=True).start()"
    )
    big = "open('big', 'wb').truncate(1 << 40)"
    tcp = f"import socket\nsocket.create_connection(('127.0.0.1', {bait.port}), 2)"
    unix = f"import socket\nsocket.socket(socket.AF_UNIX).connect({bait.abstract!r})"
    io_uring = {"x86_64": 425, "aarch64": 425}
    keyctl = {"x86_64": 250, "aarch64": 219}
    ptrace = {"x86_64": 101, "aarch64": 117}
    fork = "import os\npid = os.fork()\nif pid == 0: os._exit(0)\nos.waitpid(pid, 0)"
    ours = "import os, sys\n" + show.format(f"os.getuid() not in (0, {os.getuid()})")
    tree = show.format("os.getppid() == 0 and os.getpid() < 10 and not os.path.exists('/proc/1')")
    hidden = show.format(f"not os.path.exists({bait.shared!r})")
    return [
        Canary(
            layer="process",
            name="environment",
            code="import os\n" + show.format(f"{bait.secret!r} not in os.environ"),
        ),
        Canary(layer="rlimits", name="descriptors", code=_attempt(many)),
        Canary(layer="rlimits", name="threads", code=_attempt(threads, "RuntimeError")),
        Canary(layer="rlimits", name="memory", code=_attempt("b'x' * (1 << 31)", "MemoryError")),
        Canary(layer="rlimits", name="file size", code=_attempt(big)),
        Canary(layer="seccomp", name="io_uring", code=_system_call(io_uring, 1, 0)),
        Canary(layer="seccomp", name="keyctl", code=_system_call(keyctl, 0, -3, 0)),
        Canary(layer="seccomp", name="ptrace", code=_system_call(ptrace, 0, 0, 0, 0)),
        Canary(layer="seccomp", name="tcp", code=_attempt(tcp)),
        Canary(layer="seccomp", name="abstract socket", code=_attempt(unix)),
        Canary(
            layer="seccomp",
            name="program",
            code=_attempt("import os\nos.execv('/bin/true', ['t'])"),
        ),
        Canary(layer="landlock", name="read outside", code=_attempt(f"open({bait.file!r}).read()")),
        Canary(layer="landlock", name="write outside", code=_attempt(f"open({bait.file!r}, 'a')")),
        Canary(
            layer="landlock",
            name="signal outside",
            code=_attempt(f"import os\nos.kill({bait.pid}, 0)"),
        ),
        Canary(layer="namespaces", name="process tree", code="import os\n" + tree),
        Canary(layer="private_files", name="hidden folder", code="import os\n" + hidden),
        Canary(
            layer="private_files",
            name="leftovers",
            code="import os\nold = os.path.exists('/tmp/left')\nopen('/tmp/left', 'w')\n"
            + show.format("not old"),
        ),
        Canary(layer="user", name="own user id", code=ours),
        Canary(layer="no_fork", name="fork", code=_attempt(fork)),
        Canary(
            layer="memory_watchdog", name="sum", code=_MEMORY_OF_MANY, status=Status.MEMORY_LIMIT
        ),
    ]


_MEMORY_OF_MANY = """
import mmap, time
blocks = []
for _ in range(64):
    block = mmap.mmap(-1, 16 << 20, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    block.write(b"x" * (16 << 20))
    blocks.append(block)
    time.sleep(0.02)
"""


async def try_out(sandbox: Sandbox) -> dict[str, list[str]]:
    """Run every canary. Returns, per layer, the names of those that were NOT blocked."""
    open_doors: dict[str, list[str]] = {}
    async with laid_out_bait() as bait:
        for canary in canaries(bait):
            doors = open_doors.setdefault(canary.layer, [])
            runs = 2 if canary.name == "leftovers" else 1
            for _ in range(runs):
                outcome = await sandbox.run(Job(code=canary.code), _LIMITS)
            if not canary.blocked(outcome):
                doors.append(f"{canary.name} ({outcome.status.value})")
    return open_doors


async def establish(settings: Settings) -> tuple[Sandbox, IsolationReport]:
    """Start the sandbox at the strongest level that its canaries confirm.

    Raises:
        IsolationError: no level at or above `min_isolation` (or the one asked for) is reached.
    """
    wanted = [settings.isolation] if settings.isolation else [Level.FULL, Level.UID, Level.BASIC]
    tried: dict[Level, str] = {}
    for level in wanted:
        if STRENGTH[level] < STRENGTH[settings.min_isolation]:
            tried[level] = f"below --min-isolation {settings.min_isolation.value}"
            continue
        if level is Level.UID and os.geteuid() != 0:
            tried[level] = "not root"
            continue
        if level is Level.BASIC and os.geteuid() == 0:
            tried[level] = "root uses uid instead"
            continue
        sandbox = Sandbox(replace(settings.sandbox, level=level))
        try:
            await sandbox.start()
            report = await report_on(sandbox, settings)
        except RuntimeError as error:
            tried[level] = str(error)
            continue
        missing = [name for name in REQUIRED[level] if not report.layers[name].active]
        if not missing:
            return sandbox, report
        await sandbox.stop()
        tried[level] = "; ".join(f"{name}: {report.layers[name].detail}" for name in missing)
    raise IsolationError(_table(settings, tried))


async def report_on(sandbox: Sandbox, settings: Settings) -> IsolationReport:
    """Run the canaries against a started sandbox and describe each layer."""
    level = sandbox.config.level
    open_doors = await try_out(sandbox)
    layers = {}
    for name in FIXES:
        doors = open_doors.get(name)
        active = doors == []
        detail = "no canary" if doors is None else "every canary was blocked"
        if doors:
            detail = "not blocked: " + ", ".join(doors)
        required = name in REQUIRED[level]
        fix = "" if active else FIXES[name]
        layers[name] = LayerReport(active=active, required=required, detail=detail, fix=fix)
    async with laid_out_bait() as bait:
        total = len(canaries(bait))
    failed = sum(len(doors) for doors in open_doors.values())
    return IsolationReport(
        level=level.value,
        requested=settings.isolation.value if settings.isolation else "strongest",
        layers=layers,
        canaries_passed=total - failed,
        canaries=total,
        kernel=platform.release(),
        checked_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _table(settings: Settings, tried: dict[Level, str]) -> str:
    lines = [
        f"The sandbox does not reach the level required ({settings.min_isolation.value}).",
        "",
        f"{'level':<8} why not",
        *(f"{level.value:<8} {reason}" for level, reason in tried.items()),
        "",
        f"{'layer':<16} how to get it",
        *(f"{name:<16} {fix}" for name, fix in FIXES.items()),
    ]
    return "\n".join(lines)

"""The canaries: programs that try each forbidden thing, and the bait they reach for."""

import os
import platform
import secrets
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from services.tool.sandbox.host.verdict import Outcome, Status

_BLOCKED = "blocked\n"
_MEMORY_OF_MANY = """
import mmap, time
blocks = []
for _ in range(64):
    block = mmap.mmap(-1, 16 << 20, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    block.write(b"x" * (16 << 20))
    blocks.append(block)
    time.sleep(0.02)
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


def canaries(bait: Bait, memory_layer: str) -> list[Canary]:
    """Every forbidden thing that is tried, with the layer that is to stop it.

    Args:
        memory_layer: who counts the memory of all processes, `cgroup` or `memory_watchdog`; the
            other one is not asked.
    """
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
        Canary(layer=memory_layer, name="sum", code=_MEMORY_OF_MANY, status=Status.MEMORY_LIMIT),
    ]

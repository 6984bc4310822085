"""The canaries: programs that try one forbidden thing each, and the targets they try to reach."""

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
        """Whether the program was stopped as it should be."""
        if outcome.status is not self.status:
            return False
        return self.status is not Status.OK or outcome.stdout == _BLOCKED


def _attempt(body: str, errors: str = "OSError") -> str:
    """A program that runs `body` and prints whether one of `errors` stopped it."""
    indented = "\n".join(f"    {line}" for line in body.splitlines())
    return f"try:\n{indented}\nexcept {errors}:\n    print('blocked')\nelse:\n    print('OPEN')\n"


def _verdict(condition: str) -> str:
    """A line that prints whether `condition` shows that something was stopped."""
    return f"print('blocked' if {condition} else 'OPEN')\n"


def _system_call(x86_64: int, aarch64: int, *arguments: int) -> str:
    """A program that makes one system call and expects EPERM or ENOSYS, which a filter answers."""
    number = {"x86_64": x86_64, "aarch64": aarch64}.get(platform.machine())
    call = ", ".join(str(argument) for argument in (number, *arguments))
    return (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        f"failed = libc.syscall({call}) == -1 and ctypes.get_errno() in (1, 38)\n"
        + _verdict("failed")
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Things outside of the sandbox that the canaries try to reach."""

    secret: str
    """Name of an environment variable of this process."""
    folder: str
    """A folder that everybody may write to."""
    file: str
    """A file in it that everybody may read and write."""
    port: int
    """Of a TCP listener on loopback."""
    abstract: str
    """Address of a listening abstract Unix socket."""


@asynccontextmanager
async def outside_targets() -> AsyncIterator[Targets]:
    """Set up every target, with no protection of its own: only the sandbox keeps programs away."""
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
        path = Path(folder) / "target"
        path.write_text("target")
        path.chmod(0o666)
        os.environ[name] = "secret"
        try:
            yield Targets(
                secret=name,
                folder=folder,
                file=str(path),
                port=tcp.getsockname()[1],
                abstract=abstract,
            )
        finally:
            del os.environ[name]


def canaries(targets: Targets, memory_layer: str) -> list[Canary]:
    """Every forbidden thing that is tried, with the layer that is to stop it.

    Args:
        memory_layer: who counts the memory of all processes, `cgroup` or `memory_watchdog`; the
            other one is not tested.
    """
    programs = [*_too_much(), *_system_calls(targets), *_out_of_the_box(targets)]
    summed = Canary(
        layer=memory_layer, name="sum", code=_MEMORY_OF_MANY, status=Status.MEMORY_LIMIT
    )
    return [*(Canary(layer=layer, name=name, code=code) for layer, name, code in programs), summed]


def _too_much() -> list[tuple[str, str, str]]:
    """Layer, name and code of the programs that ask for more than their share."""
    many = "import os\nfds = [os.open('/dev/null', 0) for _ in range(100_000)]"
    threads = (
        "import threading\nstop = threading.Event()\n"
        "for _ in range(3000): threading.Thread(target=stop.wait, daemon=True).start()"
    )
    fork = "import os\npid = os.fork()\nif pid == 0: os._exit(0)\nos.waitpid(pid, 0)"
    return [
        ("rlimits", "descriptors", _attempt(many)),
        ("rlimits", "threads", _attempt(threads, "RuntimeError")),
        ("rlimits", "memory", _attempt("b'x' * (1 << 31)", "MemoryError")),
        ("rlimits", "file size", _attempt("open('big', 'wb').truncate(1 << 40)")),
        ("no_fork", "fork", _attempt(fork)),
    ]


def _system_calls(targets: Targets) -> list[tuple[str, str, str]]:
    """Layer, name and code of the programs that make system calls of the filter's list."""
    tcp = f"import socket\nsocket.create_connection(('127.0.0.1', {targets.port}), 2)"
    unix = f"import socket\nsocket.socket(socket.AF_UNIX).connect({targets.abstract!r})"
    return [
        ("seccomp", "io_uring", _system_call(425, 425, 1, 0)),
        ("seccomp", "keyctl", _system_call(250, 219, 0, -3, 0)),
        ("seccomp", "ptrace", _system_call(101, 117, 0, 0, 0, 0)),
        ("seccomp", "tcp", _attempt(tcp)),
        ("seccomp", "abstract socket", _attempt(unix)),
        ("seccomp", "program", _attempt("import os\nos.execv('/bin/true', ['t'])")),
    ]


def _out_of_the_box(targets: Targets) -> list[tuple[str, str, str]]:
    """Layer, name and code of the programs that look for what is not theirs."""
    secret = _verdict(f"{targets.secret!r} not in os.environ")
    tree = _verdict("os.getppid() == 0 and os.getpid() < 10 and not os.path.exists('/proc/1')")
    hidden = _verdict(f"not os.path.exists({targets.folder!r})")
    leftovers = "old = os.path.exists('/tmp/left')\nopen('/tmp/left', 'w')\n" + _verdict("not old")
    user = _verdict(f"os.getuid() not in (0, {os.getuid()})")
    return [
        ("process", "environment", "import os\n" + secret),
        ("landlock", "read outside", _attempt(f"open({targets.file!r}).read()")),
        ("landlock", "write outside", _attempt(f"open({targets.file!r}, 'a')")),
        ("landlock", "signal outside", _attempt(f"import os\nos.kill({os.getpid()}, 0)")),
        ("namespaces", "process tree", "import os\n" + tree),
        ("private_files", "hidden folder", "import os\n" + hidden),
        ("private_files", "leftovers", "import os\n" + leftovers),
        ("user", "own user id", "import os\n" + user),
    ]

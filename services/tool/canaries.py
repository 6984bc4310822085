"""The canaries: programs that try one forbidden thing each, run like any other program."""

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


@asynccontextmanager
async def canaries(memory_layer: str, *, one_user: bool) -> AsyncIterator[list[Canary]]:
    """Every forbidden thing that is tried, with the layer that is to stop it.

    While inside, there are targets outside of the sandbox to reach for, with no protection of their
    own: a secret in our environment, files open to everybody, a TCP and an abstract listener.

    Args:
        memory_layer: who counts the memory of all processes, `cgroup` or `memory_watchdog`; the
            other one is not tested.
        one_user: whether programs have the user id of the service. Elsewhere the canaries of
            `same_user` would tell nothing: they would be refused, or find the program's own files.
    """
    name = "TOOL_SERVICE_CANARY_" + secrets.token_hex(4)
    with (
        tempfile.TemporaryDirectory(prefix="tool-canary-", dir="/var/tmp") as folder,
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as unix,
    ):
        unix.bind("\0" + name)
        unix.listen()
        os.chmod(folder, 0o777)
        file = Path(folder) / "target"
        file.write_text("target")
        file.chmod(0o666)
        programs = [*_too_much(), *_system_calls(tcp.getsockname()[1], "\0" + name)]
        programs += _out_of_the_box(name, file)
        programs += _same_user() if one_user else []
        summed = Canary(
            layer=memory_layer, name="sum", code=_MEMORY_OF_MANY, status=Status.MEMORY_LIMIT
        )
        os.environ[name] = "secret"
        try:
            yield [*(Canary(layer=p[0], name=p[1], code=p[2]) for p in programs), summed]
        finally:
            del os.environ[name]


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


def _same_user() -> list[tuple[str, str, str]]:
    """Layer, name and code of the programs that reach for what their user id alone would allow."""
    names = "import os, resource\nparent = os.getppid() or 1\n"
    bodies = {
        "limits of another": "resource.prlimit(parent, resource.RLIMIT_CORE, (0, 0))",
        "priority of the user": "os.setpriority(os.PRIO_USER, os.getuid(), 1)",
        "cores of another": "os.sched_setaffinity(parent, os.sched_getaffinity(0))",
        "scheduler of another": "os.sched_setscheduler(parent, os.SCHED_BATCH, os.sched_param(0))",
        "mode of a file": "os.chmod(os.__file__, 0o644)",
        "mode by descriptor": "os.fchmod(os.open(os.__file__, os.O_RDONLY), 0o644)",
        "owner of a file": "os.chown(os.__file__, os.getuid(), os.getgid())",
        "times of a file": "os.utime(os.__file__)",
        "attributes of a file": "os.setxattr(os.__file__, 'user.canary', b'')",
    }
    programs = {name: names + _attempt(body) for name, body in bodies.items()}
    programs["input and output of the user"] = _system_call(251, 30, 3, os.getuid(), 0x4000)
    return [("same_user", name, code) for name, code in programs.items()]


def _system_calls(port: int, abstract: str) -> list[tuple[str, str, str]]:
    """Layer, name and code of the programs that make system calls of the filter's list."""
    tcp = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)"
    unix = f"import socket\nsocket.socket(socket.AF_UNIX).connect({abstract!r})"
    datagrams = "import socket\nsocket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)"
    hiding = "import ctypes\nif ctypes.CDLL(None).prctl(4, 0, 0, 0, 0): raise OSError"
    return [
        ("seccomp", "io_uring", _system_call(425, 425, 1, 0)),
        ("seccomp", "keyctl", _system_call(250, 219, 0, -3, 0)),
        ("seccomp", "ptrace", _system_call(101, 117, 0, 0, 0, 0)),
        ("seccomp", "tcp", _attempt(tcp)),
        ("seccomp", "datagram socket", _attempt(datagrams)),
        ("seccomp", "hiding", _attempt(hiding)),
        ("seccomp", "unknown call", _system_call(600, 600, 0)),
        ("seccomp", "abstract socket", _attempt(unix)),
        ("seccomp", "program", _attempt("import os\nos.execv('/bin/true', ['t'])")),
    ]


def _out_of_the_box(secret: str, file: Path) -> list[tuple[str, str, str]]:
    """Layer, name and code of the programs that look for what is not theirs."""
    environment = _verdict(f"{secret!r} not in os.environ")
    tree = _verdict("os.getppid() == 0 and os.getpid() < 10 and not os.path.exists('/proc/1')")
    hidden = _verdict(f"not os.path.exists({str(file.parent)!r})")
    leftovers = "old = os.path.exists('/tmp/left')\nopen('/tmp/left', 'w')\n" + _verdict("not old")
    user = _verdict(f"os.getuid() not in (0, {os.getuid()})")
    return [
        ("process", "environment", "import os\n" + environment),
        ("landlock", "read outside", _attempt(f"open({str(file)!r}).read()")),
        ("landlock", "write outside", _attempt(f"open({str(file)!r}, 'a')")),
        ("landlock", "signal outside", _attempt(f"import os\nos.kill({os.getpid()}, 0)")),
        ("namespaces", "process tree", "import os\n" + tree),
        ("private_files", "hidden folder", "import os\n" + hidden),
        ("private_files", "leftovers", "import os\n" + leftovers),
        ("user", "own user id", "import os\n" + user),
    ]

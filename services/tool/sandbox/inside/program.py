"""Runs a snippet inside its slot as `python main.py` would: files, streams, traceback, exit code.

All of this runs in the same process as the snippet, so nobody trusts it: the API process judges by
wait status, by clock and by the kernel's counters. The report that is written at the end only adds
a description.
"""

import ast
import atexit
import base64
import contextlib
import io
import json
import linecache
import os
import random
import resource
import site
import stat
import sys
import threading
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from services.tool.sandbox import wire
from services.tool.sandbox.inside import kernel

MAIN = "main.py"
"""File name of the snippet in tracebacks."""

_EMPTY_JOB = json.dumps({"mode": "run", "code": "0", "files": {}, "fetch": [], "seed": None})
_MESSAGE_CHARS = 2000
_CPU_GRACE_S = 2  # between SIGXCPU, which a program may handle, and SIGKILL
_BESIDE_HOME = ("/mnt/", "/tmp/")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What a slot knows about itself."""

    home: str
    """Folder in which the snippet starts."""
    baseline_bytes: int
    """What RLIMIT_DATA counts before the snippet allocates anything."""
    alone: bool
    """Whether this process can signal the slot's processes only (own pid namespace or user id)."""
    can_fork: bool
    """False at level basic: the snippet runs behind a second filter that refuses new processes."""
    no_fork_filter: bytes


def run_program(
    job: wire.Message, place: Place, report: Callable[[wire.Message], None]
) -> NoReturn:
    """Run the job's code as a program and end this process with CPython's exit code for it."""
    cpu = job["cpu_s"]
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + _CPU_GRACE_S))
    forbid_processes(place)
    owner = os.getpid()
    execution = execute(job["code"], new_main(), MAIN)
    # A child that the snippet forked returns here as well. It has none of the parent's threads to
    # wait for, and the report is the parent's.
    if os.getpid() == owner:
        threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    flush_streams()
    if os.getpid() == owner and execution.error is not None:
        report({"error": execution.error})
    # Not sys.exit: the zygote's own frames are below this one.
    os._exit(execution.exit_code)


def forbid_processes(place: Place) -> None:
    """At level basic, refuse new processes from here on."""
    if not place.can_fork:
        kernel.run([kernel.loading_seccomp(place.no_fork_filter)])


def new_main() -> dict[str, Any]:
    """Make a new `__main__` and return its namespace."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    module.__dict__["__builtins__"] = __builtins__
    return module.__dict__


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """How a piece of code ended."""

    error: dict[str, Any] | None = None
    """Type, message and line of an uncaught exception."""
    exit_code: int = 0
    value: Any = None
    """Value of the last expression; only of interactive code."""


def execute(
    code: str, namespace: dict[str, Any], name: str, *, interactive: bool = False
) -> Execution:
    """Compile and run `code` in `namespace`, printing the traceback of an uncaught exception."""
    code = code.removeprefix("\ufeff")
    # Tracebacks show the lines of a file that does not exist.
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    try:
        body, last = _compile_cell(code, name) if interactive else (_compile(code, name), None)
        exec(body, namespace)
        return Execution(value=eval(last, namespace) if last is not None else None)
    except SystemExit as error:
        return Execution(exit_code=_exit_code_of(error))
    except BaseException as error:
        code_of_interrupt = 130 if isinstance(error, KeyboardInterrupt) else 1
        return Execution(error=_describe(error, name), exit_code=code_of_interrupt)


def _exit_code_of(error: SystemExit) -> int:
    """CPython's exit code: None is 0, an int counts modulo 256, anything else is printed and 1."""
    value = error.code
    if value is None:
        return 0
    if isinstance(value, int):
        return value & 0xFF if -(2**63) <= value < 2**63 else 255
    with contextlib.suppress(BaseException):  # the value's own __str__ may raise anything
        print(value, file=sys.stderr)
    return 1


def prepare() -> None:
    """Set up what every program finds alike. The zygote calls it once: sys.std* use descriptors 0
    to 2, behind which each fork puts its own pipes."""
    sys.argv = [MAIN]
    site.setquit()
    sys.stdin = sys.__stdin__ = io.TextIOWrapper(  # type: ignore[misc]
        io.BufferedReader(io.FileIO(0, "r", closefd=False)), "utf-8", "surrogateescape"
    )
    sys.stdout = sys.__stdout__ = _writer(1, "replace")  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _writer(2, "backslashreplace")  # type: ignore[misc]


def _writer(descriptor: int, errors: str) -> io.TextIOWrapper:
    raw = io.FileIO(descriptor, "w", closefd=False)
    # Line-buffered, so that a program that is killed loses at most one line.
    return io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", errors, line_buffering=True)


def flush_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:
            continue  # the snippet closed or replaced it


def rehearse() -> None:
    """Read and run an empty job, except for its end.

    Many times in a zygote: the interpreter's caches settle, of which a child would otherwise copy
    every page that it changes. Once in a waiting slot: it then has its own copies of the memory
    that every program touches.
    """
    job = wire.decode(_EMPTY_JOB.encode())
    write_files("/", job["files"])
    execute(job["code"], new_main(), MAIN)
    flush_streams()


def rehearse_fork() -> None:
    """Do what CPython's own hooks do in every fork; for a process without threads."""
    threading._after_fork()  # type: ignore[attr-defined]
    random.seed()
    reseed(None)


def reseed(seed: int | None) -> None:
    """Seed the random generators, whose state forks share, by the request's seed or at random."""
    if seed is not None:
        random.seed(seed)  # without a seed, CPython's own fork hook has done this
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed if seed is not None else int.from_bytes(os.urandom(4), "little"))


def _split(home: str, path: str) -> tuple[str, str]:
    """Split a job's path into its top folder and the rest; /mnt and /tmp lie beside `home`."""
    for prefix in _BESIDE_HOME:
        if path.startswith(prefix):
            return os.path.dirname(home) + prefix.rstrip("/"), path.removeprefix(prefix)
    return home, path


def write_files(home: str, files: dict[str, str]) -> None:
    """Write the request's files, whose paths the API process has checked. Raises OSError."""
    for path, content in files.items():
        target = os.path.join(*_split(home, path))
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "wb") as file:
            file.write(base64.b64decode(content))


def read_file(home: str, path: str, max_bytes: int) -> bytes:
    """Read a regular file. Raises OSError, and ValueError for another kind or too large a file."""
    folder, path = _split(home, path)
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        parts = path.split("/")
        # Step by step and never through a link, which the snippet may have pointed anywhere.
        for index, part in enumerate(parts):
            last = index + 1 == len(parts)
            # Without O_NONBLOCK, opening a named pipe would wait for a writer.
            flags = os.O_RDONLY | os.O_NONBLOCK if last else os.O_PATH | os.O_DIRECTORY
            inner = os.open(part, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if status.st_size > max_bytes:
            raise ValueError(f"{status.st_size} bytes, the limit is {max_bytes}")
        with os.fdopen(os.dup(descriptor), "rb") as file:
            return file.read(max_bytes)
    finally:
        os.close(descriptor)


def _compile(code: str | ast.Module, name: str) -> types.CodeType:
    """Compile statements. Bad characters are a SyntaxError, as for `python file.py`."""
    try:
        return compile(code, name, "exec", dont_inherit=True)
    except UnicodeError:
        raise SyntaxError("source code contains a lone surrogate") from None
    except ValueError as error:
        raise SyntaxError(str(error)) from None


def _compile_cell(code: str, name: str) -> tuple[types.CodeType, types.CodeType | None]:
    """Compile to (statements, last expression or None)."""
    _compile(code, name)  # for its errors: ast.parse finds fewer
    tree = ast.parse(code, name)
    last = None
    if tree.body and isinstance(tree.body[-1], ast.Expr):
        expression = ast.Expression(tree.body.pop().value)  # type: ignore[attr-defined]
        last = compile(expression, name, "eval", dont_inherit=True)
    return _compile(tree, name), last


def _describe(error: BaseException, name: str) -> dict[str, Any]:
    """Print the traceback as CPython would and return type, message and line of the snippet."""
    # All of this may run methods of the snippet's own exception class, which may raise in turn.
    try:
        steps = traceback.extract_tb(error.__traceback__)
        lines = [step.lineno for step in steps if step.filename == name]
        line = lines[-1] if lines else getattr(error, "lineno", None)
        message = str(error)[:_MESSAGE_CHARS]
        _show(error, name)
    except BaseException as second:
        return {"type": type(error).__name__, "message": f"<{type(second).__name__}>", "line": None}
    return {"type": type(error).__name__, "message": message, "line": line}


def _show(error: BaseException, name: str) -> None:
    """Call sys.excepthook with the frames of this file cut off."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != name:
        trace = trace.tb_next
    error = error.with_traceback(trace)
    if sys.excepthook is sys.__excepthook__:
        traceback.print_exception(type(error), error, trace)
    else:
        sys.excepthook(type(error), error, trace)

"""Runs a snippet inside its slot as `python main.py` would: files, streams, traceback, exit code.

All of this runs in the same process as the snippet, so nobody trusts it: the API process judges by
wait status, by clock and by the kernel's counters. The report that is written at the end only adds
a description.
"""

import ast
import builtins
import contextlib
import ctypes
import io
import json
import linecache
import os
import random
import re
import resource
import site
import sys
import threading
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from posix import getpid  # a snippet may replace os.getpid
from typing import Any, NoReturn

from services.tool.sandbox import wire
from services.tool.sandbox.inside import files, kernel
from services.tool.sandbox.inside.snippet import ending, figures, streams
from services.tool.sandbox.plan import CPU_GRACE_S

MAIN = "main.py"
"""File name of the snippet in tracebacks."""

NICENESS = 5
"""Of untrusted code, so that what looks after it gets its turn, however many processes run."""
_USER = "user"
_EMPTY_JOB = json.dumps({"mode": "run", "code": "0", "files": {}, "fetch": [], "seed": None})
_MESSAGE_CHARS = 2000
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_AWAIT = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
_CO_COROUTINE = 0x80  # inspect.CO_COROUTINE; the module would cost every fork memory
_IPYTHON_COMMAND = re.compile(
    r"\s*(?:[\w\s,]+=)?\s*(%%?\w+|!+\s*\w*|\?+\s*[\w.]+)|\s*([\w.]+\s*\?+)\s*$"
)
_SEMICOLON = re.compile(rb"(?:[\s)\\]|#.*+)*+;")  # after brackets, which are no part of a node
_NUMPY_STATE_BYTES = 624 * 4
_numpy_state = 0
"""Address of the words of numpy's global generator. To seed it by them copies three pages, and by
numpy's function thirty. The position behind them is that of a generator just seeded."""
_loops: list[Any] = []
"""The event loop of a session's cells, once one has awaited."""


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
    os.nice(NICENESS)
    cpu = job["cpu_s"]
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + CPU_GRACE_S))
    forbid_processes(place)
    owner = getpid()
    _write_source(job["code"])
    if job["figures"]:
        figures.ask(True, place.home)
    path = f"{place.home}/{MAIN}"
    execution = execute(job["code"], new_main(__file__=path, __cached__=None), MAIN)
    # A child that the snippet forked returns here as well, and the report is the parent's.
    if getpid() == owner and execution.error is not None:
        report({"error": execution.error})
    # Not sys.exit: the zygote's own frames are below this one.
    ending.end_process(execution.exit_code, place.home)


def forbid_processes(place: Place) -> None:
    """At level basic, refuse new processes from here on."""
    if not place.can_fork:
        kernel.run([kernel.loading_seccomp(place.no_fork_filter)])


def _write_source(code: str) -> None:
    """Write main.py into the working folder, unless the request has a file of that name."""
    # Without a file object: it would cost every program ten page copies.
    try:
        descriptor = os.open(MAIN, _NEW_FILE, 0o666)
        try:
            os.write(descriptor, code.encode("utf-8", "replace"))
        finally:
            os.close(descriptor)
    except OSError:
        return  # the name is taken, or the disk is full


def new_main(**names: Any) -> dict[str, Any]:
    """Make a new `__main__` with these names besides the usual ones and return its namespace."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    module.__dict__.update(__builtins__=builtins, __annotations__={}, **names)
    return module.__dict__


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """How a piece of code ended."""

    error: dict[str, Any] | None = None
    """Type, message and line of an uncaught exception."""
    exit_code: int = 0
    value: Any = None
    """Value of the last expression; only of interactive code."""


_ENDED_WELL = Execution()


def execute(
    code: str, namespace: dict[str, Any], name: str, *, interactive: bool = False
) -> Execution:
    """Compile and run `code` in `namespace`, printing the traceback of an uncaught exception."""
    code = code.removeprefix("\ufeff")
    # Tracebacks show these lines and not those of a file, which may be changed or not exist.
    lines = _lines(code)
    linecache.cache[name] = (len(code), None, lines, name)
    try:
        if interactive:
            return Execution(value=_execute_cell(code, namespace, name))
        exec(_compile(code, name), namespace)
        return _ENDED_WELL
    except SystemExit as error:
        return Execution(exit_code=_exit_code_of(error))
    except BaseException as error:
        return _report(error, name)


def _report(error: BaseException, name: str) -> Execution:
    """Print the traceback of an uncaught exception as CPython would, and describe it."""
    # All of this may run code of the snippet: of its exception class and of its sys.excepthook.
    description = _describe(error, name)
    try:
        _show(error, name)
    except SystemExit as end:  # of sys.excepthook
        return Execution(exit_code=_exit_code_of(end))
    except BaseException as second:
        with contextlib.suppress(BaseException):  # the snippet has broken standard error
            ending.report_failed_hook(second, error, name)
    interrupted = isinstance(error, KeyboardInterrupt)
    return Execution(error=description, exit_code=130 if interrupted else 1)


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


def prepare(max_open_files: int) -> None:
    """Set up what every program finds alike. The zygote calls it once: sys.std* use descriptors 0
    to 2, behind which each fork puts its own pipes.

    Args:
        max_open_files: limit of a slot.

    Raises:
        RuntimeError: numpy keeps the state of its generator otherwise than expected.
    """
    global _numpy_state
    _numpy_state = _find_numpy_state()
    sys.argv = [MAIN]
    site.setquit()
    site.setcopyright()
    site.sethelper()
    # Below level full the slot's user id has no entry in /etc/passwd.
    os.environ.update(LOGNAME=_USER, USER=_USER)
    sys.excepthook = sys.__excepthook__ = ending.traceback_hook
    sys.unraisablehook = sys.__unraisablehook__ = ending.unraisable_hook
    threading.excepthook = threading.__excepthook__ = ending.thread_hook
    ending.prepare(max_open_files)
    sys.stdin = sys.__stdin__ = streams.reader(0, "<stdin>")  # type: ignore[misc]
    sys.stdout = sys.__stdout__ = streams.writer(  # type: ignore[misc]
        1, "<stdout>", "surrogateescape"
    )
    sys.stderr = sys.__stderr__ = streams.writer(  # type: ignore[misc]
        2, "<stderr>", "backslashreplace"
    )


def _find_numpy_state() -> int:
    """Seed numpy's global generator; returns the address of its state, without the position."""
    generator = sys.modules["numpy"].random
    generator.seed(0)
    address = int(generator.get_bit_generator().ctypes.state_address)
    if ctypes.string_at(address, _NUMPY_STATE_BYTES) != generator.get_state()[1].tobytes():
        raise RuntimeError("the state of numpy's generator is not where this version expects it")
    return address


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
    files.write_files("/", job["files"])
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
        sys.modules["numpy"].random.seed(seed)
    elif _numpy_state:
        kernel.fill_with_random_bytes(_numpy_state, _NUMPY_STATE_BYTES)


def _lines(code: str) -> list[str]:
    """Split code into lines as the compiler does; str.splitlines knows more ends of lines."""
    lines = f"{code}\n".splitlines(keepends=True)
    if "\r" in code or len(lines) != code.count("\n") + 1:
        return io.StringIO(f"{code}\n", newline=None).readlines()
    return lines  # as always: the other way costs every program ten page copies


def _compile(code: str | ast.Module, name: str, flags: int = 0) -> types.CodeType:
    """Compile statements. Bad characters are a SyntaxError, as for `python file.py`."""
    try:
        return compile(code, name, "exec", flags, dont_inherit=True)
    except UnicodeError:
        raise SyntaxError("source code contains a lone surrogate") from None
    except ValueError as error:
        raise SyntaxError(str(error)) from None


def _execute_cell(code: str, namespace: dict[str, Any], name: str) -> Any:
    """Run a cell with IPython's `await` at top level, `_`, `__`, `___` and closing semicolon.

    Returns:
        The value of its last expression; None where a semicolon follows.
    """
    body, last, silent = _compile_cell(code, name)
    parts = [body] if last is None else [body, last]
    if any(part.co_flags & _CO_COROUTINE for part in parts):
        value = _event_loop().run_until_complete(_awaiting(parts, namespace))
    else:
        value = [eval(part, namespace) for part in parts][-1]
    if silent:
        return None
    if value is not None:
        shown = vars(builtins)  # a cell's own `_` comes first
        shown.update(___=shown.get("__", ""), __=shown.get("_", ""), _=value)
    return value


async def _awaiting(parts: list[types.CodeType], namespace: dict[str, Any]) -> Any:
    value = None
    for part in parts:
        value = eval(part, namespace)
        if part.co_flags & _CO_COROUTINE:
            value = await value
    return value


def _event_loop() -> Any:
    """The loop of all cells of a session that await, so that tasks outlive their cell."""
    import asyncio  # not for the many that never await
    import selectors

    if not _loops or _loops[-1].is_closed():
        # Not epoll, whose state in the kernel a cell's process would share with its snapshot.
        _loops[:] = [asyncio.SelectorEventLoop(selectors.PollSelector())]
    return _loops[-1]


def _compile_cell(code: str, name: str) -> tuple[types.CodeType, types.CodeType | None, bool]:
    """Compile to (statements, last expression or None, whether a semicolon follows that one)."""
    try:
        _compile(code, name, _AWAIT)  # for its errors: ast.parse finds fewer
    except SyntaxError as error:
        _name_ipython_command(error, _lines(code))
        raise
    tree = ast.parse(code, name)
    if not tree.body or not isinstance(tree.body[-1], ast.Expr):
        return _compile(tree, name, _AWAIT), None, False
    statement = tree.body.pop()
    assert isinstance(statement, ast.Expr)
    silent = _has_semicolon_after(statement, code)
    last = compile(ast.Expression(statement.value), name, "eval", _AWAIT, dont_inherit=True)
    return _compile(tree, name, _AWAIT), last, silent


def _has_semicolon_after(statement: ast.Expr, code: str) -> bool:
    rest = "".join(_lines(code)[(statement.end_lineno or 0) - 1 :]).encode()
    return _SEMICOLON.match(rest[statement.end_col_offset :]) is not None


def _name_ipython_command(error: SyntaxError, lines: list[str]) -> None:
    """Have the error of a cell with a magic, shell or help command say so."""
    number = error.lineno or 0
    first = next((line for line in lines if line.strip()), "")
    candidates = [first] if first.startswith("%%") else lines[number - 1 : number]
    for line in candidates:
        found = _IPYTHON_COMMAND.match(line)
        if found:
            command = next(filter(None, found.groups()))
            error.msg = f"{command} is a command of IPython and not supported here: use Python"


def _describe(error: BaseException, name: str) -> dict[str, Any]:
    """Type, message and line in the snippet of an exception."""
    line, message = None, ""
    try:
        steps = traceback.extract_tb(error.__traceback__)
        lines = [step.lineno for step in steps if step.filename == name]
        line = lines[-1] if lines else getattr(error, "lineno", None)
        message = str(error)[:_MESSAGE_CHARS]
    except BaseException as second:
        message = f"<{type(second).__name__}>"
    return {"type": type(error).__name__, "message": message, "line": line}


def _show(error: BaseException, name: str) -> None:
    """Call sys.excepthook with the frames of this file cut off."""
    trace = ending.frames_of_snippet(error.__traceback__, name)
    error = error.with_traceback(trace)
    try:
        hook = sys.excepthook
    except AttributeError:
        print("sys.excepthook is missing", file=sys.stderr)
        hook = ending.traceback_hook
    hook(type(error), error, trace)

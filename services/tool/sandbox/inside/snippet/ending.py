"""Ends a process that ran a snippet, with what CPython does between the last line and the exit.

Threads are waited for, exit handlers run, streams are flushed, and the snippet's modules are let
go, which closes its files and runs finalisers. The interpreter itself is not taken apart: its
libraries came from the zygote, and freeing them would copy every page of them.

The hooks for exceptions that nobody catches stand in for those in C, which read source lines from
a file: these take the lines that linecache holds, and a cell has no file.

All of this is the snippet's own time: whatever it hangs in, the API process's clock ends it.
"""

import atexit
import builtins
import contextlib
import ctypes
import gc
import io
import os
import struct
import sys
import threading
import traceback
import types
import weakref
from collections.abc import Callable, Iterator
from posix import _exit  # a snippet may replace os._exit
from typing import Any, NoReturn

from services.tool.sandbox.inside.snippet import figures

_FLUSH_FAILED = 120
"""CPython's exit code when standard output could not be flushed."""
_WRITERS = (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom, io.BufferedRWPair)

_FIRST_FD = 4  # after the standard streams and the job socket
_POLLFD = struct.Struct("ihh")  # descriptor, events waited for, events seen
_polled = ctypes.create_string_buffer(0)
_num_polled = 0
_libc = ctypes.CDLL(None)
_libraries: set[str] = set()
_ctypes_users = 0
"""References to ctypes without a snippet's: only what calls C can fill C's own streams."""
_OWN_FOLDER = os.path.join(os.path.dirname(__file__), "")


def prepare(max_open_files: int) -> None:
    """Take note of the modules that are loaded: they are no snippet's. The zygote calls it once.

    Args:
        max_open_files: limit of a slot.
    """
    global _ctypes_users, _polled, _num_polled
    numbers = range(_FIRST_FD, max_open_files)
    _polled = ctypes.create_string_buffer(b"".join(_POLLFD.pack(each, 0, 0) for each in numbers))
    _num_polled = len(numbers)
    _libraries.update(sys.modules)
    _ctypes_users = sys.getrefcount(ctypes)


def rehearse() -> None:
    """Do what every end does and leave no trace, many times in a zygote: the interpreter then
    writes less into the pages of this code (program.rehearse)."""
    main = sys.modules["__main__"]
    _flush_standard()
    _is_any_open()
    list(_take_own("/nowhere"))
    sys.modules["__main__"] = main
    _flush([sys.stdout, sys.stderr])


def end_process(exit_code: int, home: str) -> NoReturn:
    """Finalise and exit with `exit_code`, or with 120 when standard output cannot be flushed.

    Args:
        home: working folder of the snippet; modules from its box are the snippet's own.
    """
    try:
        if threading._shutdown_locks or threading._threading_atexits:  # type: ignore[attr-defined]
            # Not without a thread to wait for: even then it copies 19 pages.
            _attempt(threading._shutdown)  # type: ignore[attr-defined]
        if figures.asked:
            _attempt(figures.save_open)  # before matplotlib's exit handler, which closes them
        atexit._run_exitfuncs()
        if not _flush_standard():
            exit_code = _FLUSH_FAILED
        # Before files in cycles are closed, which may happen in the wrong order.
        _flush(_writers())
        prints_in_c = sys.getrefcount(ctypes) > _ctypes_users
        _let_go(home[: home.rindex("/")])
        _flush([sys.stdout, sys.stderr])
        if prints_in_c:
            _libc.fflush(None)
    finally:
        _exit(exit_code)


def _writers() -> list[Any]:
    """Whatever buffers output and is reachable: text first, which goes through a binary writer.

    Empty at once when no descriptor is open: to look at every object copies 40 pages.
    """
    if not _is_any_open():
        return []
    found = [item for item in gc.get_objects() if issubclass(type(item), _WRITERS)]
    return sorted(found, key=lambda writer: not isinstance(writer, io.TextIOWrapper))


def _is_any_open() -> bool:
    """Whether the snippet may have a descriptor besides those that every program has."""
    # The C function, because a poll object would cost every program ten page copies. Closed ones
    # are counted; it fails when the snippet has lowered its limit.
    return bool(_libc.poll(_polled, _num_polled, 0) != _num_polled)


def _flush(writers: list[Any]) -> None:
    for writer in writers:
        try:
            writer.flush()
        except BaseException:
            continue  # closed, replaced or broken


def _attempt(step: Callable[[], Any]) -> None:
    try:
        step()
    except BaseException as error:
        _report_ignored(error, step)


def _report_ignored(error: BaseException, source: Any) -> None:
    with contextlib.suppress(BaseException):
        facts: Any = types.SimpleNamespace(
            exc_type=type(error),
            exc_value=error,
            exc_traceback=error.__traceback__,
            err_msg=None,
            object=source,
        )
        sys.unraisablehook(facts)


def _flush_standard() -> bool:
    """Flush what sys.stdout and sys.stderr are now. False when one of them fails."""
    flushed = True
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not getattr(stream, "closed", False):
                stream.flush()
        except BaseException as error:
            flushed = False
            if stream is sys.stdout:
                _report_ignored(error, stream)
    return flushed


def _let_go(box: str) -> None:
    """Drop the snippet's modules in CPython's order, so that finalisers run and files are closed.

    A module that nothing else refers to goes as a whole, and its finalisers still see its names.
    Modules that something holds have their names set to None.
    """
    sys.stdin = getattr(sys, "__stdin__", None)
    sys.stdout = getattr(sys, "__stdout__", None)
    sys.stderr = getattr(sys, "__stderr__", None)
    builtins._ = None  # type: ignore[attr-defined]
    own = [weakref.ref(sys.modules[name]) for name in _take_own(box)]
    # A full collection also empties caches, for which it copies their pages. It is needed once the
    # snippet's objects have become old; the zygote's are frozen.
    gc.collect(2 if gc.get_objects(generation=2) else 1)
    held = [module for reference in own if (module := reference()) is not None]
    for module in held:
        _clear(module)
    sys.excepthook, sys.unraisablehook = sys.__excepthook__, sys.__unraisablehook__
    if held:
        gc.collect()


def _take_own(box: str) -> Iterator[str]:
    """Give the names of the snippet's modules, and replace each by None once it was looked at."""
    added = []
    # From the end, where imports are added: to look at every name copies the pages of them all.
    for name in reversed(sys.modules):
        if name in _libraries:
            break
        added.append(name)
    for name in [*added, "__main__"]:
        if _is_own(sys.modules.get(name), box):
            yield name
            sys.modules[name] = None  # type: ignore[assignment]


def _is_own(module: Any, box: str) -> bool:
    """Whether the snippet made a module or imported it from its box."""
    if not issubclass(type(module), types.ModuleType):
        return False
    facts = module.__dict__
    file = facts.get("__file__")
    return facts.get("__spec__") is None or (isinstance(file, str) and file.startswith(f"{box}/"))


def _clear(module: types.ModuleType) -> None:
    """Set a module's names to None, those with one leading underscore first, as CPython does."""
    facts = module.__dict__
    for private in (True, False):
        for name in list(facts):
            hidden = name.startswith("_") and not name.startswith("__")
            if hidden is private and name != "__builtins__":
                facts[name] = None


def traceback_hook(
    kind: type[BaseException], error: BaseException, trace: types.TracebackType | None, /
) -> None:
    """sys.excepthook: print the traceback of an uncaught exception."""
    if sys.stderr is not None:
        traceback.print_exception(kind, error, trace)


def report_failed_hook(second: BaseException, error: BaseException, name: str) -> None:
    """Say that sys.excepthook failed with `second` and what it was to report, as CPython does."""
    print("Error in sys.excepthook:", file=sys.stderr)
    trace = frames_of_snippet(second.__traceback__, name)
    second.__context__ = None  # CPython calls the hook where no exception is handled
    traceback_hook(type(second), second, trace)
    print("\nOriginal exception was:", file=sys.stderr)
    traceback_hook(type(error), error, error.__traceback__)


def frames_of_snippet(trace: types.TracebackType | None, name: str) -> types.TracebackType | None:
    """Cut off our frames: those before the first one of file `name`, and those of our streams."""
    while trace is not None and trace.tb_frame.f_code.co_filename != name:
        trace = trace.tb_next
    step = trace
    while step is not None and step.tb_next is not None:
        if step.tb_next.tb_frame.f_code.co_filename.startswith(_OWN_FOLDER):
            step.tb_next = None
        step = step.tb_next
    return trace


def thread_hook(args: Any, /) -> None:
    """threading.excepthook: say which thread an exception ended; SystemExit is silent."""
    if args.exc_type is SystemExit or sys.stderr is None:
        return
    name = threading.get_ident() if args.thread is None else args.thread.name
    print(f"Exception in thread {name}:", file=sys.stderr)
    traceback.print_exception(args.exc_type, args.exc_value, args.exc_traceback)
    sys.stderr.flush()


def unraisable_hook(args: Any, /) -> None:
    """sys.unraisablehook: print an exception of a finaliser or an exit handler, without causes."""
    if sys.stderr is None:
        return
    lines = [f"{args.err_msg or 'Exception ignored in'}:"]
    if args.object is not None:
        lines[0] += f" {_representation(args.object)}"
    lines[0] += "\n"
    trace = args.exc_traceback
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(_OWN_FOLDER):
        trace = trace.tb_next  # what called the finaliser or handler is no part of the program
    if trace is not None:
        lines += ["Traceback (most recent call last):\n", *traceback.format_tb(trace)]
    lines += traceback.format_exception_only(args.exc_type, args.exc_value)
    print("".join(lines), end="", file=sys.stderr, flush=True)


def _representation(value: Any) -> str:
    try:
        return repr(value)
    except Exception:
        return "<object repr() failed>"

"""Ends a process that ran a snippet, with what CPython does between the last line and the exit.

Threads are waited for, exit handlers run, streams are flushed, and the snippet's modules are let
go, which closes its files and runs finalisers. The interpreter itself is not taken apart: its
libraries came from the zygote, and freeing them would copy every page of them.

All of this is the snippet's own time: whatever it hangs in, the API process's clock ends it.
"""

import atexit
import builtins
import contextlib
import ctypes
import gc
import io
import os
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from posix import _exit  # a snippet may replace os._exit
from typing import Any, NoReturn

_FLUSH_FAILED = 120
"""CPython's exit code when standard output could not be flushed."""
_CLEARED_FIRST = (
    "path", "argv", "ps1", "ps2", "last_type", "last_value", "last_traceback", "path_hooks",
    "path_importer_cache", "meta_path",
)  # fmt: skip
"""Names in sys that CPython sets to None before any module goes (Python/pylifecycle.c)."""
_WRITERS = (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom, io.BufferedRWPair)

_libc = ctypes.CDLL(None)
_libraries: set[str] = set()


def remember_libraries() -> None:
    """Take note of the modules that are loaded: they are no snippet's. The zygote calls it once."""
    _libraries.update(name for name in sys.modules if name != "__main__")


def end_process(exit_code: int, home: str) -> NoReturn:
    """Finalise and exit with `exit_code`, or with 120 when standard output cannot be flushed.

    Args:
        home: working folder of the snippet; modules from its box are the snippet's own.
    """
    try:
        _attempt(threading._shutdown)  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        if not _flush_standard():
            exit_code = _FLUSH_FAILED
        # Before files in cycles are closed, which may happen in the wrong order.
        _flush(_writers())
        _let_go(os.path.dirname(home))
        _flush([])
    finally:
        _exit(exit_code)


def _writers() -> list[Any]:
    """Whatever buffers output and is reachable: text first, which goes through a binary writer."""
    found = [item for item in gc.get_objects() if issubclass(type(item), _WRITERS)]
    return sorted(found, key=lambda writer: not isinstance(writer, io.TextIOWrapper))


def _flush(writers: list[Any]) -> None:
    """Flush these, the standard streams and those of the C library."""
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__, *writers):
        with contextlib.suppress(BaseException):  # closed, replaced or broken
            stream.flush()
    _libc.fflush(None)


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
    for name in ("stdin", "stdout", "stderr"):
        setattr(sys, name, getattr(sys, f"__{name}__", None))
    for name in _CLEARED_FIRST:
        setattr(sys, name, None)
    builtins._ = None  # type: ignore[attr-defined]
    own = [weakref.ref(sys.modules[name]) for name in _take_own(box)]
    gc.collect()
    for reference in reversed(own):
        _clear(reference())
    sys.excepthook, sys.unraisablehook = sys.__excepthook__, sys.__unraisablehook__
    gc.collect()


def _take_own(box: str) -> Iterator[str]:
    """Give the names of the snippet's modules, and replace each by None once it was looked at."""
    for name in [each for each in sys.modules if each not in _libraries]:
        if _is_own(sys.modules[name], box):
            yield name
            sys.modules[name] = None  # type: ignore[assignment]


def _is_own(module: Any, box: str) -> bool:
    """Whether the snippet made a module or imported it from its box."""
    if not issubclass(type(module), types.ModuleType):
        return False
    facts = module.__dict__
    file = facts.get("__file__")
    return facts.get("__spec__") is None or (isinstance(file, str) and file.startswith(f"{box}/"))


def _clear(module: types.ModuleType | None) -> None:
    """Set a module's names to None, those with one leading underscore first, as CPython does."""
    if module is None:
        return  # nothing held it
    facts = module.__dict__
    for private in (True, False):
        for name in list(facts):
            hidden = name.startswith("_") and not name.startswith("__")
            if hidden is private and name != "__builtins__":
                facts[name] = None

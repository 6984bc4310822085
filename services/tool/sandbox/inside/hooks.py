"""CPython's hooks for exceptions that nobody catches, with the lines of the snippet.

The hooks in C read source lines from a file, and a cell has none. These print the same text with
the lines that linecache holds.
"""

import os
import sys
import threading
import traceback
import types
from typing import Any

_INSIDE = os.path.join(os.path.dirname(__file__), "")


def traceback_hook(
    kind: type[BaseException], error: BaseException, trace: types.TracebackType | None, /
) -> None:
    """sys.excepthook: print the traceback of an uncaught exception."""
    if sys.stderr is not None:
        traceback.print_exception(kind, error, trace)


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
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(_INSIDE):
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

"""Standard streams that behave as those of `python main.py` at a pipe, and lose less.

CPython buffers what goes into a pipe. These streams write each line at once, so that a program that
is killed loses at most one. An error in doing so is kept until the program flushes or ends, which
is when CPython would meet it.
"""

import io
from typing import Any


class _LineBuffer(io.BufferedWriter):
    """Flushes what it can, and keeps the rest and the error for `insist`."""

    error: OSError | None = None

    def flush(self) -> None:
        try:
            io.BufferedWriter.flush(self)  # costs every line less than super()
        except OSError as error:
            self.error = error

    def insist(self) -> None:
        """Raise the error of the last flush, unless a new attempt succeeds."""
        if self.error is not None:
            self.error = None
            super().flush()


class _Writer(io.TextIOWrapper):
    mode = "w"

    def flush(self) -> None:
        io.TextIOWrapper.flush(self)
        buffer: Any = self.buffer
        buffer.insist()


class _Reader(io.TextIOWrapper):
    mode = "r"


def writer(descriptor: int, name: str, errors: str) -> io.TextIOWrapper:
    """A text stream that writes to a descriptor, which it never closes."""
    raw = io.FileIO(descriptor, "w", closefd=False)
    raw.name = name
    return _Writer(_LineBuffer(raw), "utf-8", errors, line_buffering=True)


def reader(descriptor: int, name: str) -> io.TextIOWrapper:
    """A text stream that reads from a descriptor, which it never closes."""
    raw = io.FileIO(descriptor, "r", closefd=False)
    raw.name = name
    return _Reader(io.BufferedReader(raw), "utf-8", "surrogateescape")

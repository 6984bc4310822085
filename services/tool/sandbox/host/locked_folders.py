"""Folders that are held by a lock which dies with their owner.

A service that was killed cannot clean up. The next one removes what nobody holds any more.
"""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def make(parent: Path, prefix: str) -> tuple[Path, int]:
    """Make a folder of mode 700 and hold it; closing the descriptor lets go of it."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        with contextlib.suppress(FileNotFoundError, BlockingIOError):  # taken for abandoned
            descriptor = _hold(folder)
            if folder.exists():
                return folder, descriptor
            os.close(descriptor)


def abandoned(parent: Path, prefix: str) -> Iterator[Path]:
    """Folders that nobody holds; each is held by us until the next one is asked for."""
    for folder in parent.glob(prefix + "*"):
        try:
            descriptor = _hold(folder)
        except OSError:
            continue  # in use, or of another user
        try:
            yield folder
        finally:
            os.close(descriptor)


def _hold(folder: Path) -> int:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(folder, flags)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor

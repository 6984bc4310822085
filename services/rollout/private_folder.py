"""A folder of one process, which the next process removes when its owner was killed.

The owner holds a lock on it for as long as it lives; the kernel drops the lock of the dead.
"""

import fcntl
import os
import secrets
import shutil
from pathlib import Path

_LOCK = ".lock"


class PrivateFolder:
    """`parent/prefix<unique>`, made and locked here. What the dead left beside it is removed."""

    def __init__(self, parent: Path, prefix: str) -> None:
        remove_folders_of_the_dead(parent, prefix)
        self.path = parent / f"{prefix}{secrets.token_hex(4)}"
        self.path.mkdir(mode=0o700)
        self._lock = _lock(self.path)

    def close(self) -> None:
        """Remove the folder with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def remove_folders_of_the_dead(parent: Path, prefix: str) -> None:
    """Remove what processes left in `parent` that were killed."""
    for folder in parent.glob(f"{prefix}*"):
        if not os.access(folder / _LOCK, os.R_OK | os.W_OK):
            continue  # being made at this moment, or somebody else's
        lock = _lock(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Take the folder's lock and return its descriptor; None when another process holds it."""
    descriptor = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor

"""Folders owned by a live process, which the next process removes if the owner was killed.

The owner holds a lock (flock) on a file in the folder. The kernel drops that lock when the owner
dies, however it dies, so a folder whose lock can be taken is abandoned.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

LOCK_NAME = ".lock"
"""A file and not the folder itself: over NFS a lock on a directory is invisible to other hosts."""


def remove_tree(folder: Path) -> None:
    """Remove a folder with everything in it; what cannot be removed stays."""
    shutil.rmtree(folder, ignore_errors=True)


class OwnedFolder:
    """A folder of this process, made by `create`."""

    def __init__(self, path: Path, lock: int, remove: Callable[[Path], None]) -> None:
        self.path = path
        self._lock: int | None = lock
        self._remove = remove

    @classmethod
    def create(
        cls,
        parent: Path,
        prefix: str,
        *,
        lock_name: str = LOCK_NAME,
        remove: Callable[[Path], None] = remove_tree,
    ) -> "OwnedFolder":
        """Remove abandoned folders, then make `parent/prefix<unique>` with mode 700 and lock it.

        Args:
            lock_name: file in the folder that carries the lock; made where it is missing.
            remove: how a folder of this kind is removed.

        Raises:
            OSError: the folder or its lock cannot be made.
        """
        remove_abandoned_folders(parent, prefix, lock_name=lock_name, remove=remove)
        while True:
            folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            try:
                lock = _lock(folder / lock_name, os.O_CREAT)
            except (FileNotFoundError, BlockingIOError):
                continue  # another process found it before it was locked, and removes it
            if folder.exists():
                return cls(folder, lock, remove)
            os.close(lock)

    def empty(self) -> None:
        """Remove the folders in it and keep the folder itself."""
        for folder in self.path.iterdir():
            if folder.is_dir():
                remove_tree(folder)

    def remove(self) -> None:
        """Remove the folder with everything in it, then release the lock. May be called twice."""
        if self._lock is not None:
            self._remove(self.path)
            os.close(self._lock)
            self._lock = None


def remove_abandoned_folders(
    parent: Path,
    prefix: str,
    *,
    lock_name: str = LOCK_NAME,
    remove: Callable[[Path], None] = remove_tree,
) -> None:
    """Remove the folders `parent/prefix*` whose owner is dead.

    A folder without a lock file is not one of ours, or is being made at this moment: it stays.
    """
    for folder in parent.glob(f"{prefix}*"):
        try:
            lock = _lock(folder / lock_name)
        except OSError:
            continue  # in use, without a lock, or of another user
        try:
            remove(folder)
        finally:
            os.close(lock)


def _lock(file: Path, flags: int = 0) -> int:
    """Lock a file and return the descriptor that holds the lock. Raises OSError."""
    # Open for writing: NFS refuses an exclusive lock on a file that is open for reading only.
    descriptor = os.open(file, flags | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor

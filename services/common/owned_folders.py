"""Folders owned by a live process, which the next process removes if the owner was killed.

The owner holds a lock (flock) on a file in the folder. The kernel drops that lock when the owner
dies, however it dies, so a folder whose lock can be taken is abandoned.
"""

import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from services.common import trees

logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"
"""A file and not the folder itself: over NFS a lock on a directory is invisible to other hosts."""


_REMOVAL_S = 10.0
"""For what one owner left. Who left more than that must not keep the next one from starting."""
_START_S = 20.0
"""For what all dead owners left."""


def remove_tree(folder: Path) -> None:
    """Remove an owned folder with everything in it. Never raises: what cannot be removed within 10
    s stays, with its lock, and is removed by a later start."""
    deadline = time.monotonic() + _REMOVAL_S
    try:
        inside = [each for each in folder.iterdir() if each.name != LOCK_NAME]
    except OSError:
        inside = []
    gone = [trees.remove_tree(each, max(deadline - time.monotonic(), 0.0)) for each in inside]
    if not all(gone) or not trees.remove_tree(folder, _REMOVAL_S):
        logger.warning("%s could not be removed completely; the next start tries again", folder)


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
    What cannot be removed stays as well; after 20 s the rest waits for the next call.
    """
    deadline = time.monotonic() + _START_S
    for folder in parent.glob(f"{prefix}*"):
        try:
            lock = _lock(folder / lock_name)
        except OSError:
            continue  # in use, without a lock, or of another user
        try:
            remove(folder)
        except OSError as error:
            logger.warning("%s, which a dead process left, stays: %s", folder, error)
        finally:
            os.close(lock)
        if time.monotonic() > deadline:
            return


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

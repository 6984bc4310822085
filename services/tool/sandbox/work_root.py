"""The folder that holds slots' working folders at the levels that cannot mount private ones.

A service that was killed cannot clean up. Each folder carries a lock that dies with its owner, so
that the next service of the same user removes what nobody holds any more.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "tool-service-"
_LOCK = ".lock"


class WorkRoot:
    """A fresh folder, locked until `remove`."""

    def __init__(self) -> None:
        parent = Path(tempfile.gettempdir())
        _remove_abandoned(parent)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        # Slots of level uid pass through as other users; nobody may list what is in here.
        self.path.chmod(0o711 if os.geteuid() == 0 else 0o700)
        self._lock = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def empty(self) -> None:
        """Remove the slots' folders; their processes must be dead."""
        for folder in self.path.iterdir():
            if folder.name != _LOCK:
                shutil.rmtree(folder, ignore_errors=True)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _remove_abandoned(parent: Path) -> None:
    for folder in parent.glob(_PREFIX + "*"):
        with contextlib.suppress(OSError):
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)

"""The folder in which the rollout servers of this machine read the weights of an update."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

_PREFIX = "openrlhf-alp-weights-"
_SHARED_MEMORY = Path("/dev/shm")


def weights_dir(folder: Path) -> Path:
    """That of the servers of a run folder; in memory if it can be."""
    parent = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
    digest = hashlib.sha256(str(folder).encode()).hexdigest()
    return parent / f"{_PREFIX}{digest[:16]}"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """`folder` exists while the block runs; of launches that were killed none stays."""
    for lock in folder.parent.glob(f"{_PREFIX}*.lock"):
        with suppress(Timeout, OSError), FileLock(lock, timeout=0):
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink()
    lock = Path(f"{folder}.lock")
    with FileLock(lock, timeout=0):
        folder.mkdir(mode=0o700)
        try:
            yield
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)

"""Removal of folders whose shape somebody hostile chose: any depth, any number of names, any modes.

Each folder is opened below the one before, links are never followed and paths are never joined, so
neither Python's recursion limit nor the kernel's limit on paths matters. Three descriptors are open
at most. Nothing raises: what cannot be removed stays, and the caller learns that something did.
"""

import contextlib
import errno
import os
import stat
import time
from dataclasses import dataclass, field
from pathlib import Path

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OWNER_MAY_ALL = 0o700


@dataclass(slots=True, kw_only=True)
class _Level:
    """One folder on the way down."""

    name: str
    identity: tuple[int, int]
    """Device and inode, by which the way back up is recognised."""
    pending: list[str] = field(default_factory=list)
    """Folders in it that are not empty and not visited yet."""
    stuck: set[str] = field(default_factory=set)
    """Names in it that cannot be removed."""


def remove_tree(folder: Path, budget_s: float) -> bool:
    """Remove a file, or a folder with everything in it, for `budget_s` seconds at most.

    Mount points and what lies below them stay.

    Returns:
        Whether nothing is left.
    """
    try:
        above = os.open(folder.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        with contextlib.suppress(OSError):
            _Removal(time.monotonic() + budget_s).run(above, folder.name)
        return not _exists(above, folder.name)
    finally:
        os.close(above)


class _Removal:
    """Goes down into folders that are not empty and up again once they are."""

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self._levels: list[_Level] = []
        self._here = -1
        """Descriptor of the folder of the last level."""

    def run(self, above: int, name: str) -> None:
        """Remove `name` in the folder `above`. Raises OSError where it cannot go on."""
        found = os.stat(name, dir_fd=above, follow_symlinks=False)
        if not stat.S_ISDIR(found.st_mode):
            os.unlink(name, dir_fd=above)
            return
        device = found.st_dev
        if not self._enter(above, name, device):
            return
        try:
            while self._levels and time.monotonic() < self._deadline:
                level = self._levels[-1]
                if level.pending:
                    child = level.pending.pop()
                    if not self._enter(self._here, child, device):
                        level.stuck.add(child)
                elif not self._clear(level):
                    self._leave(above)
        finally:
            os.close(self._here)

    def _enter(self, parent: int, name: str, device: int) -> bool:
        """Go down into a folder. False: it cannot be opened, or is on another file system."""
        try:
            opened = _open_folder(parent, name)
        except OSError:
            return False
        status = os.fstat(opened)
        if status.st_dev != device:
            os.close(opened)
            return False
        if self._here >= 0:
            os.close(self._here)
        self._here = opened
        self._levels.append(_Level(name=name, identity=(status.st_dev, status.st_ino)))
        return True

    def _clear(self, level: _Level) -> bool:
        """Remove what can be removed at once and note the rest. False: there was nothing to do."""
        progress = False
        with os.scandir(self._here) as entries:
            for entry in entries:
                if time.monotonic() > self._deadline:
                    return True
                if entry.name in level.stuck:
                    continue
                progress |= self._remove_entry(entry, level)
        return progress

    def _remove_entry(self, entry: os.DirEntry[str], level: _Level) -> bool:
        is_folder = entry.is_dir(follow_symlinks=False)
        try:
            if is_folder:
                os.rmdir(entry.name, dir_fd=self._here)
            else:
                os.unlink(entry.name, dir_fd=self._here)
        except FileNotFoundError:
            return False
        except OSError as error:
            if not is_folder or error.errno == errno.EBUSY:  # busy: something is mounted on it
                level.stuck.add(entry.name)
                return False
            level.pending.append(entry.name)
        return True

    def _leave(self, above: int) -> None:
        """Go up and remove the folder that was left. Raises OSError if the way up is another."""
        left = self._levels.pop()
        parent = self._levels[-1] if self._levels else None
        up = os.dup(above) if parent is None else os.open("..", _FOLDER, dir_fd=self._here)
        os.close(self._here)
        self._here = up
        status = os.fstat(up)
        if parent is not None and (status.st_dev, status.st_ino) != parent.identity:
            raise OSError(f"{left.name!r} was moved while it was removed")
        try:
            os.rmdir(left.name, dir_fd=up)
        except OSError:
            if parent is not None:
                parent.stuck.add(left.name)


def _open_folder(parent: int, name: str) -> int:
    """Open a folder, with whatever rights it has. Raises OSError."""
    found = os.open(name, os.O_PATH | _FOLDER, dir_fd=parent)
    try:
        # Through its descriptor: a name could have become a link to somewhere else by now.
        if os.fstat(found).st_mode & _OWNER_MAY_ALL != _OWNER_MAY_ALL:
            os.chmod(f"/proc/self/fd/{found}", _OWNER_MAY_ALL)
        return os.open(".", _FOLDER, dir_fd=found)
    finally:
        os.close(found)


def _exists(parent: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return True

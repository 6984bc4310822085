"""The memory of a slot, counted from /proc by the zygote where no cgroup is delegated.

The cheap upper bound, the resident pages of every process, is read first. Only if it exceeds the
limit is the proportional set size summed: it counts pages that forks share with the zygote once.
"""

import os
from functools import partial

from services.tool.sandbox.plan import Level

_IDLE_PIDS = (1, 3)
"""Pids in a room of its first process (launcher.py) and of the slot's memory helper (slot.py). Both
only share the memory of others, and live as long as the room, so nobody else gets these pids."""
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Census:
    """Which process belongs to which slot, read once from `proc`, a descriptor of /proc."""

    def __init__(self, proc: int, level: Level) -> None:
        self._proc = proc
        self._level = level
        self._members: dict[int, list[int]] = {}
        # At level basic nothing can fork, so a slot's first process is all of it.
        pids = _listing(proc, ".") if level is not Level.BASIC else []
        for pid in map(int, filter(str.isdigit, pids)):
            self._members.setdefault(self._key(pid), []).append(pid)

    def memory_bytes(self, pid: int, uid: int | None, limit: int) -> int:
        """Memory of the slot whose first process is `pid`; exact only above `limit`.

        Args:
            uid: the slot's own user id, by which its processes are found at level uid.
        """
        key = uid if self._level is Level.UID else self._key(pid)
        members = self._members.get(key, [pid]) if key else [pid]
        if self._level is Level.FULL:
            members = [each for each in members if _inner_pid(self._proc, each) not in _IDLE_PIDS]
        tasks = [_with_memory(self._proc, member) for member in members]
        resident = sum(_resident_bytes(self._proc, task) for task in tasks)
        if resident <= limit:
            return resident
        return sum(_proportional_bytes(self._proc, task) for task in tasks)

    def _key(self, pid: int) -> int:
        """What the processes of a slot have in common; 0 for one that has ended or is hidden."""
        try:
            if self._level is Level.FULL:
                return os.stat(f"{pid}/ns/pid", dir_fd=self._proc).st_ino
            return os.stat(f"{pid}", dir_fd=self._proc).st_uid if self._level is Level.UID else pid
        except OSError:
            return 0


def baseline_bytes(proc: int | None) -> int:
    """Data and stack of the calling process in bytes, as RLIMIT_DATA counts them; 0 if unknown."""
    if proc is None:
        return 0
    fields = _read(proc, "self/statm").split()
    return int(fields[5]) * _PAGE_BYTES


def _inner_pid(proc: int, pid: int) -> int:
    for line in _read(proc, f"{pid}/status").splitlines():
        if line.startswith(b"NSpid:"):
            return int(line.split()[-1])
    return 0


def _read(proc: int, path: str) -> bytes:
    """The first 4 KiB of a file below /proc; empty once the process has ended."""
    try:
        with open(path, "rb", 0, opener=partial(os.open, dir_fd=proc)) as file:
            return file.read(4096)
    except OSError:
        return b""


def _listing(proc: int, path: str) -> list[str]:
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY, dir_fd=proc)
    except OSError:
        return []
    try:
        return os.listdir(folder)
    except OSError:
        return []
    finally:
        os.close(folder)


def _with_memory(proc: int, pid: int) -> str:
    """Where below /proc a process's memory shows: not at its first thread once that has ended."""
    if _resident_bytes(proc, str(pid)):
        return str(pid)
    threads = (f"{pid}/task/{name}" for name in _listing(proc, f"{pid}/task"))
    return next((thread for thread in threads if _resident_bytes(proc, thread)), str(pid))


def _resident_bytes(proc: int, task: str) -> int:
    fields = _read(proc, f"{task}/statm").split()
    return int(fields[1]) * _PAGE_BYTES if len(fields) > 1 else 0


def _proportional_bytes(proc: int, task: str) -> int:
    for line in _read(proc, f"{task}/smaps_rollup").splitlines():
        if line.startswith(b"Pss:"):
            return int(line.split()[1]) * 1024
    return _resident_bytes(proc, task)

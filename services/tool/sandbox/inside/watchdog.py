"""The memory of a slot, counted from /proc: the fallback where no cgroup is delegated.

The cheap upper bound (resident pages of every process) is read first. Only when it exceeds what was
asked for is the proportional set size summed, because pages that forks share with the zygote would
otherwise be counted many times.
"""

import os

from services.tool.sandbox.plan import Level

_IDLE_PIDS = (1, 3)
"""Pids, inside a room, of the processes that hold it open (launcher.py) and share its slot's memory
(slot.py): they have none of their own. The kernel gives neither number out again."""
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Census:
    """Who belongs to which slot, read once per look at the machine."""

    def __init__(self, proc: int, level: Level) -> None:
        """`proc` is a descriptor of a /proc that shows the slots."""
        self._proc = proc
        self._level = level
        self._members: dict[int, list[int]] = {}
        for pid in _pids(proc) if level is not Level.BASIC else []:
            self._members.setdefault(self._key(pid), []).append(pid)

    def memory_bytes(self, pid: int, uid: int | None, limit: int) -> int:
        """Memory of the slot whose first process is `pid`; exact only above `limit`.

        Args:
            uid: the slot's own user id, which at level uid tells its processes apart.
        """
        key = uid if self._level is Level.UID else self._key(pid)
        members = self._members.get(key, [pid]) if key else [pid]
        if self._level is Level.FULL:
            members = [each for each in members if _inner_pid(self._proc, each) not in _IDLE_PIDS]
        resident = sum(_resident_bytes(self._proc, member) for member in members)
        if resident <= limit:
            return resident
        return sum(_proportional_bytes(self._proc, member) for member in members)

    def _key(self, pid: int) -> int:
        if self._level is Level.FULL:
            return _pid_namespace(self._proc, pid)
        return _owner(self._proc, pid) if self._level is Level.UID else pid


def baseline_bytes(proc: int) -> int:
    """Data and stack of the calling process in bytes, as RLIMIT_DATA counts them."""
    fields = _read(proc, "self/statm").split()
    return int(fields[5]) * _PAGE_BYTES


def _pids(proc: int) -> list[int]:
    return [int(name) for name in _listing(proc, ".") if name.isdigit()]


def _pid_namespace(proc: int, pid: int) -> int:
    try:
        return os.stat(f"{pid}/ns/pid", dir_fd=proc).st_ino
    except OSError:
        return 0  # gone, or not ours to look at


def _inner_pid(proc: int, pid: int) -> int:
    for line in _read(proc, f"{pid}/status").splitlines():
        if line.startswith(b"NSpid:"):
            return int(line.split()[-1])
    return 0


def _owner(proc: int, pid: int) -> int:
    try:
        return os.stat(f"{pid}", dir_fd=proc).st_uid
    except OSError:
        return -1


def _read(proc: int, path: str) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY, dir_fd=proc)
    except OSError:
        return b""
    try:
        return os.read(descriptor, 4096)
    except OSError:
        return b""
    finally:
        os.close(descriptor)


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
    """Where below /proc the memory of a process shows: when its first thread has ended, only at
    another one."""
    if _statm_bytes(proc, str(pid)):
        return str(pid)
    threads = (f"{pid}/task/{name}" for name in _listing(proc, f"{pid}/task"))
    return next((thread for thread in threads if _statm_bytes(proc, thread)), str(pid))


def _resident_bytes(proc: int, pid: int) -> int:
    return _statm_bytes(proc, _with_memory(proc, pid))


def _statm_bytes(proc: int, task: str) -> int:
    fields = _read(proc, f"{task}/statm").split()
    return int(fields[1]) * _PAGE_BYTES if len(fields) > 1 else 0


def _proportional_bytes(proc: int, pid: int) -> int:
    for line in _read(proc, f"{_with_memory(proc, pid)}/smaps_rollup").splitlines():
        if line.startswith(b"Pss:"):
            return int(line.split()[1]) * 1024
    return _resident_bytes(proc, pid)

"""Cgroup v2: what the kernel itself holds all processes of a slot to, where we may divide a cgroup.

    base                        the service's own cgroup, delegated to it
      openrlhf-alp-tool         the service, its launchers and zygotes
      openrlhf-alp-slots-XXXX   one per sandbox, locked as long as it lives
        0, 1, 2, ...            one per slot: memory, processes, CPU time

A slot joins its cgroup itself, before any other fence: this process opens `cgroup.procs`, the
zygote passes the descriptor on, and the kernel asks what the opener was allowed to do. Elsewhere
the watchdog counts (watchdog.py). See the kernel's Documentation/admin-guide/cgroup-v2.rst.
"""

import contextlib
import itertools
import logging
import os
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from services.tool.sandbox.host import locked_folders

logger = logging.getLogger(__name__)

_REQUIRED = ("memory", "pids")
_WANTED = (*_REQUIRED, "cpu")
_SERVICE = "openrlhf-alp-tool"
_SLOTS = "openrlhf-alp-slots-"
_SYSTEMD = Path("/run/systemd/system")  # there when systemd manages this machine
_PREPARED = 4
_ONE_CORE = "100000 100000"  # microseconds of CPU time per microseconds of time
_PAUSE_S = 0.01  # killed processes leave a cgroup when their memory is freed
_LEAVE_S = 5.0


class CgroupUnavailableError(RuntimeError):
    """No cgroup is ours to divide; the message is the cause."""


@dataclass(frozen=True, slots=True)
class SlotCgroup:
    """The cgroup of one slot."""

    folder: Path
    slack_bytes: int
    """What a slot may hold on top of a program's memory: files on its tmpfs, page tables, the pages
    it copied from the zygote."""

    def open(self) -> int:
        """A descriptor on which the slot writes itself into the cgroup. The caller closes it."""
        return os.open(self.folder / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)

    def limit_memory(self, limit_bytes: int) -> None:
        """Have the kernel kill every process of the slot when together they hold more."""
        _write(self.folder / "memory.max", str(limit_bytes + self.slack_bytes))

    def out_of_memory(self) -> bool:
        """Whether the kernel killed the slot at its own limit, and not because the machine had no
        memory left."""
        lines = (self.folder / "memory.events").read_text().splitlines()
        events = dict(line.split() for line in lines)
        return int(events["oom"]) > 0 and int(events["oom_kill"]) > 0

    def peak_bytes(self) -> int:
        """The most that the slot held since it joined, without pages it shares with the zygote."""
        return int((self.folder / "memory.peak").read_text())

    def remove(self) -> bool:
        """Remove the cgroup, killing what is left in it. False: something still dies in there."""
        try:
            self.folder.rmdir()
        except FileNotFoundError:
            return True
        except OSError:
            _write(self.folder / "cgroup.kill", "1")
            return False
        return True


class Cgroups:
    """The cgroups of a sandbox, made ahead and removed by a thread of their own: the kernel may let
    either wait."""

    def __init__(self, *, max_processes: int, slack_bytes: int) -> None:
        """Divide the cgroup of this process, which moves into a part of it.

        Args:
            max_processes: processes and threads of one slot.
            slack_bytes: see `SlotCgroup`.

        Raises:
            CgroupUnavailableError: the message says why not.
        """
        self._max_processes = max_processes
        self._slack_bytes = slack_bytes
        self._numbers = itertools.count()
        self._ready: deque[SlotCgroup] = deque()
        self._dead: deque[SlotCgroup] = deque()
        self._awake = False
        self._worker = ThreadPoolExecutor(1, "cgroups")
        self._closed = False
        try:
            self.folder, self._lock = _divide()
            offered = (self.folder / "cgroup.subtree_control").read_text().split()
        except OSError as error:
            raise CgroupUnavailableError(f"{error.filename}: {error.strerror}") from error
        self.controllers = [name for name in _WANTED if name in offered]
        """Those that hold a slot: memory, pids and, where it is delegated, cpu."""
        self._wake()

    def take(self) -> SlotCgroup:
        """A cgroup for a new slot. Raises OSError."""
        self._wake()
        return self._ready.popleft() if self._ready else self._make()

    def give_back(self, cgroup: SlotCgroup) -> None:
        """Have the cgroup of a dead slot removed."""
        self._dead.append(cgroup)
        self._wake()

    def close(self) -> None:
        """Remove all of it; blocks until the last killed process is gone, 5 s at most."""
        self._closed = True
        self._worker.shutdown()
        _remove_with_children(self.folder)
        os.close(self._lock)

    def _wake(self) -> None:
        if not self._awake and not self._closed:
            self._awake = True
            self._worker.submit(self._tidy)

    def _tidy(self) -> None:
        """Make what will be needed, remove what was; in the thread."""
        self._awake = False  # before looking: what comes later wakes again
        try:
            for _ in range(len(self._dead)):
                cgroup = self._dead.popleft()
                if not cgroup.remove():
                    self._dead.append(cgroup)
            while len(self._ready) < _PREPARED:
                self._ready.append(self._make())
        except OSError as error:  # whoever takes the next one is told as well
            logger.error("cgroups: %s", error)
            return
        if self._dead:
            time.sleep(_PAUSE_S)
            self._wake()

    def _make(self) -> SlotCgroup:
        cgroup = SlotCgroup(self.folder / str(next(self._numbers)), self._slack_bytes)
        cgroup.folder.mkdir()
        try:
            _write(cgroup.folder / "pids.max", str(self._max_processes))
            _write(cgroup.folder / "memory.oom.group", "1")
            if "cpu" in self.controllers:
                _write(cgroup.folder / "cpu.max", _ONE_CORE)
        except OSError:
            cgroup.remove()
            raise
        return cgroup


def own_cgroup(proc: Path = Path("/proc/self")) -> tuple[Path, Path]:
    """The folder of this process's cgroup and the mount point above it.

    Args:
        proc: folder with the files `cgroup` and `mountinfo` of a process.

    Raises:
        CgroupUnavailableError: no cgroup v2, or its file system is not mounted.
    """
    lines = (proc / "cgroup").read_text().splitlines()
    path = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), None)
    if path is None:
        raise CgroupUnavailableError("this kernel runs without cgroup v2")
    for line in (proc / "mountinfo").read_text().splitlines():
        mount, _, kind = line.partition(" - ")
        root, point = mount.split()[3:5]
        if kind.startswith("cgroup2 ") and Path(path).is_relative_to(root):
            return Path(point) / Path(path).relative_to(root), Path(point)
    raise CgroupUnavailableError("no cgroup2 file system is mounted")


def _divide() -> tuple[Path, int]:
    """Make the folder of our slots' cgroups; also returns the descriptor that holds it."""
    own, mount_point = own_cgroup()
    base = own.parent if own.name == _SERVICE else own
    offered = (base / "cgroup.controllers").read_text().split()
    missing = [name for name in _REQUIRED if name not in offered]
    if missing:
        raise CgroupUnavailableError(f"{base} has no controller {' and '.join(missing)}")
    if not os.access(base / "cgroup.subtree_control", os.W_OK):
        raise CgroupUnavailableError(f"{base} is not ours to write in")
    if os.geteuid() == 0 and base != mount_point and not _is_left_to_us(base):
        raise CgroupUnavailableError(f"{base} is systemd's own: its unit lacks Delegate=yes")
    # The machine's root cgroup, alone in having no type, may hold processes and be divided.
    if (base / "cgroup.type").exists():
        _vacate(base, everybody=base == mount_point)
    _enable(base)
    for folder in locked_folders.abandoned(base, _SLOTS):
        _remove_with_children(folder)
    slots, lock = locked_folders.make(base, _SLOTS)
    try:
        _enable(slots)
        # For all slots together; without it a program at its limit would be written to disk.
        with contextlib.suppress(FileNotFoundError):  # a kernel without swap
            _write(slots / "memory.swap.max", "0")
        if not (slots / "memory.peak").exists():
            raise CgroupUnavailableError("this kernel's cgroups tell no peak (Linux 5.19)")
    except BaseException:
        _remove_with_children(slots)
        os.close(lock)
        raise
    return slots, lock


def _is_left_to_us(base: Path) -> bool:
    """Whether no systemd manages this cgroup, or one that marked it as delegated. Root could write
    in any."""
    if not _SYSTEMD.is_dir():
        return True
    for folder in [base, *base.parents]:
        for mark in ("user.delegate", "trusted.delegate"):
            with contextlib.suppress(OSError):
                if os.getxattr(folder, mark) == b"1":
                    return True
    return False


def _vacate(base: Path, *, everybody: bool) -> None:
    """Move the processes of a cgroup into a part of it: only an empty one can be divided.

    Args:
        everybody: move others as well, as in a container, where all processes belong together.
    """
    pids = [int(pid) for pid in (base / "cgroup.procs").read_text().split()]
    others = [pid for pid in pids if pid != os.getpid()]
    if others and (not everybody or 0 in others):  # 0: out of our sight, in another namespace
        shown = ", ".join(str(pid) for pid in others[:5])
        raise CgroupUnavailableError(f"{base} also holds other processes ({shown})")
    (base / _SERVICE).mkdir(exist_ok=True)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            _write(base / _SERVICE / "cgroup.procs", str(pid))


def _enable(folder: Path) -> None:
    """Pass the controllers on to the children."""
    offered = (folder / "cgroup.controllers").read_text().split()
    wanted = " ".join(f"+{name}" for name in _WANTED if name in offered)
    _write(folder / "cgroup.subtree_control", wanted)


def _remove_with_children(folder: Path) -> None:
    """Remove the cgroup of a service with those of its slots, once all in them are dead."""
    children = [SlotCgroup(child, 0) for child in folder.iterdir() if child.is_dir()]
    give_up = time.monotonic() + _LEAVE_S
    while children and time.monotonic() < give_up:
        children = [child for child in children if not child.remove()]
        if children:
            time.sleep(_PAUSE_S)
    try:
        folder.rmdir()
    except OSError as error:
        logger.warning("%s is left: %s", folder, error)


def _write(file: Path, text: str) -> None:
    """Write a setting in one call, as the kernel wants it. Raises OSError that names the file."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error
    finally:
        os.close(descriptor)

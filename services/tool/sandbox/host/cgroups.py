"""Cgroup v2: limits that the kernel applies to all processes of a slot together.

    base                        the service's own cgroup, delegated to it
      openrlhf-alp-tool         the service, its launchers and zygotes
      openrlhf-alp-slots-XXXX   one per sandbox, owned by its process (owned_folders.py)
        0, 1, 2, ...            one per slot: memory, processes, CPU time

A slot joins its cgroup itself, before any other fence: this process opens `cgroup.procs`, the
zygote passes the descriptor on, and the kernel checks the rights of the process that opened it.
Where no cgroup is delegated, the watchdog counts memory (inside/watchdog.py). See the kernel's
Documentation/admin-guide/cgroup-v2.rst.
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

from services.common.owned_folders import OwnedFolder

logger = logging.getLogger(__name__)

_REQUIRED = ("memory", "pids")
_WANTED = (*_REQUIRED, "cpu")
_SERVICE = "openrlhf-alp-tool"
_SLOTS = "openrlhf-alp-slots-"
_SYSTEMD = Path("/run/systemd/system")  # there when systemd manages this machine
_NUM_PREPARED = 4
_PROCS = "cgroup.procs"
_ONE_CORE = "100000 100000"  # microseconds of CPU time per microseconds of time
_RETRY_S = 0.01  # killed processes leave a cgroup only when their memory is freed
_REMOVAL_S = 5.0


class CgroupUnavailableError(RuntimeError):
    """This process may not divide its cgroup; the message says why."""


@dataclass(frozen=True, slots=True)
class SlotCgroup:
    """The cgroup of one slot."""

    folder: Path
    slack_bytes: int
    """What a slot may hold besides a program's memory: files on its tmpfs, page tables, pages
    copied from the zygote."""

    def open(self) -> int:
        """Open the file by which the slot joins the cgroup. The caller closes the descriptor."""
        return os.open(self.folder / _PROCS, os.O_WRONLY | os.O_CLOEXEC)

    def limit_memory(self, limit_bytes: int) -> None:
        """Have the kernel kill all processes of the slot if together they hold more."""
        _write(self.folder / "memory.max", str(limit_bytes + self.slack_bytes))

    def out_of_memory(self) -> bool:
        """Whether the kernel killed the slot at its own limit. A kill because the machine had no
        memory left counts in `oom_kill` alone."""
        lines = (self.folder / "memory.events").read_text().splitlines()
        events = dict(line.split() for line in lines)
        return int(events["oom"]) > 0 and int(events["oom_kill"]) > 0

    def peak_bytes(self) -> int:
        """The most that the slot has held, without pages that it shares with the zygote."""
        return int((self.folder / "memory.peak").read_text())

    def remove(self) -> bool:
        """Remove the cgroup, killing what is left in it. False: that has not ended yet."""
        try:
            self.folder.rmdir()
        except FileNotFoundError:
            return True
        except OSError:
            _write(self.folder / "cgroup.kill", "1")
            return False
        return True


class Cgroups:
    """The cgroups of a sandbox. A thread makes them ahead and removes them, because the kernel may
    take its time for either."""

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
        # Deques: their ends are safe to use from the event loop and from the thread.
        self._prepared: deque[SlotCgroup] = deque()
        self._discarded: deque[SlotCgroup] = deque()
        self._round_is_due = False
        self._worker = ThreadPoolExecutor(1, "cgroups")
        self._closed = False
        try:
            self._owned = _divide_own_cgroup()
            offered = (self.folder / "cgroup.subtree_control").read_text().split()
        except OSError as error:
            raise CgroupUnavailableError(f"{error.filename}: {error.strerror}") from error
        self.controllers = [name for name in _WANTED if name in offered]
        """Those that limit a slot: memory, pids and, where it is delegated, cpu."""
        self._schedule_round()

    @property
    def folder(self) -> Path:
        """The cgroup whose children are the slots' cgroups."""
        return self._owned.path

    def take(self) -> SlotCgroup:
        """A cgroup for a new slot. Raises OSError."""
        self._schedule_round()
        return self._prepared.popleft() if self._prepared else self._make()

    def give_back(self, cgroup: SlotCgroup) -> None:
        """Have the cgroup of a dead slot removed."""
        self._discarded.append(cgroup)
        self._schedule_round()

    def close(self) -> None:
        """Remove all cgroups. Blocks until the last killed process is gone, 5 s at most."""
        self._closed = True
        self._worker.shutdown()
        self._owned.remove()

    def _schedule_round(self) -> None:
        if not self._round_is_due and not self._closed:
            self._round_is_due = True
            self._worker.submit(self._run_round)

    def _run_round(self) -> None:
        """In the thread: remove discarded cgroups and prepare those that will be needed."""
        self._round_is_due = False  # before looking: what is discarded from now on is due again
        try:
            for _ in range(len(self._discarded)):
                cgroup = self._discarded.popleft()
                if not cgroup.remove():
                    self._discarded.append(cgroup)
            while len(self._prepared) < _NUM_PREPARED:
                self._prepared.append(self._make())
        except OSError as error:  # the next `take` fails in the same way and tells its caller
            logger.error("cgroups: %s", error)
            return
        if self._discarded:
            time.sleep(_RETRY_S)
            self._schedule_round()

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


def _divide_own_cgroup() -> OwnedFolder:
    """Make the cgroup below which the slots' cgroups are made."""
    own, mount_point = own_cgroup()
    # An earlier sandbox of this process has moved it already.
    base = own.parent if own.name == _SERVICE else own
    offered = (base / "cgroup.controllers").read_text().split()
    missing = [name for name in _REQUIRED if name not in offered]
    if missing:
        raise CgroupUnavailableError(f"{base} has no controller {' and '.join(missing)}")
    if not os.access(base / "cgroup.subtree_control", os.W_OK):
        raise CgroupUnavailableError(f"{base} is not writable for this user")
    if os.geteuid() == 0 and base != mount_point and not _is_delegated(base):
        raise CgroupUnavailableError(f"{base} is systemd's own: its unit lacks Delegate=yes")
    # The machine's root cgroup, alone in having no type, may hold processes and be divided.
    if (base / "cgroup.type").exists():
        _vacate(base, everybody=base == mount_point)
    _enable_controllers(base)
    # A cgroup holds no files but the kernel's, so one of these carries the lock.
    owned = OwnedFolder.create(base, _SLOTS, lock_name=_PROCS, remove=_remove_with_children)
    try:
        _enable_controllers(owned.path)
        # For all slots together; without it a program at its limit would be written to disk.
        with contextlib.suppress(FileNotFoundError):  # a kernel without swap
            _write(owned.path / "memory.swap.max", "0")
        if not (owned.path / "memory.peak").exists():
            raise CgroupUnavailableError("this kernel's cgroups have no memory.peak (Linux 5.19)")
    except BaseException:
        owned.remove()
        raise
    return owned


def _is_delegated(base: Path) -> bool:
    """Whether this cgroup is delegated, or no systemd manages it."""
    # Root can write into any cgroup, so that its rights say nothing.
    if not _SYSTEMD.is_dir():
        return True
    for folder in [base, *base.parents]:
        for mark in ("user.delegate", "trusted.delegate"):
            with contextlib.suppress(OSError):
                if os.getxattr(folder, mark) == b"1":
                    return True
    return False


def _vacate(base: Path, *, everybody: bool) -> None:
    """Move the processes of a cgroup into a child of it: only an empty one can be divided.

    Args:
        everybody: move other processes as well, as in a container, where all belong together.
    """
    pids = [int(pid) for pid in (base / _PROCS).read_text().split()]
    others = [pid for pid in pids if pid != os.getpid()]
    if others and (not everybody or 0 in others):  # 0 stands for one in another pid namespace
        shown = ", ".join(str(pid) for pid in others[:5])
        raise CgroupUnavailableError(f"{base} also holds other processes ({shown})")
    (base / _SERVICE).mkdir(exist_ok=True)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            _write(base / _SERVICE / _PROCS, str(pid))


def _enable_controllers(folder: Path) -> None:
    """Make the controllers available to the children."""
    offered = (folder / "cgroup.controllers").read_text().split()
    wanted = " ".join(f"+{name}" for name in _WANTED if name in offered)
    _write(folder / "cgroup.subtree_control", wanted)


def _remove_with_children(folder: Path) -> None:
    """Remove the cgroup of a service with those of its slots, killing what is left in them."""
    children = [SlotCgroup(child, 0) for child in folder.iterdir() if child.is_dir()]
    give_up = time.monotonic() + _REMOVAL_S
    while children and time.monotonic() < give_up:
        children = [child for child in children if not child.remove()]
        if children:
            time.sleep(_RETRY_S)
    try:
        folder.rmdir()
    except OSError as error:
        logger.warning("%s could not be removed: %s", folder, error)


def _write(file: Path, text: str) -> None:
    """Write a setting in one call, as the kernel wants it. Raises OSError that names the file."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error
    finally:
        os.close(descriptor)

"""The memory of slots, counted from /proc where no cgroup is delegated.

A process of its own does it, which the factory forks: looking at many processes with many mappings
takes seconds, and a zygote has slots to fork and to reap. Zygotes send it the slots to watch. It
tells the zygote which one it kills, and then kills it.

The cheap upper bound, resident pages and page tables of every process, is read first. Only if it
exceeds the limit is the proportional set size summed: it counts pages that forks share with the
zygote once. A process that does not let itself be looked at counts in full.
"""

import contextlib
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

from services.tool.sandbox.inside import kernel
from services.tool.sandbox.plan import Level, Plan

_INTERVAL_S = 0.05
_PAUSES_PER_SCAN = 3.0
"""A scan that took much CPU time is followed by a pause this many times as long."""
_IDLE_PIDS = (1, 3)
"""Pids in a room of its first process (launcher.py) and of the slot's memory helper (slot.py). Both
only share the memory of others, and live as long as the room, so nobody else gets these pids."""
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_NO_UID = -1
_ORDER = struct.Struct("<IIiQ")
"""Slot, pid of its first process, its user id, limit in bytes (0 ends the watch)."""
_KILL = struct.Struct("<I")
"""Slot that is about to be killed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Watched:
    """A slot under watch."""

    zygote: socket.socket
    number: int
    pid: int
    uid: int
    limit_bytes: int
    kill_fd: int
    roots: frozenset[int]
    """Pids from which its processes descend: its first one and, at level full, the first one of
    its room, which inherits orphans."""


class Link:
    """A zygote's end."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._killed: set[int] = set()

    def watch(self, number: int, pid: int, uid: int | None, limit_bytes: int, kill_fd: int) -> None:
        """Watch a slot. Raises OSError when the watchdog is gone."""
        order = _ORDER.pack(number, pid, _NO_UID if uid is None else uid, limit_bytes)
        socket.send_fds(self._sock, [order], [kill_fd])

    def forget(self, number: int) -> bool:
        """End the watch of a dead slot. Returns whether the watchdog killed it. Raises OSError."""
        self._sock.send(_ORDER.pack(number, 0, _NO_UID, 0))
        with contextlib.suppress(BlockingIOError):
            while data := self._sock.recv(_KILL.size, socket.MSG_DONTWAIT):
                self._killed.add(_KILL.unpack(data)[0])
        killed = number in self._killed
        self._killed.discard(number)
        return killed


def start(plan: Plan, proc: int | None) -> list[Link]:
    """Fork the watchdog; returns one end for each zygote. Without /proc it watches nothing."""
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in plan.presets]
    if os.fork() == 0:
        try:
            kernel.die_with_parent(signal.SIGKILL)
            for channel in plan.channels:
                os.close(channel)
            for _, theirs in pairs:
                theirs.close()
            _Watchdog(plan.level, proc, [ours for ours, _ in pairs]).serve()
        finally:
            os._exit(1)
    for ours, _ in pairs:
        ours.close()
    return [Link(theirs) for _, theirs in pairs]


class _Watchdog:
    def __init__(self, level: Level, proc: int | None, zygotes: list[socket.socket]) -> None:
        self._level = level
        self._proc = proc
        self._zygotes = {zygote.fileno(): zygote for zygote in zygotes}
        self._watched: dict[tuple[int, int], _Watched] = {}
        """By the zygote's descriptor and the number of the slot."""

    def serve(self) -> NoReturn:
        pause_s: float | None = None
        while True:
            began = time.monotonic()
            ready, _, _ = select.select(self._zygotes, [], [], pause_s)
            for descriptor in ready:
                self._obey(descriptor)
            if not self._watched or self._proc is None:
                pause_s = None
                continue
            waited_s = time.monotonic() - began
            if pause_s is not None and waited_s < pause_s:
                pause_s -= waited_s  # an order came in between: the scan is not due yet
                continue
            scan_s = self._scan(self._proc) if pause_s is not None else 0.0
            pause_s = max(_INTERVAL_S, scan_s * _PAUSES_PER_SCAN)

    def _obey(self, descriptor: int) -> None:
        zygote = self._zygotes[descriptor]
        data, descriptors, _, _ = socket.recv_fds(zygote, _ORDER.size, 1)
        if not data:
            os._exit(1)  # a zygote is gone, and the launcher with it
        number, pid, uid, limit_bytes = _ORDER.unpack(data)
        before = self._watched.pop((descriptor, number), None)
        if before is not None:
            os.close(before.kill_fd)
        if limit_bytes and descriptors and self._proc is not None:
            self._watched[descriptor, number] = _Watched(
                zygote=zygote,
                number=number,
                pid=pid,
                uid=uid,
                limit_bytes=limit_bytes,
                kill_fd=descriptors[0],
                roots=frozenset((pid, _pid_behind(self._proc, descriptors[0]))),
            )
        else:
            for each in descriptors:
                os.close(each)

    def _scan(self, proc: int) -> float:
        """Kill the slots whose processes together hold more than allowed. Returns CPU seconds."""
        began = time.process_time()  # on a busy machine the scan also waits, and must not be rarer
        census = _Census(proc, self._level, list(self._watched.values()))
        for key, slot in list(self._watched.items()):
            if census.memory_bytes(slot) > slot.limit_bytes:
                slot.zygote.send(_KILL.pack(slot.number))
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(slot.kill_fd, signal.SIGKILL)
                os.close(slot.kill_fd)
                del self._watched[key]
        return time.process_time() - began


@dataclass(frozen=True, slots=True, kw_only=True)
class _Process:
    """What /proc shows of a process to everybody, also of one that cannot be inspected."""

    parent: int
    uid: int
    inner_pid: int
    """Pid in the innermost namespace."""
    resident_bytes: int
    table_bytes: int
    """Page tables, which no limit of the kernel counts for a process."""


class _Census:
    """Which process belongs to which slot, read once from `proc`, a descriptor of /proc."""

    def __init__(self, proc: int, level: Level, slots: list[_Watched]) -> None:
        self._proc = proc
        self._level = level
        self._processes: dict[int, _Process] = {}
        # At level basic nothing can fork, so a slot's first process is all of it.
        pids = (
            _listing(proc, ".") if level is not Level.BASIC else [str(each.pid) for each in slots]
        )
        for pid in map(int, filter(str.isdigit, pids)):
            found = _look_at(proc, pid)
            if found is not None:
                self._processes[pid] = found

    def memory_bytes(self, slot: _Watched) -> int:
        """Memory of a slot; exact only above its limit."""
        members = [pid for pid, each in self._processes.items() if self._belongs(pid, each, slot)]
        tables = sum(self._processes[pid].table_bytes for pid in members)
        resident = sum(self._processes[pid].resident_bytes for pid in members)
        if tables + resident <= slot.limit_bytes:
            return tables + resident
        return tables + sum(self._proportional_bytes(pid) for pid in members)

    def _belongs(self, pid: int, process: _Process, slot: _Watched) -> bool:
        if self._level is Level.UID:
            return process.uid == slot.uid
        if self._level is Level.FULL and process.inner_pid in _IDLE_PIDS:
            return False
        for _ in range(len(self._processes)):  # a process that ended in between may close a circle
            if pid in slot.roots:
                return True
            found = self._processes.get(pid)
            if found is None:
                return False
            pid = found.parent
        return False

    def _proportional_bytes(self, pid: int) -> int:
        for task in _tasks(self._proc, pid):
            lines = _read(self._proc, f"{task}/smaps_rollup").splitlines()
            sizes = [
                int(line.split()[1]) for line in lines if line.startswith((b"Pss:", b"SwapPss:"))
            ]
            if sizes:
                return sum(sizes) * 1024
        # It does not let itself be looked at, or it has died since.
        found = _look_at(self._proc, pid)
        return 0 if found is None else found.resident_bytes


def baseline_bytes(proc: int | None) -> int:
    """Data and stack of the calling process in bytes, as RLIMIT_DATA counts them; 0 if unknown."""
    if proc is None:
        return 0
    fields = _read(proc, "self/statm").split()
    return int(fields[5]) * _PAGE_BYTES


def _look_at(proc: int, pid: int) -> _Process | None:
    fields: dict[bytes, list[bytes]] = {}
    for task in _tasks(proc, pid):
        lines = _read(proc, f"{task}/status").splitlines()
        fields |= {name: rest.split() for name, _, rest in (each.partition(b":") for each in lines)}
        if b"VmRSS" in fields:
            break
    if b"PPid" not in fields:
        return None
    return _Process(
        parent=int(fields[b"PPid"][0]),
        uid=int(fields[b"Uid"][0]),
        inner_pid=int(fields.get(b"NSpid", [b"0"])[-1]),
        resident_bytes=int(fields.get(b"VmRSS", [b"0"])[0]) * 1024,
        table_bytes=int(fields.get(b"VmPTE", [b"0"])[0]) * 1024,
    )


def _tasks(proc: int, pid: int) -> Iterator[str]:
    """Where below /proc a process's memory may show: not at its first thread if that has ended."""
    yield str(pid)
    yield from (f"{pid}/task/{name}" for name in _listing(proc, f"{pid}/task"))


def _pid_behind(proc: int, descriptor: int) -> int:
    """The pid of the process that a pid descriptor leads to."""
    for line in _read(proc, f"self/fdinfo/{descriptor}").splitlines():
        if line.startswith(b"Pid:"):
            return int(line.split()[1])
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

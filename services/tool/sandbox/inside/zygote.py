"""A zygote: an interpreter with its libraries loaded and warmed, which forks slots and reaps them.

It never sees a request: code reaches a slot on the slot's own socket, after the slot is fenced.
What the zygote tells the API process about a slot is what the kernel told it: wait status, resource
usage, the sum of memory (channel.py).

After each fork, every memory page that the zygote touches has to be copied, because the child
shares it. So it does little: the factory builds the rooms, and messages are fixed records.
"""

import gc
import os
import select
import signal
import socket
from dataclasses import dataclass, field
from typing import NoReturn

from services.tool.sandbox import channel
from services.tool.sandbox.channel import Event
from services.tool.sandbox.inside import (
    filesystem,
    janitor,
    kernel,
    preload,
    slot,
    watchdog,
)
from services.tool.sandbox.inside.snippet import ending, program
from services.tool.sandbox.plan import BOX, Level, Plan

_REHEARSALS = 20  # CPython 3.11 specialises a function from its eighth call on


@dataclass(slots=True, kw_only=True)
class _Slot:
    """One forked slot, from fork to reaping."""

    number: int
    pid: int
    pid_fd: int
    """Pid descriptor of the slot's first process: readable when it is dead."""
    kill_fd: int
    """Pid descriptor of the slot's room at level full, of its first process otherwise."""
    uid: int | None
    folder: str | None
    watched: bool = False
    """Whether the watchdog looks at its memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ways:
    """Descriptors that zygotes inherit from the factory."""

    proc: int | None
    """/proc of the zygotes' pid namespace, where it can be seen."""
    outside: int
    """Pid descriptor that leads out of every room; -1 below level full."""
    leftovers: int
    """Pipe to the janitor."""
    watchdogs: list[watchdog.Link]
    """One for each zygote."""


@dataclass(slots=True, kw_only=True)
class _Zygote:
    plan: Plan
    preset: str
    channel: socket.socket
    factory: socket.socket
    ways: Ways
    watchdog: watchdog.Link
    fences: slot.Fences
    slots: dict[int, _Slot] = field(default_factory=dict)
    """Live slots by their pid descriptor."""
    poller: select.poll = field(default_factory=select.poll)


def run(plan: Plan, factories: list[socket.socket], ways: Ways) -> NoReturn:
    """Load a preset, fork a child for the next one and serve this one. Never returns."""
    index = 0
    while True:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        kernel.die_with_parent(signal.SIGKILL)
        _load(plan, plan.presets[index], factories[index], ways)
        # The child loads the next preset on top of this one, so both share its memory.
        if index + 1 == len(plan.presets) or os.fork() != 0:
            break
        index += 1
    if plan.level is Level.BASIC:
        preload.tolerate_refused_attributes()
    for other in range(len(plan.presets)):
        if other != index:
            os.close(plan.channels[other])
            factories[other].close()
    try:
        zygote = _Zygote(
            plan=plan,
            preset=plan.presets[index],
            channel=socket.socket(fileno=plan.channels[index]),
            factory=factories[index],
            ways=ways,
            watchdog=ways.watchdogs[index],
            fences=slot.prepare_fences(plan, watchdog.baseline_bytes(ways.proc)),
        )
        _serve(zygote)
    finally:
        os._exit(1)


def _load(plan: Plan, preset: str, factory: socket.socket, ways: Ways) -> None:
    """Load a preset where it can write: in a room, or in a folder for the janitor."""
    if plan.level is Level.FULL:
        factory.send(b"r")
        room = _receive_room(factory)
        filesystem.enter_room(room)
        preload.load(preset, f"{BOX}/tmp")
        filesystem.enter_room(ways.outside)
        signal.pidfd_send_signal(room, signal.SIGKILL)
        os.close(room)
        return
    folder = f"{plan.work_root}/{preset}"
    os.mkdir(folder)
    preload.load(preset, folder)
    janitor.hand_over(ways.leftovers, folder)


def _serve(zygote: _Zygote) -> None:
    program.prepare(zygote.plan.max_open_files)
    for _ in range(_REHEARSALS):
        program.rehearse_fork()
        program.rehearse()
        ending.rehearse()
    collapsed = preload.collapse_heap(zygote.ways.proc)
    # A collection writes into the header of every object, so it would copy every page that is
    # shared with the slots.
    gc.collect()
    gc.freeze()
    gc.disable()
    _request_room(zygote)
    zygote.channel.send(Event(channel.READY, collapsed).encode())
    zygote.poller.register(zygote.channel.fileno(), select.POLLIN)
    while True:
        for descriptor, _ in zygote.poller.poll():
            if descriptor in zygote.slots:
                _reap(zygote, zygote.slots[descriptor])
            elif not _obey(zygote):
                return


def _obey(zygote: _Zygote) -> bool:
    """Carry out one order. False: the API process is gone."""
    message, descriptors, _, _ = socket.recv_fds(zygote.channel, channel.ORDER.size, 1)
    if not message:
        return False
    kind, number, limit_bytes = channel.ORDER.unpack(message)
    if kind == channel.SPAWN:
        _spawn(zygote, number, descriptors)
        return True
    for child in zygote.slots.values():
        if child.number != number:
            continue
        if kind == channel.KILL:
            signal.pidfd_send_signal(child.pid_fd, signal.SIGKILL)
        else:
            child.watched = True
            zygote.watchdog.watch(number, child.pid, child.uid, limit_bytes, child.kill_fd)
    return True


def _request_room(zygote: _Zygote) -> None:
    if zygote.plan.level is Level.FULL:
        zygote.factory.send(b"r")


def _receive_room(factory: socket.socket) -> int:
    """Take the room that was requested before."""
    data, descriptors, _, _ = socket.recv_fds(factory, 1, 1)
    if not data or not descriptors:
        raise ConnectionError("the factory of rooms is gone")
    return descriptors[0]


def _spawn(zygote: _Zygote, number: int, cgroup: list[int]) -> None:
    """Fork a slot. `cgroup` holds the descriptor that leads into its cgroup, or nothing."""
    plan = zygote.plan
    full = plan.level is Level.FULL
    folder = slot.folder_of(plan, f"{os.getpid()}-{number}")
    uid = _free_uid(zygote, number)
    stdin, stdout, stderr = os.pipe(), os.pipe(), os.pipe()
    ours, theirs = (sock.detach() for sock in socket.socketpair())
    room = _receive_room(zygote.factory) if full else -1
    if full:
        filesystem.enter_room(room)
    # The slot starts in the room that its parent stands in; only a fork enters a pid namespace.
    pid = os.fork()
    if pid == 0:
        slot.enter(zygote.fences, (stdin[0], stdout[1], stderr[1], theirs), uid, folder, cgroup)
    pid_fd = os.pidfd_open(pid)
    if full:
        filesystem.enter_room(zygote.ways.outside)
        _request_room(zygote)  # the factory builds the next one while this slot runs
    kill_fd = room if full else pid_fd  # the death of a room's first process kills all inside
    zygote.slots[pid_fd] = _Slot(
        number=number, pid=pid, pid_fd=pid_fd, kill_fd=kill_fd, uid=uid, folder=folder
    )
    zygote.poller.register(pid_fd, select.POLLIN)
    handed = (ours, stdin[1], stdout[0], stderr[0])
    event = Event(channel.SLOT, number).encode()
    # Not the room: all processes of a slot dying at once would hold up the one that is waited for.
    socket.send_fds(zygote.channel, [event], (*handed, pid_fd))
    for descriptor in (*handed, theirs, stdin[0], stdout[1], stderr[1], *cgroup):
        os.close(descriptor)


def _free_uid(zygote: _Zygote, number: int) -> int | None:
    """A user id that no live slot of this zygote has. At level full, 0 is the zygote's own."""
    plan = zygote.plan
    if plan.uid_base is None:
        return None
    first = 0 if plan.level is Level.FULL else plan.uid_base
    width = (plan.uid_count - 1) // len(plan.presets)
    start = first + 1 + plan.presets.index(zygote.preset) * width
    taken = {child.uid for child in zygote.slots.values()}
    for step in range(width):
        uid = start + (number + step) % width
        if uid not in taken:
            return uid
    raise RuntimeError(f"all {width} user ids of zygote {zygote.preset} are in use")


def _reap(zygote: _Zygote, child: _Slot) -> None:
    """Collect a dead slot, report what the kernel says about it, and kill what it left behind."""
    soft_cpu_s = kernel.soft_cpu_limit_s(child.pid)
    _, status, usage = os.wait4(child.pid, 0)
    del zygote.slots[child.pid_fd]
    zygote.poller.unregister(child.pid_fd)
    too_large = child.watched and zygote.watchdog.forget(child.number)
    cpu_s, peak_bytes = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
    ended = Event(channel.EXIT, child.number, status, cpu_s, peak_bytes, too_large, soft_cpu_s)
    # At level full the slot's other processes die with the room.
    has_room = child.kill_fd != child.pid_fd
    # Without user ids of their own, slots share a limit of processes: what this one left must be
    # dying when the next program starts.
    if has_room and child.uid is None:
        _kill(child)
    # On this event the caller gets its answer. Many processes with many mappings die slowly and
    # leave this one no time, so others are killed after it.
    zygote.channel.send(ended.encode())
    if has_room:
        if child.uid is not None:
            _kill(child)
        os.close(child.kill_fd)
    os.close(child.pid_fd)
    # At level uid they are found by their user id, which the next slot may get after this.
    if child.uid is not None and zygote.plan.level is not Level.FULL:
        slot.sweep(child.uid)
    if child.folder is not None:
        janitor.hand_over(zygote.ways.leftovers, child.folder)


def _kill(child: _Slot) -> None:
    try:  # not by contextlib, which would cost every program page copies
        signal.pidfd_send_signal(child.kill_fd, signal.SIGKILL)
    except ProcessLookupError:
        return

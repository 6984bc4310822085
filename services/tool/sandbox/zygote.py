"""A zygote: an interpreter with its libraries loaded and warmed, that forks isolated slots and
reaps them.

It never sees a request: code reaches a slot on the slot's own socket, after the slot is fenced.
What the zygote tells the API process about a slot is what the kernel told it: wait status, resource
usage, the sum of memory.

    API -> zygote   {"op": "spawn"} | {"op": "watch", "slot": n, "bytes": limit} | {"op": "kill",
    "slot": n} zygote -> API   {"event": "ready", ...}
                    {"event": "slot", "slot": n}  with descriptors [job, stdin, stdout, stderr, kill
                    target] {"event": "exit", "slot": n, "status": wait status, "cpu_s": s,
                    "peak_bytes": b, "reason": r}
"""

import gc
import json
import os
import select
import signal
import socket
from dataclasses import dataclass, field
from typing import Any, NoReturn

from services.tool.sandbox import harness, kernel, preload, slot, watchdog
from services.tool.sandbox.plan import Level, Plan

MESSAGE_BYTES = 1 << 16
_WATCH_INTERVAL_MS = 50


def load_before_root_changes() -> None:
    """Import what needs the machine's own files: after the root changes they are gone."""
    slot.load_landlock()


@dataclass(slots=True, kw_only=True)
class _Slot:
    """One forked slot, from fork to reaping."""

    number: int
    pid: int
    pid_fd: int
    """Pid descriptor of the slot's first process: readable when it is dead."""
    kill_fd: int
    """Pid descriptor of the slot's init at level full, of the first process otherwise."""
    uid: int | None
    folder: str | None
    limit_bytes: int = 0
    """Memory limit on the sum of the slot's processes; 0 while nobody asks for a watch."""
    reason: str = ""


@dataclass(slots=True, kw_only=True)
class _Zygote:
    plan: Plan
    preset: str
    channel: socket.socket
    factory: socket.socket
    proc: int | None
    fences: slot.Fences
    slots: dict[int, _Slot] = field(default_factory=dict)
    """Live slots by their pid descriptor."""
    poller: select.poll = field(default_factory=select.poll)
    next_number: int = 0
    init_fd: int = -1
    """Pid descriptor of the next slot's init, made ahead; -1 below level full."""


def run(plan: Plan, factories: list[socket.socket], proc: int | None) -> NoReturn:
    """Load preset after preset; fork a child for the next one and serve the current one. Never
    returns."""
    index = 0
    while True:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        kernel.die_with_parent(signal.SIGKILL)
        preload.load(plan.presets[index])
        if index + 1 == len(plan.presets) or os.fork() != 0:
            break
        index += 1
    for other in range(len(plan.presets)):
        if other != index:
            os.close(plan.channels[other])
            factories[other].close()
    channel = socket.socket(fileno=plan.channels[index])
    try:
        zygote = _Zygote(
            plan=plan,
            preset=plan.presets[index],
            channel=channel,
            factory=factories[index],
            proc=proc,
            fences=slot.prepare_fences(plan, watchdog.baseline_bytes(proc) if proc else 0),
        )
        _serve(zygote)
    finally:
        os._exit(1)


def _serve(zygote: _Zygote) -> None:
    harness.open_streams()
    collapsed = preload.collapse_heap(zygote.proc)
    gc.collect()
    gc.freeze()
    gc.disable()
    _request_init(zygote)
    _tell(zygote, {"event": "ready", "watchdog": zygote.proc is not None, "collapsed": collapsed})
    channel, factory = zygote.channel.fileno(), zygote.factory.fileno()
    zygote.poller.register(channel, select.POLLIN)
    zygote.poller.register(factory, select.POLLIN)
    while True:
        watched = any(child.limit_bytes for child in zygote.slots.values())
        ready = [fd for fd, _ in zygote.poller.poll(_WATCH_INTERVAL_MS if watched else None)]
        for descriptor in ready:
            if descriptor in zygote.slots:
                _reap(zygote, zygote.slots[descriptor])
        if factory in ready and not _receive_init(zygote):
            return
        if channel in ready:
            message = zygote.channel.recv(MESSAGE_BYTES)
            if not message:
                return
            _obey(zygote, json.loads(message))
        if watched:
            _watch(zygote)


def _obey(zygote: _Zygote, message: dict[str, Any]) -> None:
    if message["op"] == "spawn":
        _spawn(zygote)
        return
    for child in zygote.slots.values():
        if child.number == message["slot"]:
            if message["op"] == "watch":
                child.limit_bytes = message["bytes"]
            else:
                _kill(child)


def _tell(zygote: _Zygote, event: dict[str, Any], descriptors: tuple[int, ...] = ()) -> None:
    body = json.dumps(event).encode()
    if descriptors:
        socket.send_fds(zygote.channel, [body], descriptors)
    else:
        zygote.channel.send(body)


def _request_init(zygote: _Zygote) -> None:
    if zygote.plan.level is Level.FULL:
        zygote.factory.send(b"i")


def _receive_init(zygote: _Zygote) -> bool:
    """Take the init made ahead from the factory. False: the factory is gone."""
    data, descriptors, _, _ = socket.recv_fds(zygote.factory, 16, 1)
    if not data or not descriptors:
        return False
    zygote.init_fd = descriptors[0]
    return True


def _spawn(zygote: _Zygote) -> None:
    plan = zygote.plan
    number = zygote.next_number
    zygote.next_number += 1
    if plan.level is Level.FULL:
        if zygote.init_fd < 0 and not _receive_init(zygote):
            raise ConnectionError("the factory of slot inits is gone")
        kernel.setns(zygote.init_fd, kernel.CLONE_NEWPID)
    folder = slot.make_folder(plan, f"{os.getpid()}-{number}")
    uid = _free_uid(zygote)
    stdin, stdout, stderr = os.pipe(), os.pipe(), os.pipe()
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        slot.enter(zygote.fences, (stdin[0], stdout[1], stderr[1], theirs.fileno()), uid, folder)
    theirs.close()
    for descriptor in (stdin[0], stdout[1], stderr[1]):
        os.close(descriptor)
    pid_fd = os.pidfd_open(pid)
    kill_fd = zygote.init_fd if plan.level is Level.FULL else pid_fd
    zygote.init_fd = -1
    _request_init(zygote)
    zygote.slots[pid_fd] = _Slot(
        number=number, pid=pid, pid_fd=pid_fd, kill_fd=kill_fd, uid=uid, folder=folder
    )
    zygote.poller.register(pid_fd, select.POLLIN)
    handed = (ours.fileno(), stdin[1], stdout[0], stderr[0], kill_fd)
    _tell(zygote, {"event": "slot", "slot": number}, handed)
    ours.close()
    for descriptor in (stdin[1], stdout[0], stderr[0]):
        os.close(descriptor)


def _free_uid(zygote: _Zygote) -> int | None:
    """An id of the range that no live slot of this zygote has. Id 0 is the zygote's own at level
    full."""
    plan = zygote.plan
    if plan.uid_base is None:
        return None
    first = 0 if plan.level is Level.FULL else plan.uid_base
    width = (plan.uid_count - 1) // len(plan.presets)
    start = first + 1 + plan.presets.index(zygote.preset) * width
    taken = {child.uid for child in zygote.slots.values()}
    offset = zygote.next_number
    for step in range(width):
        uid = start + (offset + step) % width
        if uid not in taken:
            return uid
    raise RuntimeError(f"all {width} user ids of zygote {zygote.preset} are in use")


def _reap(zygote: _Zygote, child: _Slot) -> None:
    """Collect a dead slot, kill what it left behind, and report what the kernel says about it."""
    _, status, usage = os.wait4(child.pid, 0)
    del zygote.slots[child.pid_fd]
    zygote.poller.unregister(child.pid_fd)
    if child.kill_fd != child.pid_fd:
        _kill(child)
        os.close(child.kill_fd)
    os.close(child.pid_fd)
    if child.uid is not None and zygote.plan.level is not Level.FULL:
        slot.sweep(child.uid)
    slot.remove_folder(child.folder)
    event = {
        "event": "exit",
        "slot": child.number,
        "status": status,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
        "reason": child.reason,
    }
    _tell(zygote, event)


def _kill(child: _Slot) -> None:
    try:
        signal.pidfd_send_signal(child.kill_fd, signal.SIGKILL)
    except ProcessLookupError:
        return  # already dead: the goal is reached


def _watch(zygote: _Zygote) -> None:
    """Kill the slots whose processes together hold more memory than allowed."""
    if zygote.proc is None:
        return
    census = watchdog.Census(zygote.proc, zygote.plan.level)
    for child in zygote.slots.values():
        limit = child.limit_bytes
        if limit and not child.reason and census.memory_bytes(child.pid, child.uid, limit) > limit:
            child.reason = "memory"
            _kill(child)

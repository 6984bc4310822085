"""The launcher and the factory: clean processes behind the outer fences, parents of the zygotes.

host/launcher_handle.py starts the launcher with a fixed environment, the plan on standard input
and one channel per zygote. At level `full` it enters its own namespaces; as root it first builds
the directory tree with root's rights, then gives them up for a range of unprivileged user ids. It
forks the factory, which forks the first zygote and then builds rooms. The launcher dies with the
API process, and everything below dies with the launcher.

A room is what a slot of level `full` has to itself: a pid namespace, an ipc namespace and a mount
namespace with an empty tmpfs. Its first process is idle: it keeps the room open, and its death
kills everybody inside.
"""

import contextlib
import os
import select
import signal
import socket
import sys
from typing import NoReturn

from services.tool.sandbox.inside import filesystem, janitor, kernel, watchdog, zygote
from services.tool.sandbox.plan import Level, Plan

_NAMESPACES = (
    kernel.CLONE_NEWUSER
    | kernel.CLONE_NEWNS
    | kernel.CLONE_NEWPID
    | kernel.CLONE_NEWNET
    | kernel.CLONE_NEWIPC
    | kernel.CLONE_NEWUTS
)
_IDLE = kernel.CLONE_FILES | signal.SIGCHLD
_STACKS = 2048  # more than there can be slots: each has a user id or a session of its own


def main() -> None:
    """Read the plan, enter the namespaces, fork the factory and wait for it."""
    kernel.die_with_parent(signal.SIGKILL)
    plan = Plan.from_json(sys.stdin.read())
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)
    # Snippets import from the packages first, and never from this repository.
    sys.path[:] = [*plan.package_paths, *(path for path in sys.path if path != plan.code_root)]
    if plan.uid_base is not None:
        os.setgroups([])  # root's groups would otherwise reach every slot
    if plan.level is Level.FULL:
        _enter_namespaces(plan)
        kernel.die_with_parent(signal.SIGKILL)  # new credentials have cleared it
    # The launcher itself stays outside of its new pid namespace; the factory is pid 1 in there.
    factory = os.fork()
    if factory == 0:
        _run_factory(plan)
    for channel in plan.channels:
        os.close(channel)  # or the API process would not notice when a zygote dies
    os.waitpid(factory, 0)


def _enter_namespaces(plan: Plan) -> None:
    if plan.uid_base is None:
        uid, gid = os.getuid(), os.getgid()
        kernel.unshare(_NAMESPACES)
        # Without privileges the kernel takes a gid map only once setgroups is denied.
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{uid} {uid} 1")
        _write("/proc/self/gid_map", f"{gid} {gid} 1")
        filesystem.build_root(plan)
        return
    # The tree comes first: the unprivileged ids may not read all that root binds into it.
    kernel.unshare(kernel.CLONE_NEWNS)
    filesystem.build_root(plan)
    _map_range(plan.uid_base, plan.uid_count)
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    kernel.run([kernel.allowing_inspection()])


def _map_range(base: int, count: int) -> None:
    """Enter new namespaces in which ids 0..count-1 are the host's base..base+count-1.

    Only a process outside of the new user namespace may write such a map, so a child that stays
    behind does it.
    """
    ready, go = os.pipe()
    parent = os.getpid()
    writer = os.fork()
    if writer == 0:
        status = 1
        try:
            os.read(ready, 1)
            for name in ("uid_map", "gid_map"):
                _write(f"/proc/{parent}/{name}", f"0 {base} {count}")
            status = 0
        finally:
            os._exit(status)
    kernel.unshare(_NAMESPACES)
    os.write(go, b"x")
    _, status = os.waitpid(writer, 0)
    os.close(ready)
    os.close(go)
    if status != 0:
        raise PermissionError("the user id map of the sandbox could not be written")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _run_factory(plan: Plan) -> NoReturn:
    """Fork the first zygote, then build rooms until any zygote or the launcher is gone."""
    kernel.die_with_parent(signal.SIGKILL)
    proc = _open_proc(plan)
    watchdogs = watchdog.start(plan, proc)  # while there is nothing else that it would hold open
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in plan.presets]
    builder = _RoomBuilder(plan) if plan.level is Level.FULL else None
    names, leftovers = janitor.open_pipe()
    if os.fork() == 0:
        for ours, _ in pairs:
            ours.close()
        ends = [theirs for _, theirs in pairs]
        os.close(names)
        outside = builder.outside if builder is not None else -1
        ways = zygote.Ways(proc=proc, outside=outside, leftovers=leftovers, watchdogs=watchdogs)
        zygote.run(plan, ends, ways)
    for channel in plan.channels:
        os.close(channel)
    for _, theirs in pairs:
        theirs.close()
    watchdogs.clear()
    zygotes = [ours for ours, _ in pairs]
    if builder is not None:
        with contextlib.suppress(ConnectionError):  # a zygote died in between
            builder.serve(zygotes)
    else:
        _keep_janitor(plan, names, zygotes)
    # Without one of its zygotes a launcher has to be replaced: this exit ends the others as well.
    os._exit(1)


def _keep_janitor(plan: Plan, names: int, zygotes: list[socket.socket]) -> None:
    """Have one janitor at all times; return when a zygote is gone."""
    while True:
        helper = janitor.start(names, plan.work_root)
        # They never write: a zygote's socket is readable once it is gone.
        gone = [zygote.fileno() for zygote in zygotes]
        ready, _, _ = select.select([helper, *gone], [], [])
        if ready != [helper]:
            return
        os.waitid(os.P_PIDFD, helper, os.WEXITED)
        os.close(helper)


def _open_proc(plan: Plan) -> int | None:
    """Open /proc of this pid namespace, None if the host forbids it. At level full, enter the
    jail."""
    if plan.level is not Level.FULL:
        return os.open("/proc", os.O_PATH | os.O_DIRECTORY)
    proc = None
    with contextlib.suppress(PermissionError):  # some hosts mask /proc; there is no watchdog then
        flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
        kernel.mount("proc", "/proc", "proc", flags)
        proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
    filesystem.enter_jail()
    return proc


class _RoomBuilder:
    """Builds rooms ahead of the slots. Its process must be the first of its pid namespace and have
    the jail as its root directory.

    It is small and never forks. The zygotes are large and fork all the time, and after each fork
    every memory page they touch has to be copied, so they only enter a room, fork and leave it.

    Attributes:
        outside: pid descriptor that leads out of every room.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._stacks = [kernel.new_stack() for _ in range(_STACKS)]
        self._count = 0
        # The idle processes must not find Python's handlers, and the kernel shall reap them and the
        # orphans that they inherit: nobody asks for their status.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        self.outside = self._start_idle_process(0)

    def serve(self, zygotes: list[socket.socket]) -> None:
        """Answer each request byte with a fresh room; return when a zygote is gone."""
        poller = select.poll()
        by_descriptor = {sock.fileno(): sock for sock in zygotes}
        for descriptor in by_descriptor:
            poller.register(descriptor, select.POLLIN)
        while True:
            for descriptor, _ in poller.poll():
                sock = by_descriptor[descriptor]
                if not sock.recv(1):
                    return
                room = self._build()
                socket.send_fds(sock, [b"r"], [room])
                os.close(room)

    def _build(self) -> int:
        """Build one room; returns the pid descriptor of its first process."""
        kernel.unshare(filesystem.ROOM_NAMESPACES)
        filesystem.mount_box(self._plan)
        # A pid namespace begins with its first child, the other two with this process itself,
        # which therefore has to leave them again.
        room = self._start_idle_process(kernel.CLONE_NEWPID)
        filesystem.enter_room(self.outside)
        return room

    def _start_idle_process(self, flags: int) -> int:
        stack = self._stacks[self._count % _STACKS]
        self._count += 1
        return os.pidfd_open(kernel.clone_idle(_IDLE | flags, stack))

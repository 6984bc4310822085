"""Rooms: what a slot of level `full` has to itself, built before the slot exists.

A room is a pid namespace, an ipc namespace and a mount namespace with an empty tmpfs. Its first
process does nothing; it keeps the room open, and its death kills everybody inside. The builder is a
small process that never forks. The zygotes are large and fork all the time: after each fork every
memory page they touch has to be copied, so they only walk in, fork and walk out.
"""

import os
import select
import signal
import socket

from services.tool.sandbox.inside import filesystem, kernel
from services.tool.sandbox.plan import JAIL, Plan

_SHARED = kernel.CLONE_NEWNS | kernel.CLONE_NEWIPC
_IDLE = kernel.CLONE_FILES | signal.SIGCHLD
_STACKS = 2048  # more than there can be slots: each has a user id or a session of its own


class Builder:
    """Builds rooms. The process must be the first of its pid namespace and its root directory the
    jail.

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
        self.outside = self._clone(0)

    def build(self) -> int:
        """Build one room; returns the pid descriptor of its first process."""
        kernel.unshare(_SHARED)
        filesystem.mount_box(self._plan)
        room = self._clone(kernel.CLONE_NEWPID)
        step_into(self.outside)
        return room

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
                room = self.build()
                socket.send_fds(sock, [b"r"], [room])
                os.close(room)

    def _clone(self, flags: int) -> int:
        stack = self._stacks[self._count % _STACKS]
        self._count += 1
        return os.pidfd_open(kernel.clone_idle(_IDLE | flags, stack))


def step_into(room: int) -> None:
    """Move this process into a room; its pid namespace will hold the next children only."""
    kernel.setns(room, _SHARED | kernel.CLONE_NEWPID)
    os.chroot(JAIL)
    os.chdir("/")

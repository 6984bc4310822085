"""The launcher: a clean process that fences itself off, then forks the factory and the zygotes.

Started by engine.py with an empty environment, the plan on standard input, and one channel per
zygote. At level `full` it enters its own namespaces; when root it first builds the directory tree
with root's rights, then gives them up for a range of unprivileged user ids. It dies with the API
process, and everything below dies with it.
"""

import gc
import os
import select
import signal
import socket
import sys
from typing import NoReturn

from services.tool.sandbox import filesystem, kernel, zygote
from services.tool.sandbox.plan import JAIL, Level, Plan

_NAMESPACES = (
    kernel.CLONE_NEWUSER
    | kernel.CLONE_NEWNS
    | kernel.CLONE_NEWPID
    | kernel.CLONE_NEWNET
    | kernel.CLONE_NEWIPC
    | kernel.CLONE_NEWUTS
)


def main() -> None:
    """Read the plan, enter the namespaces, fork the factory and wait for it."""
    kernel.die_with_parent(signal.SIGKILL)
    plan = Plan.from_json(sys.stdin.read())
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)
    zygote.load_before_root_changes()
    sys.path[:] = [*plan.package_paths, *(path for path in sys.path if path != plan.code_root)]
    if plan.level is Level.FULL:
        _enter_namespaces(plan)
        kernel.die_with_parent(signal.SIGKILL)
    factory = os.fork()
    if factory == 0:
        _run_factory(plan)
    for channel in plan.channels:
        os.close(channel)
    os.waitpid(factory, 0)


def _enter_namespaces(plan: Plan) -> None:
    if plan.uid_base is None:
        uid, gid = os.getuid(), os.getgid()
        kernel.unshare(_NAMESPACES)
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{uid} {uid} 1")
        _write("/proc/self/gid_map", f"{gid} {gid} 1")
        filesystem.build_root(plan)
        return
    kernel.unshare(kernel.CLONE_NEWNS)
    filesystem.build_root(plan)
    _map_range(plan.uid_base, plan.uid_count)
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    kernel.allow_inspection()


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
    """Fork the first zygote, then make slot inits on demand until any zygote or the launcher is
    gone."""
    kernel.die_with_parent(signal.SIGKILL)
    proc = _open_proc(plan)
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in plan.presets]
    if os.fork() == 0:
        for ours, _ in pairs:
            ours.close()
        zygote.run(plan, [theirs for _, theirs in pairs], proc)
    for channel in plan.channels:
        os.close(channel)
    for _, theirs in pairs:
        theirs.close()
    # The inits are reaped by the kernel: nobody asks for their status.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gc.freeze()
    gc.disable()
    _serve([ours for ours, _ in pairs])
    os._exit(1)


def _open_proc(plan: Plan) -> int | None:
    """Open /proc of this pid namespace and, at level full, step into the jail. None: no /proc can
    be had."""
    if plan.level is not Level.FULL:
        return os.open("/proc", os.O_PATH | os.O_DIRECTORY)
    proc: int | None = None
    try:
        flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
        kernel.mount("proc", "/proc", "proc", flags)
        proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
    except PermissionError:
        proc = None  # some hosts mask /proc; the watchdog then says that it is absent
    os.chroot(JAIL)
    os.chdir("/")
    return proc


def _serve(zygotes: list[socket.socket]) -> None:
    """Answer each request byte with a pid descriptor of a fresh slot init; return when a zygote is
    gone."""
    poller = select.poll()
    by_descriptor = {sock.fileno(): sock for sock in zygotes}
    for descriptor in by_descriptor:
        poller.register(descriptor, select.POLLIN)
    own_namespace = os.pidfd_open(os.getpid())  # leads back from a slot's pid namespace
    while True:
        for descriptor, _ in poller.poll():
            sock = by_descriptor[descriptor]
            if not sock.recv(1):
                return
            init = _make_init(own_namespace)
            socket.send_fds(sock, [b"i"], [init])
            os.close(init)


def _make_init(own_namespace: int) -> int:
    """Fork pid 1 of a new pid namespace; its death kills the namespace. Returns its pid
    descriptor."""
    kernel.unshare(kernel.CLONE_NEWPID)
    pid = os.fork()
    if pid == 0:
        os.closerange(0, 2**31 - 1)
        while True:
            signal.pause()
    init = os.pidfd_open(pid)
    kernel.setns(own_namespace, kernel.CLONE_NEWPID)
    return init

"""The launcher: a clean process that fences itself off, then forks the factory and the zygotes.

Started by engine.py with an empty environment, the plan on standard input, and one channel per
zygote. At level `full` it enters its own namespaces; when root it first builds the directory tree
with root's rights, then gives them up for a range of unprivileged user ids. It dies with the API
process, and everything below dies with it.
"""

import contextlib
import os
import select
import signal
import socket
import sys
from typing import NoReturn

from services.tool.sandbox.inside import filesystem, kernel, rooms, zygote
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
    if plan.uid_base is not None:
        os.setgroups([])
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
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in plan.presets]
    builder = rooms.Builder(plan) if plan.level is Level.FULL else None
    if os.fork() == 0:
        for ours, _ in pairs:
            ours.close()
        ends = [theirs for _, theirs in pairs]
        zygote.run(plan, ends, proc, builder.outside if builder is not None else -1)
    for channel in plan.channels:
        os.close(channel)
    for _, theirs in pairs:
        theirs.close()
    zygotes = [ours for ours, _ in pairs]
    if builder is not None:
        with contextlib.suppress(ConnectionError):  # a zygote died in between
            builder.serve(zygotes)
    else:
        select.select(zygotes, [], [])  # they never write: readable means gone
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

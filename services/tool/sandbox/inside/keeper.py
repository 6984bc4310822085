"""The keeper: the one process of a slot that never runs foreign code and so can outlive it.

Two uses. A job with files to fetch: the keeper forks the program, waits for it, kills what it left
and reads the files. A session: the keeper owns a chain of processes that hold the interpreter's
state.

    keeper -> holder (state after cell n-1) -> cell process (runs cell n)
      done: the cell process is the new holder, the old one is killed
      died: the old holder wakes up, the state is what it was before the cell

A cell that starts while other threads are alive cannot be forked faithfully: it runs in the holder
itself and its death loses the state. The same holds at level basic, where snippets may not fork at
all.
"""

import base64
import os
import resource
import select
import signal
import socket
import threading
from dataclasses import dataclass, field
from typing import Any, NoReturn

from services.tool.sandbox import wire
from services.tool.sandbox.inside import harness, kernel

_ALL = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)  # what wait4 tells of a dead process
_RESULT_CHARS = 10_000
_MAX_LISTED = 1000


def run_and_collect(job_fd: int, job: wire.Message, place: harness.Place) -> NoReturn:
    """Run a program, then send its wait status and the files that the job asked for."""
    ours, theirs = (sock.detach() for sock in socket.socketpair())
    pid = os.fork()
    if pid == 0:
        os.close(job_fd)
        os.close(ours)
        kernel.die_with_parent(signal.SIGKILL)
        harness.run_program(job, place, lambda report: wire.send(theirs, report))
    os.close(theirs)
    _, status = os.waitpid(pid, 0)
    if place.alone:
        _kill_everything_else()
    report: wire.Message = {"wait_status": status, "files": {}, "missing": {}}
    budget = job["fetch_bytes"]
    for path in job["fetch"]:
        try:
            content = harness.read_file(place.home, path, budget)
        except (OSError, ValueError) as error:
            report["missing"][path] = getattr(error, "strerror", None) or str(error)
            continue
        budget -= len(content)
        report["files"][path] = base64.b64encode(content).decode("ascii")
    report["error"] = _first_error(ours)
    wire.send(job_fd, report)
    os._exit(0)


def _kill_everything_else() -> None:
    """Kill every other process of the slot. Only where `Place.alone` holds, which is checked again.

    A slot of level full has a parent outside of its pid namespace, which reads as 0; a slot of
    level uid has an id of its own, which is not root's.
    """
    if os.getppid() != 0 and os.getuid() == 0:
        raise PermissionError("refusing to sweep: this process could signal the whole machine")
    try:
        os.kill(-1, signal.SIGKILL)
    except ProcessLookupError:
        return  # nothing was left


def _first_error(reports: int) -> Any:
    os.set_blocking(reports, False)
    reader = wire.FrameReader(1 << 16)
    try:
        messages = reader.feed(os.read(reports, 1 << 16))
    except (OSError, wire.FrameError):
        return None
    return messages[0].get("error") if messages else None


@dataclass(slots=True, kw_only=True)
class _Keeper:
    job_fd: int
    holder_fd: int
    far_fd: int
    """The holder's end of `holder_fd`."""
    place: harness.Place
    reader: wire.FrameReader = field(default_factory=lambda: wire.FrameReader(1 << 20))
    holder: int = 0
    """Pid of the process that holds the state; 0 when there is none."""
    cell: int = 0
    """Pid of the process that runs the current cell; 0 when idle."""
    snapshot: bool = False
    spent_s: float = 0.0
    """CPU time that the cell's process had used before the cell."""


def serve(job_fd: int, place: harness.Place) -> NoReturn:
    """Serve a session until the API process closes the socket or kills the slot. Never returns."""
    kernel.adopt_orphans()
    wakeup, trigger = os.pipe()
    os.set_blocking(wakeup, False)
    os.set_blocking(trigger, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(trigger, warn_on_full_buffer=False)
    ours, theirs = (sock.detach() for sock in socket.socketpair())
    keeper = _Keeper(job_fd=job_fd, holder_fd=ours, far_fd=theirs, place=place)
    _fork_holder(keeper)
    wire.send(job_fd, {"opened": True})
    poller = select.poll()
    for descriptor in (job_fd, ours, wakeup):
        poller.register(descriptor, select.POLLIN)
    try:
        while True:
            ready = {descriptor for descriptor, _ in poller.poll()}
            if ours in ready:
                for message in keeper.reader.feed(os.read(ours, 1 << 16)):
                    _hear_holder(keeper, message)
            if wakeup in ready:
                os.read(wakeup, 4096)
                _reap(keeper)
            if job_fd in ready:
                _obey(keeper, wire.receive(job_fd))
    finally:
        os._exit(0)


def _fork_holder(keeper: _Keeper) -> None:
    keeper.holder = os.fork()
    if keeper.holder == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.close(keeper.job_fd)
        os.close(keeper.holder_fd)
        kernel.die_with_parent(signal.SIGKILL)
        _hold(keeper.far_fd, keeper.place)


def _obey(keeper: _Keeper, message: wire.Message) -> None:
    """Carry out one order of the API process, which sends the next only after the answer (but for
    interrupts)."""
    operation = message["op"]
    if operation == "cell":
        if keeper.holder == 0:
            _fork_holder(keeper)
        wire.send(keeper.holder_fd, message)
    elif operation == "interrupt":
        target = keeper.cell if keeper.snapshot else keeper.holder
        if target > 1:
            _kill_group(target, own_group=keeper.snapshot)
    else:
        wire.send(keeper.job_fd, _file_operation(keeper.place.home, message))


def _kill_group(pid: int, *, own_group: bool) -> None:
    try:
        if own_group:
            os.killpg(pid, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _file_operation(home: str, message: wire.Message) -> wire.Message:
    try:
        if message["op"] == "put":
            harness.write_files(home, {message["path"]: message["data"]})
            return {"reply": None}
        if message["op"] == "get":
            content = harness.read_file(home, message["path"], message["max_bytes"])
            return {"reply": base64.b64encode(content).decode("ascii")}
        return {"reply": _list_files(home)}
    except (OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError)
        reason = getattr(error, "strerror", None) or str(error)
        return {"refused": reason, "missing": missing}


def _list_files(home: str) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = []
    for folder, _, names in os.walk(home):
        for name in sorted(names):
            path = os.path.join(folder, name)
            status = os.lstat(path)
            listed.append({"path": os.path.relpath(path, home), "size_bytes": status.st_size})
            if len(listed) == _MAX_LISTED:
                return listed
    return listed


def _hear_holder(keeper: _Keeper, message: wire.Message) -> None:
    """Follow what the holder or the cell process says. They run foreign code: a lie costs only
    their own session."""
    if "started" in message:
        keeper.snapshot = bool(message["snapshot"]) and keeper.place.can_fork
        keeper.cell = int(message["started"]) if keeper.snapshot else keeper.holder
        keeper.spent_s = float(message["spent_s"])
    elif "done" in message:
        if keeper.snapshot and keeper.cell > 1:
            old, keeper.holder = keeper.holder, keeper.cell
            _kill_group(old, own_group=False)
        _answer(keeper, message)
    elif "died" in message:
        _answer(keeper, {**message, "lost": False})


def _answer(keeper: _Keeper, message: wire.Message) -> None:
    keeper.cell = 0
    wire.send(keeper.job_fd, {**message, "snapshot": keeper.snapshot})


def _reap(keeper: _Keeper) -> None:
    """Collect dead children and adopted orphans; the death of the holder during a cell is the
    cell's end."""
    while True:
        try:
            pid, status, used = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if pid == keeper.holder:
            keeper.holder = 0
            if keeper.cell:
                _answer(keeper, {"died": status, "lost": True, **_usage(used, keeper.spent_s)})


def _hold(orders: int, place: harness.Place) -> NoReturn:
    """Hold the state of a session: take a cell, fork, run it in the child, become the snapshot.
    Never returns."""
    harness.close_last_door(place)
    namespace = harness.new_main()
    while True:
        cell = wire.receive(orders)
        snapshot = place.can_fork and threading.active_count() == 1
        if snapshot:
            pid = os.fork()
            if pid != 0:
                _, status, used = os.wait4(pid, 0)
                wire.send(orders, {"died": status, **_usage(used, 0.0)})
                continue
            os.setpgid(0, 0)
        spent_s = _spent_s(*_ALL)
        started = {"started": os.getpid(), "snapshot": snapshot, "spent_s": spent_s}
        wire.send(orders, started)
        wire.send(orders, _run_cell(cell, namespace, spent_s))


def _run_cell(cell: wire.Message, namespace: dict[str, Any], spent_s: float) -> wire.Message:
    # The kernel limits this process alone, and in whole seconds.
    budget = round(_spent_s(resource.RUSAGE_SELF)) + cell["cpu_s"]
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    if hard == resource.RLIM_INFINITY or budget <= hard:
        resource.setrlimit(resource.RLIMIT_CPU, (budget, hard))
    name = f"cell-{cell['step']}.py"
    execution = harness.execute(cell["code"], namespace, name, interactive=True)
    result = _represent(execution.value)
    harness.flush_streams()
    return {
        "done": True,
        "error": execution.error,
        "exit_code": execution.exit_code,
        "result": result,
        "cpu_s": _spent_s(*_ALL) - spent_s,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _spent_s(*who: int) -> float:
    used = [resource.getrusage(each) for each in who]
    return sum(each.ru_utime + each.ru_stime for each in used)


def _usage(used: resource.struct_rusage, spent_s: float) -> wire.Message:
    """What the process of a dead cell used: CPU seconds and its largest memory in bytes."""
    return {"cpu_s": used.ru_utime + used.ru_stime - spent_s, "peak_bytes": used.ru_maxrss * 1024}


def _represent(value: Any) -> str | None:
    if value is None:
        return None
    try:
        return repr(value)[:_RESULT_CHARS]
    except BaseException as error:
        return f"<repr raised {type(error).__name__}>"

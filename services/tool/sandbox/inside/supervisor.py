"""The supervisor: the one process of a slot that never runs untrusted code and so can outlive it.

It has two uses. For a job with files to fetch it forks the program, waits for it, kills what it
left and reads the files. For a session it supervises a chain of processes:

    supervisor -> state process (interpreter after cell n-1) -> cell process (runs cell n)
      done: the cell process becomes the state process, the old one is killed
      died: the old state process continues, with the state from before the cell

A cell that starts while other threads are alive cannot be forked faithfully. It runs in the state
process itself, and if it dies the state is lost. The same holds at level basic, where snippets may
not fork at all.
"""

import base64
import contextlib
import os
import resource
import select
import signal
import socket
import threading
from dataclasses import dataclass, field
from typing import Any, NoReturn

from services.tool.sandbox import wire
from services.tool.sandbox.inside import kernel, program, sweep

# Together what wait4 reports of a dead process.
_SELF_AND_CHILDREN = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
_RESULT_CHARS = 10_000
_MAX_LISTED = 1000


def run_and_fetch(job_fd: int, job: wire.Message, place: program.Place) -> NoReturn:
    """Run a program, then send its wait status and the files that the job asked for."""
    ours, theirs = (sock.detach() for sock in socket.socketpair())
    pid = os.fork()
    if pid == 0:
        os.close(job_fd)
        os.close(ours)
        kernel.die_with_parent(signal.SIGKILL)
        program.run_program(job, place, lambda report: wire.send(theirs, report))
    os.close(theirs)
    _, status = os.waitpid(pid, 0)
    if place.alone:
        # Before the files are read, which what is left alive could still change.
        _kill_everything_else()
    report: wire.Message = {"wait_status": status, "files": {}, "missing": {}}
    budget = job["fetch_bytes"]
    for path in job["fetch"]:
        try:
            content = program.read_file(place.home, path, budget)
        except (OSError, ValueError) as error:
            report["missing"][path] = getattr(error, "strerror", None) or str(error)
            continue
        budget -= len(content)
        report["files"][path] = base64.b64encode(content).decode("ascii")
    # The program's description of its error stays on a socket of its own: on the job socket it
    # could pass for what this process says.
    report["error"] = _first_error(ours)
    wire.send(job_fd, report)
    os._exit(0)


def _kill_everything_else() -> None:
    """Kill every other process of the slot. For slots with `Place.alone` only.

    Raises:
        PermissionError: this process could signal the whole machine.
    """
    # Checked again: at level full the parent is outside of the pid namespace, which reads as 0; at
    # level uid the slot has an id of its own, which is not root's.
    if os.getppid() != 0 and os.getuid() == 0:
        raise PermissionError("refusing to sweep: this process could signal the whole machine")
    with contextlib.suppress(ProcessLookupError):  # nothing was left
        os.kill(-1, signal.SIGKILL)


def _first_error(reports: int) -> Any:
    os.set_blocking(reports, False)
    reader = wire.FrameReader(1 << 16)
    try:
        messages = reader.feed(os.read(reports, 1 << 16))
    except (OSError, wire.FrameError):
        return None
    return messages[0].get("error") if messages else None


@dataclass(slots=True, kw_only=True)
class _Session:
    """What the supervisor knows of its session."""

    job_fd: int
    orders_fd: int
    """Orders to the state process and the answers to them."""
    orders_far_fd: int
    """The state process's end of `orders_fd`."""
    place: program.Place
    reader: wire.FrameReader = field(default_factory=lambda: wire.FrameReader(1 << 20))
    state_pid: int = 0
    """The process that holds the state; 0 when there is none."""
    cell_pid: int = 0
    """The process that runs the current cell; 0 when idle."""
    snapshot: bool = False
    """Whether the state process keeps the state from before the current cell."""
    spent_s: float = 0.0
    """CPU time that the cell's process had used before the cell."""


def serve_session(job_fd: int, place: program.Place) -> NoReturn:
    """Serve a session until the API process closes the socket or kills the slot. Never returns."""
    # The next state process is a grandchild: once its parent is killed, wait4 here must see it.
    kernel.adopt_orphans()
    # The poll below has to wake up when a child dies, so SIGCHLD writes a byte into a pipe.
    wakeup, trigger = os.pipe()
    os.set_blocking(wakeup, False)
    os.set_blocking(trigger, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(trigger, warn_on_full_buffer=False)
    ours, theirs = (sock.detach() for sock in socket.socketpair())
    session = _Session(job_fd=job_fd, orders_fd=ours, orders_far_fd=theirs, place=place)
    _fork_state_process(session)
    wire.send(job_fd, {"opened": True})
    poller = select.poll()
    for descriptor in (job_fd, ours, wakeup):
        poller.register(descriptor, select.POLLIN)
    try:
        while True:
            ready = {descriptor for descriptor, _ in poller.poll()}
            # Answers before deaths: a state process that said "done" and then died has finished.
            if ours in ready:
                for message in session.reader.feed(os.read(ours, 1 << 16)):
                    _on_state_message(session, message)
            if wakeup in ready:
                os.read(wakeup, 4096)
                _reap(session)
            if job_fd in ready:
                _obey(session, wire.receive(job_fd))
    finally:
        # Also after an error: a broken session ends with its slot, which the API process sees.
        os._exit(0)


def _fork_state_process(session: _Session) -> None:
    session.state_pid = os.fork()
    if session.state_pid == 0:
        # Untrusted code runs here from now on: it gets neither the supervisor's handlers nor the
        # socket of the API process.
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.close(session.job_fd)
        os.close(session.orders_fd)
        kernel.die_with_parent(signal.SIGKILL)
        _run_cells(session.orders_far_fd, session.place)


def _obey(session: _Session, message: wire.Message) -> None:
    """Carry out one order. Only an interrupt may come before the last one is answered."""
    operation = message["op"]
    if operation == "cell":
        if session.state_pid == 0:  # the last cell took it down: start again with an empty state
            _fork_state_process(session)
        wire.send(session.orders_fd, message)
    elif operation == "interrupt":
        target = session.cell_pid if session.snapshot else session.state_pid
        if target > 1:  # untrusted code named it, and numbers up to 1 reach more than a cell
            _kill_group(target, own_group=session.snapshot)
    else:
        wire.send(session.job_fd, _file_operation(session.place.home, message))


def _kill_group(pid: int, *, own_group: bool) -> None:
    with contextlib.suppress(ProcessLookupError):
        if own_group:
            os.killpg(pid, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)


def _file_operation(home: str, message: wire.Message) -> wire.Message:
    try:
        if message["op"] == "put":
            program.write_files(home, {message["path"]: message["data"]})
            return {"reply": None}
        if message["op"] == "get":
            content = program.read_file(home, message["path"], message["max_bytes"])
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


def _on_state_message(session: _Session, message: wire.Message) -> None:
    """Follow what the state or cell process says; untrusted code can harm only its own session."""
    if "started" in message:
        session.snapshot = bool(message["snapshot"]) and session.place.can_fork
        session.cell_pid = int(message["started"]) if session.snapshot else session.state_pid
        session.spent_s = float(message["spent_s"])
    elif "done" in message:
        if session.snapshot and session.cell_pid > 1:
            # The old state process still waits for this cell; dead, it cannot report its end.
            old, session.state_pid = session.state_pid, session.cell_pid
            _kill_group(old, own_group=False)
        _answer(session, message)
    elif "died" in message:
        _sweep(session)
        _answer(session, {**message, "lost": False})


def _sweep(session: _Session) -> None:
    """Kill what a killed cell has left running, before its answer is sent."""
    if session.place.alone and session.cell_pid > 1:
        sweep.kill_since(session.cell_pid, {os.getpid(), session.state_pid})


def _answer(session: _Session, message: wire.Message) -> None:
    session.cell_pid = 0
    wire.send(session.job_fd, {**message, "snapshot": session.snapshot})


def _reap(session: _Session) -> None:
    """Collect dead children and orphans. If the state process died, so did the cell in it."""
    while True:
        try:
            pid, status, used = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if pid == session.state_pid:
            session.state_pid = 0
            if session.cell_pid:
                _sweep(session)
                _answer(session, {"died": status, "lost": True, **_usage(used, session.spent_s)})


def _run_cells(orders: int, place: program.Place) -> NoReturn:
    """The state process: take a cell, fork, let the child run it and replace this one. Never
    returns."""
    program.forbid_processes(place)
    namespace = program.new_main()
    while True:
        cell = wire.receive(orders)
        # A fork keeps the calling thread only; others would be missing in the child.
        snapshot = place.can_fork and threading.active_count() == 1
        if snapshot:
            pid = os.fork()
            if pid != 0:
                # This process is the snapshot. It continues only if the cell's process dies.
                _, status, used = os.wait4(pid, 0)
                wire.send(orders, {"died": status, **_usage(used, 0.0)})
                continue
            os.setpgid(0, 0)  # an interrupt kills the cell with its children, and not the snapshot
        spent_s = _spent_s(*_SELF_AND_CHILDREN)
        started = {"started": os.getpid(), "snapshot": snapshot, "spent_s": spent_s}
        wire.send(orders, started)
        wire.send(orders, _run_cell(cell, namespace, spent_s))


def _run_cell(cell: wire.Message, namespace: dict[str, Any], spent_s: float) -> wire.Message:
    # The kernel limits this process alone, in whole seconds since its start.
    budget = round(_spent_s(resource.RUSAGE_SELF)) + cell["cpu_s"]
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    if hard == resource.RLIM_INFINITY or budget <= hard:
        resource.setrlimit(resource.RLIMIT_CPU, (budget, hard))
    name = f"cell-{cell['step']}.py"
    execution = program.execute(cell["code"], namespace, name, interactive=True)
    result = _represent(execution.value)
    program.flush_streams()
    return {
        "done": True,
        "error": execution.error,
        "exit_code": execution.exit_code,
        "result": result,
        "cpu_s": _spent_s(*_SELF_AND_CHILDREN) - spent_s,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _spent_s(*who: int) -> float:
    """CPU time in seconds."""
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

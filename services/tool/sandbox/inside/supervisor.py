"""The supervisor: the one process of a slot that never runs untrusted code and so can outlive it.

It has two uses. For a job with files to fetch it forks the program, waits for it, kills what it
left and reads the files. For a session it supervises a chain of processes:

    supervisor -> state process (interpreter after cell n-1) -> cell process (runs cell n)
      done, settled: the cell process becomes the state process, the old one is killed
      died: the old state process continues, with the state from before the cell

Whatever a cell starts holds the socket on which the cell's end is told. So the supervisor listens
to the process that it knows to run the cell, and believes its end when it takes the next order.

A cell that starts while other threads are alive cannot be forked faithfully. It runs in the state
process itself, and if it dies the state is lost. The same holds at level basic, where snippets may
not fork at all.
"""

import base64
import contextlib
import math
import os
import select
import signal
import socket
import struct
import time
from dataclasses import dataclass, field
from typing import Any, NoReturn

from services.tool.sandbox import wire
from services.tool.sandbox.inside import files, kernel, sweep
from services.tool.sandbox.inside.snippet import cells, program

_START_S = 1.0  # between the interrupt of a cell that has not started and the end of the state
_DONE_KEYS = ("done", "error", "exit_code", "result", "cpu_s", "peak_bytes")
_CREDENTIALS = struct.Struct("3i")  # pid, user id and group id of a sender


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
    kernel.wait_for_end(pid)
    soft_cpu_s = kernel.soft_cpu_limit_s(pid)
    _, status = os.waitpid(pid, 0)
    if place.alone:
        # Before the files are read, which what is left alive could still change.
        _kill_everything_else()
    report: wire.Message = {
        "wait_status": status,
        "soft_cpu_s": soft_cpu_s,
        "files": {},
        "missing": {},
    }
    budget = job["fetch_bytes"]
    for path in job["fetch"]:
        try:
            content = files.read_file(place.home, path, budget)
        except (OSError, ValueError) as error:
            report["missing"][path] = getattr(error, "strerror", None) or str(error)
            continue
        budget -= len(content)
        report["files"][path] = base64.b64encode(content).decode("ascii")
    if job["figures"]:
        files.add_figures(report, place.home, budget)
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
class _Cell:
    """The cell that was ordered last and is not answered yet."""

    pid: int = 0
    """The process that runs it; 0 until the state process has named it."""
    snapshot: bool = False
    """Whether the state process keeps the state from before the cell."""
    spent_s: float = 0.0
    """CPU time that the cell's process had used before the cell."""
    budget_s: int = 0
    """Soft limit of CPU time of the cell's process at the start of the cell."""
    done: wire.Message | None = None
    """What the cell's process said of its end, until it has answered `settle`."""
    settle: str = ""
    """What the cell's process has to repeat; empty until it said that it was done."""
    give_up_at: float | None = None
    """Set by an interrupt that came before `pid` was known."""


@dataclass(slots=True, kw_only=True)
class _Session:
    """What the supervisor knows of its session."""

    job_fd: int
    place: program.Place
    poller: select.poll = field(default_factory=select.poll)
    orders: socket.socket | None = None
    """Orders to the state process and the answers to them, each with its sender's pid."""
    readers: dict[int, wire.FrameReader] = field(default_factory=dict)
    """By pid of the sender: a child may stop in the middle of a frame."""
    state_pid: int = 0
    """The process that holds the state; 0 when there is none."""
    died_between: int | None = None
    """Wait status of a state process that died while no cell ran."""
    cell: _Cell | None = None


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
    session = _Session(job_fd=job_fd, place=place)
    session.poller.register(job_fd, select.POLLIN)
    session.poller.register(wakeup, select.POLLIN)
    _fork_state_process(session)
    wire.send(job_fd, {"opened": True})
    try:
        while True:
            ready = {descriptor for descriptor, _ in session.poller.poll(_patience_ms(session))}
            if _orders(session).fileno() in ready:
                _hear(session)
            if wakeup in ready:
                os.read(wakeup, 4096)
                _reap(session)
            if job_fd in ready:
                _obey(session, wire.receive(job_fd))
            if _patience_ms(session) == 0:
                _kill(session.state_pid, own_group=False)  # _reap answers
    finally:
        # Also after an error: a broken session ends with its slot, which the API process sees.
        os._exit(0)


def _orders(session: _Session) -> socket.socket:
    assert session.orders is not None, "set with the first state process"
    return session.orders


def _fork_state_process(session: _Session) -> None:
    """Start with an empty state, and on a new socket: the old one may hold an unread order."""
    if session.orders is not None:
        with contextlib.suppress(KeyError):  # its other end was closed before
            session.poller.unregister(session.orders)
        session.orders.close()
    session.orders, far_end = socket.socketpair()
    # The kernel then names the sender of every frame, which a child of a cell cannot forge.
    session.orders.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    session.poller.register(session.orders, select.POLLIN)
    session.state_pid = os.fork()
    if session.state_pid == 0:
        # Untrusted code runs here from now on: it gets neither the supervisor's handlers nor the
        # socket of the API process.
        signal.set_wakeup_fd(-1)
        os.nice(program.NICENESS)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.close(session.job_fd)
        session.orders.close()
        kernel.die_with_parent(signal.SIGKILL)
        cells.run_cells(far_end.detach(), session.place)
    far_end.close()


def _patience_ms(session: _Session) -> int | None:
    """How long an interrupted cell that has not started may still take to start."""
    if session.cell is None or session.cell.give_up_at is None:
        return None
    return max(0, math.ceil((session.cell.give_up_at - time.monotonic()) * 1000))


def _obey(session: _Session, message: wire.Message) -> None:
    """Carry out one order. Only an interrupt may come before the last one is answered."""
    operation = message["op"]
    if operation == "cell":
        _order_cell(session, message)
    elif operation != "interrupt":
        wire.send(session.job_fd, files.operate(session.place.home, message))
    elif session.cell is not None:
        _resume(session.state_pid)  # it tells how the cell ended
        if session.cell.pid:
            _kill_cell(session, session.cell)
        else:
            # Which process to kill is known once the fork of the cell is made.
            session.cell.give_up_at = time.monotonic() + _START_S


def _order_cell(session: _Session, message: wire.Message) -> None:
    session.cell = _Cell()
    session.readers.clear()  # what was begun between two cells is no part of an answer
    if session.state_pid and not _exists(session.state_pid):
        session.state_pid, session.died_between = 0, signal.SIGKILL
    if session.died_between is not None:
        # Told once, instead of running the cell on an empty state.
        died, session.died_between = session.died_between, None
        _answer(session, {"died": died, "lost": True, "unrun": True})
        return
    if session.state_pid == 0:  # the last cell took it down, and its answer said so
        _fork_state_process(session)
    _order(session, message)


def _order(session: _Session, message: wire.Message) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has died; _reap answers
        wire.send(_orders(session).fileno(), message)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _kill_cell(session: _Session, cell: _Cell) -> None:
    # Where what it has started is swept, only once it is dead: many processes that die at the same
    # time would hold it up, and with it the answer.
    _kill(cell.pid, own_group=cell.snapshot and not session.place.alone)


def _resume(pid: int) -> None:
    """Let a process run again, if a cell has stopped it."""
    if pid > 1:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _kill(pid: int, *, own_group: bool) -> None:
    if pid <= 1:
        return  # these reach more than one process
    if own_group:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):  # it may have left its group
        os.kill(pid, signal.SIGKILL)


def _hear(session: _Session) -> None:
    """Read what was sent on the orders' socket. Only the state process and the cell's count.

    Every process that a cell starts has this socket too, so the kernel's word on the sender
    decides. It never joins bytes of two senders in one call.
    """
    try:
        data, ancillary, *_ = _orders(session).recvmsg(
            1 << 16, socket.CMSG_SPACE(_CREDENTIALS.size)
        )
    except ConnectionResetError:  # killed before it took its last order
        data, ancillary = b"", []
    if not data:
        session.poller.unregister(_orders(session))  # nobody is left who could write; _reap answers
        return
    sender = next((_CREDENTIALS.unpack(item)[0] for *_, item in ancillary), 0)
    cell = session.cell
    if cell is None or sender not in (session.state_pid, cell.pid):
        return
    reader = session.readers.setdefault(sender, wire.FrameReader(1 << 20))
    try:
        for message in reader.feed(data):
            _on_message(session, sender, message)
    except (wire.FrameError, KeyError, TypeError, ValueError, OverflowError):
        # Only untrusted code writes such a frame, and what follows it cannot be read.
        if session.cell is cell:
            _kill(sender, own_group=False)


def _on_message(session: _Session, sender: int, message: wire.Message) -> None:
    """Follow what the state or cell process says; untrusted code can harm only its own session."""
    cell = session.cell
    if cell is None:
        return
    if "started" in message:
        if cell.pid == 0:  # otherwise a cell that runs in the state process repeats it
            _on_started(session, cell, message)
    elif sender == cell.pid and "done" in message:
        # Not believed until the process has taken an order, which only code that has ended does: a
        # cell that writes this frame and continues is still running.
        cell.done = {key: message.get(key) for key in _DONE_KEYS}
        if not cell.settle:
            cell.settle = os.urandom(8).hex()
            _order(session, {"settle": cell.settle})
    elif sender == cell.pid and message.get("settled") == cell.settle and cell.done is not None:
        if cell.snapshot:
            # The old state process still waits for this cell; dead, it cannot report its end.
            old, session.state_pid = session.state_pid, cell.pid
            _kill(old, own_group=False)
        _answer(session, cell.done)
    elif cell.snapshot and sender == session.state_pid and "died" in message:
        _sweep(session, cell)
        used = {key: message[key] for key in ("died", "over_s", "cpu_s", "peak_bytes")}
        _answer(session, {**used, "lost": False})


def _on_started(session: _Session, cell: _Cell, message: wire.Message) -> None:
    cell.spent_s = float(message["spent_s"])
    cell.budget_s = int(message["budget_s"])
    cell.snapshot = bool(message["snapshot"]) and session.place.can_fork
    cell.pid = int(message["started"]) if cell.snapshot else session.state_pid
    if cell.give_up_at is not None:
        cell.give_up_at = None
        _kill_cell(session, cell)


def _sweep(session: _Session, cell: _Cell) -> None:
    """Kill what a killed cell has left running, before its answer is sent."""
    if session.place.alone and cell.pid > 1:
        if cell.snapshot:  # most of it in one call: each single call can cost this process its turn
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(cell.pid, signal.SIGKILL)
        sweep.kill_since(cell.pid, {os.getpid(), session.state_pid})


def _answer(session: _Session, message: wire.Message) -> None:
    cell, session.cell = session.cell, None
    wire.send(session.job_fd, {**message, "snapshot": cell is not None and cell.snapshot})


def _reap(session: _Session) -> None:
    """Collect dead children and orphans. If the state process died, so does its cell."""
    soft_cpu_s = kernel.soft_cpu_limit_s(session.state_pid)  # of no use when that is 0
    while True:
        try:
            pid, status, used = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if pid != session.state_pid:
            continue
        session.state_pid = 0
        cell = session.cell
        if cell is None:
            session.died_between = status
            continue
        if cell.snapshot:
            _kill_cell(session, cell)
        _sweep(session, cell)
        over_s = soft_cpu_s - cell.budget_s
        _answer(
            session,
            {"died": status, "lost": True, "over_s": over_s, **cells.usage(used, cell.spent_s)},
        )

"""The state process of a session: takes a cell, forks, lets the child run it and replace this one.

../supervisor.py follows what is said here; all of it runs in the same process as untrusted code.
"""

import os
import resource
import signal
import threading
from posix import getpid  # a cell may replace os.getpid
from typing import Any, NoReturn

from services.tool.sandbox import wire
from services.tool.sandbox.inside import kernel
from services.tool.sandbox.inside.snippet import ending, figures, program

# Together what wait4 reports of a dead process.
_SELF_AND_CHILDREN = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
_RESULT_CHARS = 10_000


def run_cells(orders: int, place: program.Place) -> NoReturn:
    """The state process: take a cell, fork, let the child run it and replace this one. Never
    returns."""
    program.forbid_processes(place)
    namespace = program.new_main()
    while True:
        order = wire.receive(orders)
        if "settle" in order:
            wire.send(orders, {"settled": order["settle"]})
            continue
        # A fork keeps the calling thread only; others would be missing in the child.
        snapshot = (
            place.can_fork
            and threading.active_count() == 1
            and _fork_cell(orders, cpu_s=order["cpu_s"])
        )
        if snapshot is None:
            continue  # this process is the snapshot, and the cell's process has died
        spent_s = _spent_s(*_SELF_AND_CHILDREN)
        owner = getpid()
        # The kernel limits this process alone, in whole seconds since its start.
        budget_s = round(_spent_s(resource.RUSAGE_SELF)) + order["cpu_s"]
        if not snapshot:
            wire.send(orders, _started(owner, spent_s, budget_s, snapshot=False))
        _limit_cpu(budget_s)
        answer = _run_cell(order, namespace, spent_s, place.home)
        if getpid() != owner:
            # A child that the cell forked came out of the cell as well: its work ends here.
            ending.end_process(answer["exit_code"], place.home)
        wire.send(orders, answer)


def _started(pid: int, spent_s: float, budget_s: int, *, snapshot: bool) -> wire.Message:
    return {"started": pid, "snapshot": snapshot, "spent_s": spent_s, "budget_s": budget_s}


def _limit_cpu(budget_s: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    if hard == resource.RLIM_INFINITY or budget_s <= hard:
        resource.setrlimit(resource.RLIMIT_CPU, (budget_s, hard))


def _fork_cell(orders: int, *, cpu_s: int) -> bool | None:
    """Fork the process of a cell. True in that process, False where no fork was possible; None in
    the calling one, after the cell's process has died: with what it then says."""
    waiting, release = os.pipe()
    try:
        pid = os.fork()
    except OSError:  # the cells before have left too many processes
        os.close(waiting)
        os.close(release)
        return False
    if pid == 0:
        os.close(release)
        os.read(waiting, 1)  # until it is known which process runs the cell
        os.close(waiting)
        return True
    os.close(waiting)
    # An interrupt kills the cell with its children, and not the snapshot.
    os.setpgid(pid, pid)
    # A handler of an earlier cell must not collect the cell's process.
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    wire.send(orders, _started(pid, 0.0, cpu_s, snapshot=True))
    os.close(release)
    kernel.wait_for_end(pid)
    over_s = kernel.soft_cpu_limit_s(pid) - cpu_s
    _, status, used = os.wait4(pid, 0)
    signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
    wire.send(orders, {"died": status, "over_s": over_s, **usage(used, 0.0)})
    return None


def _run_cell(
    cell: wire.Message, namespace: dict[str, Any], spent_s: float, home: str
) -> wire.Message:
    name = f"cell-{cell['step']}.py"
    figures.ask(cell["figures"], home)
    execution = program.execute(cell["code"], namespace, name, interactive=True)
    result = _represent(execution.value)
    figures.save_open()
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


def usage(used: resource.struct_rusage, spent_s: float) -> wire.Message:
    """What the process of a dead cell used: CPU seconds and its largest memory in bytes."""
    return {"cpu_s": used.ru_utime + used.ru_stime - spent_s, "peak_bytes": used.ru_maxrss * 1024}


def _represent(value: Any) -> str | None:
    if value is None:
        return None
    try:
        return repr(value)[:_RESULT_CHARS]
    except BaseException as error:
        return f"<repr raised {type(error).__name__}>"

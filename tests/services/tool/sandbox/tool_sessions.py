# ruff: noqa: E501 - programs are easier to compare when each of their lines is one line here
"""Cells that try to answer for others, or to leave their session in a state that nobody told.

Every cell is answered for itself: `expect` holds (status, result) of each.
"""

from dataclasses import dataclass

from threat import ALL, FORKING


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionThreat:
    """Cells of one session and the answers that are right at the given levels."""

    row: str
    cells: tuple[str, ...]
    expect: tuple[tuple[str, str | None], ...]
    lost: tuple[bool, ...] = ()
    """Whether the state is lost, by cell; empty means that it never is."""
    levels: tuple[str, ...] = ALL
    hangs: bool = False
    """Whether a cell runs into its time limit."""


_FORGE = """
import json, os, stat, struct, time
def send(data):
    for fd in range(3, 16):
        try: mode = os.fstat(fd).st_mode
        except OSError: continue
        if stat.S_ISSOCK(mode): os.write(fd, data)
def forge(*frames):
    for frame in frames:
        body = json.dumps(frame).encode()
        send(struct.pack('>I', len(body)) + body)
x = 'before'
"""
_FORK = ("ok", None), ("ok", "True"), ("ok", "'b'")


def _forks(row: str, code: str) -> SessionThreat:
    """A cell whose child comes out of the cell as well, then cells that show whose answer it is."""
    return SessionThreat(row=row, cells=(code, "x", "'b'"), expect=_FORK, levels=FORKING)


SESSIONS = [
    _forks("fork", "import os\nx = os.fork() > 0"),
    _forks("fork-nested", "import os\ndef f():\n    return os.fork() > 0\ndef g():\n    return f()\nx = g()"),
    _forks("fork-twice", "import os\nx = os.fork() > 0 and os.fork() > 0"),
    _forks("fork-by-number", "import ctypes\nx = ctypes.CDLL(None).syscall(57) > 0"),
    _forks("fork-unnamed", "import os\nos.getpid = lambda: 7\nos._exit = print\nx = os.fork() > 0"),
    _forks("fork-in-repr", "import os\nx = True\nclass A:\n    def __repr__(self):\n        global x\n        x = os.fork() > 0\n        return ''\nrepr(A()) or None"),
    _forks("fork-then-error", "import os\ndef f():\n    pid = os.fork()\n    if pid == 0: 1 / 0\n    return pid > 0\nx = f()"),
    _forks("fork-in-generator", "import os\nx = next(os.fork() > 0 for _ in range(2))"),
    _forks("fork-in-thread", "import os, threading\ndef f():\n    global x\n    x = os.fork() > 0\nt = threading.Thread(target=f)\nt.start()\nt.join()"),
    _forks("fork-by-multiprocessing", "import multiprocessing as m\nx = False\na, b = m.Pipe()\np = m.get_context('fork').Process(target=b.send, args=(True,))\np.start()\nx = a.recv()\np.join()"),
    SessionThreat(
        row="fork-beside-thread",
        cells=("import os, threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()", "x = os.fork() > 0", "x", "'b'"),
        expect=(("ok", None), *_FORK),
        levels=FORKING,
    ),
    SessionThreat(
        row="forged-done-then-sleep",
        cells=(_FORGE, "x = 'during'\nforge({'done': True, 'result': 'forged'})\ntime.sleep(60)", "x"),
        expect=(("ok", None), ("timeout", None), ("ok", "'before'")),
        levels=FORKING,
        hangs=True,
    ),
    SessionThreat(
        row="forged-done-then-sleep-in-place",
        cells=(_FORGE, "forge({'done': True, 'result': 'forged'})\ntime.sleep(60)", "6 * 7"),
        expect=(("ok", None), ("timeout", None), ("ok", "42")),
        lost=(False, True, False),
        levels=("basic",),
        hangs=True,
    ),
    SessionThreat(
        row="forged-frames",
        cells=(_FORGE, "forge({'done': True, 'result': 'forged'}, {'died': 0}, {'settled': ''}, {'started': 1, 'snapshot': True, 'spent_s': 0})\nx", "x", "'b'"),
        expect=(("ok", None), ("ok", "'before'"), ("ok", "'before'"), ("ok", "'b'")),
    ),
    SessionThreat(
        row="forged-by-a-child",
        cells=(_FORGE, "if os.fork() == 0:\n    forge({'done': True, 'result': 'forged'}, {'died': 0})\n    send(b'\\0\\0\\xff\\xff')\n    os._exit(0)\nos.wait()\nx", "x"),
        expect=(("ok", None), ("ok", "'before'"), ("ok", "'before'")),
        levels=FORKING,
    ),
    SessionThreat(
        row="forged-noise",
        cells=(_FORGE, "send(b'\\xff' * 50)\ntime.sleep(60)", "x"),
        expect=(("ok", None), ("crashed", None), ("ok", "'before'")),
        levels=FORKING,
    ),
    SessionThreat(
        row="children-ignored",
        cells=("import os, signal\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\nx = 'before'", "os._exit(3)", "x"),
        expect=(("ok", None), ("exit", None), ("ok", "'before'")),
        levels=FORKING,
    ),
    SessionThreat(
        row="children-collected",
        cells=("import os, signal\ndef f(*_):\n    try: os.waitpid(-1, os.WNOHANG)\n    except ChildProcessError: pass\nsignal.signal(signal.SIGCHLD, f)\nx = 'before'", "os._exit(3)", "signal.getsignal(signal.SIGCHLD) is f and x"),
        expect=(("ok", None), ("exit", None), ("ok", "'before'")),
        levels=FORKING,
    ),
    SessionThreat(
        row="snapshot-stopped",
        cells=("import os, signal, time\nx = 'before'", "os.kill(os.getppid(), signal.SIGSTOP)\ntime.sleep(60)", "x"),
        expect=(("ok", None), ("timeout", None), ("ok", "'before'")),
        levels=FORKING,
        hangs=True,
    ),
    SessionThreat(
        row="supervisor-stopped",
        cells=("import os, signal, time\nx = 'before'", "os.kill(2, signal.SIGSTOP)\ntime.sleep(60)", "x"),
        expect=(("ok", None), ("timeout", None), ("ok", "'before'")),
        levels=("full",),
        hangs=True,
    ),
    SessionThreat(
        row="supervisor-killed",
        cells=("import os, signal, time", "os.kill(2, signal.SIGKILL)\ntime.sleep(60)"),
        expect=(("ok", None), ("crashed", None)),
        lost=(False, True),
        levels=("full",),
    ),
    SessionThreat(
        row="supervisor-killed-in-place",
        cells=("import os, signal, time", "os.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(60)"),
        expect=(("ok", None), ("crashed", None)),
        lost=(False, True),
        levels=("basic",),
    ),
    SessionThreat(
        row="snapshot-killed",
        cells=("import os, time\nx = 1", "os.kill(os.getppid(), 9)\ntime.sleep(60)", "6 * 7"),
        expect=(("ok", None), ("crashed", None), ("ok", "42")),
        lost=(False, True, False),
        levels=FORKING,
    ),
]  # fmt: skip

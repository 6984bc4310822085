# ruff: noqa: E501 - programs are easier to compare when each of their lines is one line here
"""Programs end as under `python main.py`: the same output, files, exit code and kind of error.

Each program runs under this interpreter too, in a folder of its own, and both are compared.
"""

import base64
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROGRAMS = {
    "open file": "f = open('a', 'w')\nf.write('42')",
    "open binary file": "f = open('a', 'wb')\nf.write(b'42')",
    "file in a list of a class": "class A: kept = [open('a', 'w')]\nA.kept[0].write('42')",
    "file in a cycle": "x = {}\nx['self'] = x\nx['f'] = open('a', 'w')\nx['f'].write('42')",
    "file after an error": "f = open('a', 'w')\nf.write('42')\n1 / 0",
    "file after sys.exit": "import sys\nf = open('a', 'w')\nf.write('42')\nsys.exit(3)",
    "file lost by os._exit": "import os\nf = open('a', 'w')\nf.write('42')\nos._exit(3)",
    "compressed file": "import gzip\nf = gzip.open('a', 'wb')\nf.write(b'x')\ng = open('b', 'w')\ng.write(str(f.mode))",
    "csv writer": "import csv\nw = csv.writer(open('a', 'w'))\nw.writerow([1, 2])",
    "file of a module": "open('helper.py', 'w').write('f = open(\"a\", \"w\")\\nf.write(\"42\")')\nimport helper",
    "finaliser of a global": "import os\nclass A:\n    def __del__(self): print('del', os.sep, x)\nx = 5\na = A()",
    "finaliser that fails": "class A:\n    def __del__(self): 1 / 0\na = A()",
    "finaliser in a cycle": "class A:\n    def __del__(self): print('del')\na = A()\na.a = a",
    "finaliser of a replaced stdout": "import sys, io\nclass S(io.StringIO):\n    def close(self): sys.__stdout__.write('closed\\n')\nsys.stdout = S()\nprint('x')",
    "weak finalisers": "import weakref\nclass A: pass\na = A()\nweakref.finalize(a, print, 'gone')\nr = weakref.ref(a, lambda _: print('never'))",
    "suspended generator": "def g():\n    try: yield 1\n    finally: print('finally')\nh = g()\nnext(h)",
    "context manager left open": "import contextlib\n@contextlib.contextmanager\ndef c():\n    try: yield\n    finally: print('closed')\nm = c()\nm.__enter__()",
    "order of the end": "import atexit, threading, time\nclass A:\n    def __del__(self): print('del')\na = A()\natexit.register(print, 'atexit')\nthreading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start()\nprint('main')",
    "atexit of a thread": "import threading, atexit\ndef f(): atexit.register(print, 'late')\nthreading.Thread(target=f).start()",
    "atexit that fails": "import atexit\n@atexit.register\ndef f():\n    1 / 0\nprint('main')",
    "atexit that exits": "import atexit, sys\natexit.register(sys.exit, 4)",
    "child": "import os\nif os.fork() == 0: print('child')\nelse: os.wait(); print('parent')",
    "child with a thread": "import os, threading, time\nif os.fork() == 0: threading.Thread(target=lambda: (time.sleep(0.1), print('child'))).start()\nelse: os.wait(); print('parent')",
    "child that fails": "import os\npid = os.fork()\nif pid == 0: raise ValueError\nprint(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))",
    "failed last flush": "import sys\nsys.stdout = open('/dev/full', 'w')\nprint('x')",
    "failed last flush after exit": "import sys\nsys.stdout = open('/dev/full', 'w')\nprint('x')\nsys.exit(3)",
    "flush that raises": "import sys\nclass S:\n    def write(self, text): pass\n    def flush(self): raise KeyError(1)\nsys.stdout = S()",
    "closed descriptor of stdout": "import os\nos.close(1)\nprint()",
    "closed descriptor of stdout and exit": "import os, sys\nos.close(1)\nprint('x')\nsys.exit(3)",
    "closed descriptor, flushed by hand": "import os, sys\nos.close(1)\nprint('x')\ntry: sys.stdout.flush()\nexcept OSError as e: print(e, file=sys.stderr)",
    "closed descriptor, flushed by print": "import os\nos.close(1)\nprint('x', flush=True)",
    "closed descriptor of stderr": "import os\nos.close(2)\n1 / 0",
    "closed descriptor of stdin": "import os\nos.close(0)\ninput()",
    "full device behind stdout": "import os\nos.dup2(os.open('/dev/full', 1), 1)\nprint('x')",
    "streams": "import sys\nprint(sys.stdout, sys.stderr, sys.stdin, sys.stdout.isatty())",
    "half a surrogate pair": "print('\\ud800')",
    "help": "help(len)",
    "user": "import getpass\nprint(type(getpass.getuser()).__name__)",
    "closed stdout": "import sys\nsys.stdout.close()",
    "no stdout": "import sys\nsys.stdout = sys.stderr = None\nprint('x')\n1 / 0",
    "stdout of C": "import ctypes\nctypes.CDLL(None).printf(b'from C\\n')",
    "own kill": "import os\nos.kill(os.getpid(), 9)",
    "names of main": "import sys, os, __main__\nprint(sys.argv, os.path.basename(__file__), open(__file__).readline(), __name__, __spec__, __annotations__, __cached__, __main__.__builtins__, type(__builtins__), __doc__)",
    "names of main, all": "print(sorted(n for n in globals() if n != '__loader__'))",
    "folder": "import os\nprint(os.listdir('.'))",
    "source": "import inspect\ndef f(x):\n    return x + 1\nprint(inspect.getsource(f))",
    "traceback without last line end": "def f():\n    return [1, 2][5]\nf()",
    "traceback of long ends of lines": "x = 'a\x0cb'\r\ny = '\x1c'\r\n1 / 0",
    "traceback of a thread": "import threading\ndef f():\n    return 1 / 0\nt = threading.Thread(target=f)\nt.start()\nt.join()",
    "traceback of a hook": "import sys\ndef hook(*a):\n    print('hook')\n    sys.__excepthook__(*a)\nsys.excepthook = hook\n1 / 0",
    "traceback with a cause": "try: 1 / 0\nexcept ZeroDivisionError as e: raise KeyError('x') from e",
    "exception without text": "class E(Exception):\n    def __str__(self): raise ValueError('s')\nraise E",
    "no hook": "import sys\ndel sys.excepthook\n1 / 0",
    "failing hook": "import sys\ndef hook(*a): raise KeyError('hook')\nsys.excepthook = hook\n1 / 0",
    "exiting hook": "import sys\nsys.excepthook = lambda *a: sys.exit(5)\n1 / 0",
    "syntax error": "x = 1\ny = = 2",
}  # fmt: skip


def under_python(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    (folder / "main.py").write_bytes(code.encode())
    argv = [sys.executable, "main.py"]
    environment = {"PATH": os.defpath, "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"}  # as in the sandbox
    return subprocess.run(
        argv,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=60,
    )


def comparable(text: str, folder: str) -> list[str]:
    """Lines of a traceback without what differs by design: the folder, addresses."""
    lines = text.replace(folder, "").splitlines()
    # An interpreter that ends shows no source lines of finalisers; ours does.
    shown = not any(line.startswith("Exception ignored in: ") for line in lines)
    lines = [line for line in lines if shown or not line.startswith("    ")]
    return [line for line in lines if " at 0x" not in line]


@pytest.mark.parametrize("name", PROGRAMS)
async def test_a_program_ends_as_under_python(
    client: httpx.AsyncClient, tmp_path: Path, name: str
) -> None:
    code = PROGRAMS[name]
    right = under_python(tmp_path, code)
    answer = await client.post("/v1/execute", json={"code": code, "fetch": ["a", "b"]})
    body = answer.json()
    assert body["stdout"] == right.stdout
    assert comparable(body["stderr"], "") == comparable(right.stderr, f"{tmp_path}/")
    code_of_signal = None if body["signal"] is None else -9
    assert (body["exit_code"] if body["signal"] is None else code_of_signal) == right.returncode
    for file in ("a", "b"):
        path = tmp_path / file
        written = base64.b64encode(path.read_bytes()).decode() if path.exists() else None
        assert body["files"].get(file) == written

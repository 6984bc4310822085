# ruff: noqa: E501 - programs are easier to compare when each of their lines is one line here
"""The threat list: what hostile or unlucky code does, and the exact class of answer that is right.

`row` counts as in the design's threat table; fence_threats.py has those found later. A program that is meant to be denied something prints
`denied` when it was; `expect` names every status that is correct, `says` what stdout must then
contain.
"""

import functools
import json
import sys

from fence_threats import FENCE
from threat import FORKING, Threat, denied, system_call


def _report(frame: dict[str, object]) -> str:
    """A statement that writes a frame of ours on the slot's own socket."""
    body = json.dumps(frame).encode()
    return f"import os, struct\nos.write(3, struct.pack('>I', {len(body)}) + {body!r})\n"


_EXHAUST = """
import errno
kept = []
try:
    while True: kept.append({make})
except OSError as error:
    print(errno.errorcode[error.errno])
"""
_DEAD_FIRST_THREADS = """
import ctypes, os, threading, time
def hold():
    time.sleep(0.2)
    kept = bytearray(100 << 20)
    time.sleep(20)
for _ in range(4):
    if os.fork() == 0:
        threading.Thread(target=hold).start()
        ctypes.CDLL(None).syscall(60, 0)
time.sleep(20)
"""
_PACKETS = """
import fcntl, os
fcntl.fcntl(1, fcntl.F_SETPIPE_SZ, 1 << 20)
fcntl.fcntl(1, fcntl.F_SETFL, fcntl.fcntl(1, fcntl.F_GETFL) | os.O_DIRECT)
for number in range(200): os.write(1, b'%03d\\n' % number)
os._exit(0)
"""
_INTERRUPTS = """
import os, signal, time
count = 0
def handle(*_):
    global count
    count += 1
signal.signal(signal.SIGINT, handle)
for _ in range(5):
    os.kill(0, signal.SIGINT)
    time.sleep(0.02)
print(count)
"""
_FORKS_THEN_MEMORY = """
import os, time
for _ in range(8):
    if os.fork() == 0:
        block = b"x" * (60 << 20)
        time.sleep(30)
time.sleep(30)
"""
_MACHINE_CODE = """
import ctypes, mmap
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(bytes.fromhex("b814000000cd80c3"))
address = ctypes.addressof(ctypes.c_char.from_buffer(page))
ctypes.CFUNCTYPE(ctypes.c_int)(address)()
"""
_LEAVE_DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(60)
    os._exit(0)
os.wait()
print("left")
"""
_FORGE = """
import json, os, struct
body = json.dumps({"event": "exit", "ready": True, "files": 5, "wait_status": 0}).encode()
for fd in range(3, 64):
    try:
        os.write(fd, struct.pack(">I", len(body)) + body)
        os.write(fd, b"\\xff" * 100)
    except OSError:
        pass
print('{"status": "ok", "forged": true}')
raise SystemExit(7)
"""
_NESTED_LIST = """
import sys
sys.setrecursionlimit(10**9)
x = []
for _ in range(2 * 10**5): x = [x]
repr(x)
"""
_EXIT_ORDER = """
import atexit, threading, time
atexit.register(print, "atexit")
threading.Thread(target=lambda: (time.sleep(0.1), print("joined"))).start()
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
print("main")
"""
_SECRET_HUNT = """
import gc, os, sys
needle = "".join(reversed("TERCES-DETNALP"))
texts = [repr(dict(os.environ))]
mine = (globals(), locals())
for thing in gc.get_objects():
    if isinstance(thing, dict) and not any(thing is one for one in mine):
        texts += [value for value in list(thing.values()) if isinstance(value, str)]
    elif isinstance(thing, (list, tuple)) and thing is not texts:
        texts += [value for value in thing if isinstance(value, str)]
frame = sys._getframe()
while frame:
    texts.append(repr(list(frame.f_locals)))
    frame = frame.f_back
print("FOUND" if any(needle in text for text in texts) else "clean")
"""
_PARENT_KILL = """
import os
for target in (os.getppid() or 1, 1):
    try:
        os.kill(target, 9)
    except OSError:
        pass
print("alive")
"""

RESOURCES = [
    Threat(
        row="1-fork-bomb",
        code="import os\nwhile True: os.fork()",
        # Each child that may not fork prints its traceback: quick ones fill the output first.
        expect=("error", "timeout", "output_limit"),
        errors=("BlockingIOError", "PermissionError"),
    ),
    Threat(
        row="2-fork-to-the-limit",
        code="import os, time\ntry:\n    while True:\n        if os.fork() == 0: time.sleep(60)\n"
        "except OSError:\n    print('limit')",
        expect=("ok", "memory_limit"),
        says="limit\n",
    ),
    Threat(
        row="3-memory-bomb",
        code="blocks = []\nwhile True: blocks.append(bytearray(1 << 24))",
        expect=("error", "memory_limit"),
        errors=("MemoryError",),
    ),
    Threat(
        row="4-memory-in-forks",
        code=_FORKS_THEN_MEMORY,
        expect=("memory_limit",),
        levels=FORKING,
    ),
    Threat(
        row="4-memory-behind-dead-first-threads",
        code=_DEAD_FIRST_THREADS,
        expect=("memory_limit",),
        levels=FORKING,
    ),
    Threat(row="5-list", code="[0] * 10**10", expect=("error",), errors=("MemoryError",)),
    Threat(
        row="5-array",
        code="import numpy as np\nnp.ones((40_000, 40_000))",
        expect=("error",),
        errors=("_ArrayMemoryError", "MemoryError"),
    ),
    denied("6-huge-mapping", "import mmap; mmap.mmap(-1, 1 << 40, flags=2 | 32)"),
    Threat(row="7-descriptors", code=_EXHAUST.format(make="open('/dev/null')"), says="EMFILE\n"),
    Threat(
        row="8-huge-file",
        code="import errno\ntry:\n    with open('f', 'wb', 0) as f:\n"
        "        while f.write(b'x' * (1 << 20)): pass\n"
        "except OSError as error: print(errno.errorcode[error.errno])",
        says="EFBIG\n",
    ),
    Threat(
        row="9-many-files",
        code="import errno\ntry:\n    for i in range(200): open(str(i), 'wb', 0).write(b'x' * (1 << 20))\n"
        "except OSError as error: print(errno.errorcode[error.errno])",
        says="ENOSPC\n",
        expect=("ok", "memory_limit"),
        levels=("full",),
    ),
    Threat(
        row="10-inodes",
        code="import errno\ntry:\n    for i in range(9000): open(str(i), 'w').close()\n"
        "except OSError as error: print(errno.errorcode[error.errno])",
        says="ENOSPC\n",
        levels=("full",),
    ),
    denied("11-sparse-file", "open('f', 'wb').truncate(1 << 40)"),
    denied("11-fallocate", "import os; os.posix_fallocate(os.open('f', 66), 0, 1 << 40)"),
    Threat(
        row="12-temporary-folders",
        code="for name in ('/tmp/a', '/var/tmp/b', '/dev/shm/c', '/mnt/d'): open(name, 'w').write(name)\n"
        "print('written')",
        says="written\n",
        levels=("full",),
    ),
    denied("12-system-folder", "open('/usr/lib/x', 'w')"),
    Threat(row="13-stdout", code="while True: print('x' * 1000)", expect=("output_limit",)),
    Threat(
        row="13-stderr",
        code="import sys\nwhile True: sys.stderr.write('x' * 1000)",
        expect=("output_limit",),
    ),
    Threat(row="14-long-line", code="print('a' * 10**7)", expect=("output_limit",)),
    Threat(
        row="15-grandchild-holds-stdout",
        code="import os, time\nprint('out', flush=True)\nif os.fork() == 0: time.sleep(60)",
        says="out\n",
        levels=FORKING,
    ),
    Threat(row="16-daemon", code=_LEAVE_DAEMON, says="left\n", levels=FORKING),
    Threat(
        row="17-stops-itself",
        code="import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
        expect=("timeout",),
    ),
    Threat(
        row="18-ignores-signals",
        code="import signal, time\nfor s in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:\n"
        "    signal.signal(s, signal.SIG_IGN)\nprint('deaf')\ntime.sleep(60)",
        expect=("timeout",),
        says="deaf\n",
    ),
    Threat(
        row="71-thread-bomb",
        code="import threading\nstop = threading.Event()\n"
        "while True: threading.Thread(target=stop.wait, daemon=True).start()",
        expect=("error",),
        errors=("RuntimeError",),
    ),
    Threat(
        row="73-busy-threads",
        code="import threading\nfor _ in range(8): threading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()",
        expect=("timeout",),
    ),
]

OTHERS = [
    Threat(
        row="19-kill-all",
        code="import os\ntry: os.kill(-1, 9)\nexcept OSError: pass\nprint('alone')",
        says="alone\n",
    ),
    Threat(row="19-kill-parent", code=_PARENT_KILL, says="alive\n"),
    # The first process of the room shares memory with the factory: no signal may run code there.
    Threat(
        row="19-kill-first",
        code="import os, time\nfor number in range(1, 65):\n    try: os.kill(1, number)\n    except OSError: pass\ntime.sleep(0.1)\nprint('alive')",
        says="alive\n",
        levels=("full",),
    ),
    *system_call(
        "20",
        "101, 16, 1, 0, 0",
        "310, 1, 0, 0, 0, 0, 0",
        "311, 1, 0, 0, 0, 0, 0",
        "438, 3, 0, 0",
        "312, 1, 1, 0, 0, 0",
    ),
    denied("21-environ-of-parent", "import os; open(f'/proc/{os.getppid() or 1}/environ').read()"),
    denied("21-memory-of-parent", "import os; open(f'/proc/{os.getppid() or 1}/mem', 'rb')"),
    denied("21-processes", "import os; os.listdir('/proc')"),
    denied("22-own-memory", "open('/proc/self/mem', 'r+b')"),
    Threat(row="23-24-secrets", code=_SECRET_HUNT, says="clean\n"),
    denied("25-shadow", "open('/etc/shadow').read()"),
    denied("25-home", "import os; os.listdir('/root/.ssh')"),
    Threat(
        row="25-accounts",
        code="try: print('FOUND' if 'root:' in open('/etc/passwd').read() else 'clean')\n"
        "except OSError: print('clean')",
        says="clean\n",
    ),
    Threat(
        row="27-root-folder",
        code="import os\ntry: names = os.listdir('/')\nexcept OSError: names = []\n"
        "print(sorted(set(names) & {'boot', 'home', 'opt', 'proc', 'run', 'sys', 'srv'}))",
        says="[]\n",
    ),
    *(
        denied(f"28-connect-{host}", f"import socket; socket.create_connection(('{host}', 80), 5)")
        for host in ("127.0.0.1", "169.254.169.254", "192.0.2.1", "::1")
    ),
    denied("29-udp", "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)"),
    denied("29-dns", "import socket; socket.getaddrinfo('example.com', 80)"),
    denied("30-unix", "import socket; socket.socket(socket.AF_UNIX)"),
    *(
        denied(f"31-family-{family}", f"import socket; socket.socket({family}, {kind}, {protocol})")
        for family, kind, protocol in ((2, 3, 1), (16, 3, 0), (40, 1, 0), (17, 3, 3), (38, 5, 0))
    ),
    Threat(
        row="32-event-loop",
        code="import asyncio, socket\na, b = socket.socketpair()\na.send(b'x')\n"
        "async def main():\n    await asyncio.sleep(0)\n    return b.recv(1)\nprint(asyncio.run(main()))",
        says="b'x'\n",
    ),
    *system_call("33", "165, 0, 0, 0, 0, 0", "166, 0, 0", "155, 0, 0", "161, b'.'", "430, 0, 0"),
    *system_call("34", "272, 0x10000000", "308, 0, 0", "56, 0x10000011, 0, 0, 0, 0", "435, 0, 0"),
    *system_call("34-inotify", "253", "294, 0"),  # Landlock does not govern it
    *system_call("35", "250, 0, -3, 0", "248, 0, 0, 0, 0, 0", "249, 0, 0, 0, 0"),
    *system_call("36", "425, 1, 0", "426, 0, 0, 0, 0, 0, 0", "427, 0, 0, 0, 0"),
    *system_call("37", "321, 0, 0, 0", "298, 0, 0, -1, -1, 0", "323, 0"),
    *system_call("38", "304, 0, 0, 0", "303, 0, 0, 0, 0, 0"),
    *system_call(
        "39", "246, 0, 0, 0, 0", "175, 0, 0, 0", "313, 0, 0, 0", "176, 0, 0", "169, 0, 0, 0, 0"
    ),
    *system_call("39b", "167, 0, 0", "168, 0", "163, 0", "179, 0, 0, 0, 0"),
    *system_call("40", "135, 0xffffffff", "154, 0, 0, 0", "172, 3", "173, 0, 0, 0"),
    Threat(row="41-i386", code=_MACHINE_CODE, expect=("crashed",), signal="SIGSYS", x86_only=True),
    Threat(
        row="41-x32",
        code="import ctypes\nctypes.CDLL(None).syscall(0x40000000 + 39)",
        expect=("crashed",),
        signal="SIGSYS",
        x86_only=True,
    ),
    *system_call("42", "319, b'x', 0", "322, 1, b'', 0, 0, 0x1000", "447, 0"),
    Threat(
        row="43-subprocess",
        code="import subprocess\nsubprocess.run(['/bin/true'])",
        expect=("error",),
        errors=("PermissionError",),
    ),
    Threat(row="43-shell", code="import os\nprint(os.system('true') != 0)", says="True\n"),
    denied("44-setuid-program", "import os; os.execv('/bin/su', ['su'])"),
    denied("45-become-root", "import os; os.setuid(0)"),
    *system_call("45", "126, 0, 0"),
    denied("49-hard-link", "import os; os.link(os.__file__, 'x')"),
    denied("50-device", "import os; os.mknod('d', 0o60666, os.makedev(254, 0))"),
    Threat(
        row="51-setuid-bit",
        code="import os\nopen('p', 'w').close()\nos.chmod('p', 0o4777)\nprint('harmless')",
        says="harmless\n",
        levels=FORKING,  # at level basic modes cannot be set at all
    ),
    *(
        denied(f"74-{name}", f"open('/dev/{name}', 'rb')")
        for name in ("nvidia0", "kvm", "fuse", "vda", "sda", "mem", "tty")
    ),
    denied("75-clock", "import time; time.clock_settime(time.CLOCK_REALTIME, 0)"),
    denied("75-realtime", "import os; os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))"),
    denied("75-nice", "import os; os.nice(-10)"),
    Threat(
        row="75-limits",
        code="import resource\ntry: resource.setrlimit(resource.RLIMIT_NPROC, (10**6, 10**6))\n"
        "except (ValueError, OSError): print('denied')",
        says="denied\n",
    ),
    *system_call("75", "227, 0, 0"),
    *system_call(
        "76", "29, 0, 4096, 0x200", "68, 0, 0x200", "64, 0, 1, 0x200", "240, b'/q', 66, 0, 0"
    ),
    *system_call("77", "16, 0, 0x5412, 0"),
]

PROGRAMS = [
    Threat(
        row="52-pickle",
        code="import pickle\npickle.loads(b'\\x80\\x04\\x95\\xff\\xff\\xff\\xff\\xff\\xff\\xff\\x7fgarbage')",
        expect=("error", "crashed"),
    ),
    Threat(
        # It runs past its own end, so what it does is chance: it may meet a harmless return there.
        row="53-bytecode",
        code="def f(): pass\nf.__code__ = f.__code__.replace(co_code=b'\\x64\\xff' * 50, co_stacksize=0)\nf()",
        expect=("ok", "error", "crashed", "timeout"),
    ),
    Threat(
        row="54-recursion",
        code="import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1)\nf(0)",
        expect=("error", "timeout", "crashed", "memory_limit"),
    ),
    # Python 3.12 limits the depth of recursion in C as well.
    Threat(row="55-c-recursion", code=_NESTED_LIST, expect=("crashed",), signal="SIGSEGV")
    if sys.version_info < (3, 12)
    else Threat(
        row="55-c-recursion", code=_NESTED_LIST, expect=("error",), errors=("RecursionError",)
    ),
    Threat(
        row="56-nested-source",
        code="(" * 10_000 + ")" * 10_000,
        expect=("error",),
        errors=("SyntaxError", "MemoryError", "RecursionError"),
    ),
    Threat(
        row="57-null-pointer",
        code="import ctypes\nprint('before')\nctypes.string_at(0)",
        expect=("crashed",),
        signal="SIGSEGV",
        says="before\n",
    ),
    Threat(
        row="57-out-of-bounds",
        code="import numpy as np\nx = np.lib.stride_tricks.as_strided(np.zeros(1), (1 << 40,), (4096,))\nx[1 << 35] = 1",
        expect=("crashed",),
        signal="SIGSEGV",
    ),
    Threat(row="58-abort", code="import os\nos.abort()", expect=("crashed",), signal="SIGABRT"),
    Threat(row="59-digits", code="str(10**(10**5))", expect=("error",), errors=("ValueError",)),
    Threat(row="59-power", code="9**9**9", expect=("timeout",)),
    Threat(
        row="60-regex",
        code="import re\nre.match(r'(a+)+$', 'a' * 40 + 'b')",
        expect=("timeout",),
    ),
    Threat(
        row="61-sleep",
        code="import time\nprint('so far')\ntime.sleep(60)",
        expect=("timeout",),
        says="so far\n",
    ),
    Threat(row="61-pipe", code="import os\nos.mkfifo('p')\nopen('p')", expect=("timeout",)),
    Threat(
        row="61-atexit",
        code="import atexit, time\natexit.register(time.sleep, 60)\nprint('main')",
        expect=("timeout",),
        says="main\n",
    ),
    Threat(
        row="61-thread",
        code="import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\nprint('main')",
        expect=("timeout",),
        says="main\n",
    ),
    Threat(row="62-no-input", code="input()", expect=("error",), errors=("EOFError",)),
    Threat(row="62-input", code="print(input() + input())", stdin="a\nb\n", says="ab\n"),
    Threat(row="63-unread-input", code="print(1)", stdin="x" * 500_000, says="1\n"),
    Threat(
        row="63-unread-input-and-error",
        code="1/0",
        stdin="x" * 500_000,
        expect=("error",),
        errors=("ZeroDivisionError",),
    ),
    Threat(row="64-closed-stdout", code="import sys\nsys.stdout.close()", expect=("ok", "exit")),
    Threat(row="64-closed-descriptor", code="import os\nos.close(1)", expect=("ok", "exit")),
    Threat(
        row="65-bad-bytes",
        code="import os\nos.write(1, b'\\xff\\x00ok\\n')\nprint('\\udcff')",
        says="ok\n",
    ),
    Threat(
        row="65-half-pair",
        code="print('\\ud800')",
        expect=("error",),
        errors=("UnicodeEncodeError",),
    ),
    Threat(row="66-nul", code="print(1)\x00", expect=("error",), errors=("SyntaxError",)),
    Threat(row="66-surrogate", code="'\ud800'", expect=("error",), errors=("SyntaxError",)),
    Threat(row="66-mark", code="\ufeffprint('bom')", says="bom\n"),
    Threat(row="66-lines", code="x = 1\r\nif x:\r\n\tprint('crlf')\r\n", says="crlf\n"),
    Threat(row="66-cookie", code="# -*- coding: latin-1 -*-\nprint('\u00e9')", says="\u00e9\n"),
    Threat(row="67-long", code="x = 1\n" * 20_000 + "print('end')", says="end\n"),
    Threat(row="69-forged", code=_FORGE, expect=("exit",)),
    *(
        Threat(row=f"69-forged-{name}", code=_report(frame) + ending, expect=(status,))
        for name, frame, ending, status in (
            ("wait-status", {"wait_status": 2**70}, "", "ok"),
            ("refusal", {"refused": "never ran"}, "", "ok"),
            ("start", {"started": False}, _report({"refused": "never ran"}), "ok"),
            ("setup", {"error": "boo"}, "os._exit(70)", "exit"),
            (
                "depth",
                {"error": functools.reduce(lambda inner, _: [inner], range(900), [])},
                "",
                "ok",
            ),
        )
    ),
    Threat(row="69-surrogate", code="raise ValueError('\\ud800')", expect=("error",)),
    Threat(row="70-packets", code=_PACKETS, says="".join(f"{n:03}\n" for n in range(200))),
    Threat(row="79-interrupts", code=_INTERRUPTS, says="5\n", levels=FORKING),
    Threat(row="70-order", code=_EXIT_ORDER, says="main\njoined\natexit\n"),
    Threat(
        row="72-multiprocessing",
        code="import multiprocessing\nwith multiprocessing.Pool(2) as pool: print(pool.map(abs, [-1, 2]))",
        says="[1, 2]\n",
        levels=("full",),
    ),
    Threat(
        row="78-hooks",
        code="import builtins, sys\nsys.excepthook = None\nsys.stderr = None\ndel builtins.print\n1/0",
        expect=("error",),
        errors=("ZeroDivisionError",),
    ),
    Threat(row="78-streams", code="import sys\nsys.stdout = sys.stderr = None", expect=("ok",)),
    Threat(
        row="79-interrupt",
        code="raise KeyboardInterrupt",
        expect=("error",),
        errors=("KeyboardInterrupt",),
    ),
    Threat(
        row="79-generator", code="raise GeneratorExit", expect=("error",), errors=("GeneratorExit",)
    ),
    Threat(
        row="79-exit-in-thread",
        code="import sys, threading\nt = threading.Thread(target=sys.exit, args=(3,))\nt.start()\nt.join()\nprint('on')",
        says="on\n",
    ),
    Threat(
        row="81-poisoned",
        code="import colorsys",
        files={"colorsys.py": "cHJpbnQoJ21pbmUnKQ=="},
        says="mine\n",
    ),
    Threat(
        row="89-warnings",
        code="import warnings\nwarnings.simplefilter('always')\nwhile True: warnings.warn('x' * 500)",
        expect=("output_limit",),
    ),
    Threat(
        row="90-locale",
        code="import locale, os, time\nprint(os.environ['LANG'], time.tzname[0], hash('x') == hash('x'), len('\u00e9'))",
        says="C.UTF-8 UTC True 1\n",
    ),
    *(
        Threat(row=f"68-exit-{name}", code=f"import sys\n{call}", expect=(status,))
        for name, call, status in (
            ("none", "sys.exit(None)", "ok"),
            ("3", "sys.exit(3)", "exit"),
            ("text", "sys.exit('bye')", "exit"),
            ("256", "sys.exit(256)", "ok"),
            ("hard", "import os; os._exit(5)", "exit"),
            ("huge", "sys.exit(10**30)", "exit"),
        )
    ),
    # What CPython does between the last line of a program and its exit.
    Threat(
        row="ending-file",
        code="import atexit, os\nf = open('a', 'w')\nf.write('42')\nclass A:\n    def __del__(self): print(os.path.getsize('a'))\na = A()\natexit.register(print, 'exit')",
        says="exit\n2\n",
    ),
    Threat(
        row="ending-generator",
        code="def g():\n    try: yield\n    finally: print('finally')\nh = g()\nnext(h)",
        says="finally\n",
    ),
    Threat(
        row="ending-error-keeps-files",
        code="f = open('a', 'w')\nf.write('42')\nclass A:\n    def __del__(self): print('del')\na = A()\n1 / 0",
        expect=("error",),
        errors=("ZeroDivisionError",),
    ),
    Threat(
        row="ending-hangs",
        code="class A:\n    def __del__(self):\n        while True: pass\na = A()",
        expect=("timeout",),
    ),
    Threat(
        row="ending-hangs-at-exit",
        code="import atexit, time\natexit.register(time.sleep, 60)",
        expect=("timeout",),
    ),
    Threat(
        row="ending-crashes",
        code="import os\nclass A:\n    def __del__(self, kill=os.kill, pid=os.getpid()): kill(pid, 11)\na = A()",
        expect=("crashed",),
        signal="SIGSEGV",
    ),
    Threat(
        row="ending-exit-code",
        code="import os\nclass A:\n    def __del__(self, exit=os._exit): exit(7)\na = A()",
        expect=("exit",),
    ),
    Threat(
        row="ending-thread",
        code="import threading, time\ndef f():\n    time.sleep(0.1)\n    print('thread')\nthreading.Thread(target=f).start()\nprint('main')",
        says="main\nthread\n",
    ),
    Threat(
        row="ending-of-c", code="import ctypes\nctypes.CDLL(None).printf(b'from C')", says="from C"
    ),
    Threat(
        row="ending-flush",
        code="import sys\nsys.stdout = open('/dev/full', 'w')\nprint('x')",
        expect=("exit",),
    ),
    Threat(
        row="ending-child",
        code="import os\nf = open('a', 'w')\nif os.fork() == 0: f.write('child')\nelse: os.wait(); print(open('a').read())",
        says="child\n",
        levels=FORKING,
    ),
    Threat(
        row="main-file",
        code="import os, sys, __main__\nprint(os.path.basename(__file__), open(__file__).readline() == open(sys.argv[0]).readline(), type(__builtins__).__name__, os.path.isabs(__file__))",
        says="main.py True module True\n",
    ),
    Threat(
        row="user-name",
        code="import getpass, os\nprint(getpass.getuser() == os.environ['USER'])",
        says="True\n",
    ),
]

THREATS = [*RESOURCES, *OTHERS, *PROGRAMS, *FENCE]

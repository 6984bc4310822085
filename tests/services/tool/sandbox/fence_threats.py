# ruff: noqa: E501 - programs are easier to compare when each of their lines is one line here
"""Threats that were found after the design's table: each is one case of a kind."""

from dataclasses import replace

from threat import FORKING, Threat, denied, system_call

LEFTOVERS = [
    *(
        Threat(
            row=f"91-deep-{depth}",
            code=f"import os\nfor _ in range({depth}):\n    os.mkdir('d'); os.chdir('d')\nprint('deep')",
            says="deep\n",
        )
        for depth in (1500, 3000)
    ),
    Threat(
        row="91-deep-in-tmp",
        code="import os, tempfile\nos.chdir(tempfile.gettempdir())\nfor _ in range(1200):\n    os.mkdir('d'); os.chdir('d'); open('f', 'w').close()\nprint('deep')",
        says="deep\n",
    ),
    Threat(
        row="91-closed-folders",
        code="import os\nfor n in range(50):\n    os.makedirs(f'a{n}/b/c')\n    open(f'a{n}/f', 'w').close()\n    os.mkdir(f'a{n}/shut', 0)\nprint('closed')",
        says="closed\n",
    ),
    Threat(
        row="91-closed-everything",
        code="import os\nos.mkdir('d'); os.chdir('d')\nfor n in range(1200):\n    os.mkdir('d'); os.chdir('d'); os.chmod('..', 0)\nprint('closed')",
        says="closed\n",
        levels=FORKING,
    ),
    Threat(
        row="91-many-files",
        code="import os\nfor n in range(4000): os.close(os.open(f'{n}', os.O_CREAT))\nprint('many')",
        says="many\n",
    ),
    Threat(
        row="91-odd-names",
        code="import os\nos.mkfifo('pipe')\nos.symlink('/', 'root')\nos.symlink('loop', 'loop')\n"
        "for name in (b'\\xff\\xfe', b'a\\nb', b'-rf', b' ', b'x' * 255): os.mkdir(name); os.close(os.open(name + b'/' + name, os.O_CREAT))\nprint('odd')",
        says="odd\n",
    ),
    Threat(
        # The owner of a pipe gets a signal when data comes, by default one that kills.
        row="91-signal-by-owner",
        code="import fcntl, os\nr, w = os.pipe()\nfor pid in range(1, 3000):\n    if pid == os.getpid(): continue\n"
        "    try:\n        fcntl.fcntl(r, fcntl.F_SETOWN, pid)\n        fcntl.fcntl(r, 10, 9)\n"
        "        fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)\n        os.write(w, b'x')\n    except OSError: pass\nprint('sent')",
        says="sent\n",
    ),
]

# The level basic shares its user id with the service and with everything else of the user. The
# interpreter's own files and the service stand for what is outside.
_ONE_USER = ("basic",)
_ATTRIBUTES = {
    "chmod": "os.chmod(os.__file__, 0o644)",
    "chmod-own-folder": "os.chmod(os.path.dirname(os.path.dirname(os.getcwd())), 0)",
    "chmod-relative": "os.chmod('..', 0o777)",
    "chmod-dir-fd": "os.chmod('os.py', 0o644, dir_fd=os.open(os.path.dirname(os.__file__), os.O_RDONLY))",
    "chown": "os.chown(os.__file__, os.getuid(), os.getgid())",
    "lchown": "os.lchown(os.__file__, os.getuid(), os.getgid())",
    "chown-no-change": "os.chown(os.__file__, -1, -1)",
    "utime": "os.utime(os.__file__)",
    "utime-given": "os.utime(os.__file__, (1, 1))",
    "utime-no-follow": "os.utime(os.__file__, (1, 1), follow_symlinks=False)",
    "setxattr": "os.setxattr(os.__file__, 'user.x', b'x')",
    "removexattr": "os.removexattr(os.__file__, 'user.x')",
}
_BY_DESCRIPTOR = {
    "fchmod": "os.fchmod(fd, 0o644)",
    "fchown": "os.fchown(fd, os.getuid(), os.getgid())",
    "futime": "os.utime(fd, (1, 1))",
    "fsetxattr": "os.setxattr(fd, 'user.x', b'x')",
    "flags": "import fcntl; fcntl.ioctl(fd, 0x40086602, b'\\0' * 8)",
    "flags-32": "import fcntl; fcntl.ioctl(fd, 0x40046602, b'\\0' * 8)",
    "project": "import fcntl; fcntl.ioctl(fd, 0x401c5820, b'\\0' * 28)",
    "verity": "import fcntl; fcntl.ioctl(fd, 0x40806685, b'\\0' * 128)",
}
_PROCESSES = {
    "prlimit": "resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (600, 600))",
    "prlimit-files": "resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (64, 64))",
    "priority-user": "os.setpriority(os.PRIO_USER, 0, 15)",
    "priority-group": "os.setpriority(os.PRIO_PGRP, 0, 15)",
    "priority-process": "os.setpriority(os.PRIO_PROCESS, os.getppid(), 15)",
    "affinity": "os.sched_setaffinity(os.getppid(), {0})",
    "scheduler": "os.sched_setscheduler(os.getppid(), os.SCHED_BATCH, os.sched_param(0))",
    "parameters": "os.sched_setparam(os.getppid(), os.sched_param(0))",
}
# prlimit64, setpriority, sched_setattr, ioprio_set of a process, of a group and of a user, with
# numbers whose upper halves the kernel ignores.
_RAW = (
    "302, os.getppid(), 0, b'\\xff' * 16, 0",
    "302, 0x700000000 + os.getppid(), 0, b'\\xff' * 16, 0",
    "141, 2, 0, 15",
    "141, 0x700000002, 0, 15",
    "314, os.getppid(), b'\\x30' + bytes(47), 0",
    "251, 1, os.getppid(), 0x6000",
    "251, 2, 0, 0x6000",
    "251, 3, os.getuid(), 0x6000",
)
_SAME_USER_STILL_WORKS = """
import os, pathlib, resource, shelve, shutil, tempfile, zipfile
os.nice(1)
os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0))
os.sched_setaffinity(0, os.sched_getaffinity(0))
resource.setrlimit(resource.RLIMIT_CPU, resource.getrlimit(resource.RLIMIT_CPU))
with tempfile.TemporaryDirectory() as folder, tempfile.NamedTemporaryFile() as file:
    pathlib.Path(folder, 'a').write_text('text')
    shutil.copy(folder + '/a', 'b'); shutil.copy2('b', 'c'); shutil.copytree(folder, 'tree')
    shutil.move('c', 'd')
    pathlib.Path('b').touch()
    with zipfile.ZipFile('z.zip', 'w') as archive: archive.write('b')
    with zipfile.ZipFile('z.zip') as archive: archive.extractall('out')
    shutil.make_archive('t', 'gztar', 'tree'); shutil.unpack_archive('t.tar.gz', 'untarred')
    with shelve.open('shelf') as shelf: shelf['x'] = 1
print(open('out/b').read(), open('untarred/a').read(), os.path.exists('tree/a'), open('d').read())
"""
ONE_USER = [
    *(denied(f"92-{name}", f"import os; {body}", _ONE_USER) for name, body in _ATTRIBUTES.items()),
    *(
        denied(
            f"92-{name}", f"import os; fd = os.open(os.__file__, os.O_RDONLY); {body}", _ONE_USER
        )
        for name, body in _BY_DESCRIPTOR.items()
    ),
    *(
        denied(f"93-{name}", f"import os, resource; {body}", _ONE_USER)
        for name, body in _PROCESSES.items()
    ),
    *(
        replace(threat, code=f"import os\n{threat.code}", levels=_ONE_USER)
        for threat in system_call("93", *_RAW)
    ),
    # setxattrat, removexattrat, file_setattr, fchmodat2 and calls that nobody knows yet.
    *system_call(
        "92", "463, 0, 0, 0, 0, 0", "466, 0, 0, 0", "469, 0, 0, 0", "452, 3, b'', 0, 0x1000"
    ),
    *system_call("94", "470, 0", "600, 0", "100000, 0"),
    Threat(row="92-library", code=_SAME_USER_STILL_WORKS, says="text text True text\n"),
]

DATAGRAMS = [
    *(
        denied(f"95-pair-{kind}", f"import socket; socket.socketpair(socket.AF_UNIX, {kind})")
        for kind in ("socket.SOCK_DGRAM", "socket.SOCK_SEQPACKET", "3", "2 | socket.SOCK_NONBLOCK")
    ),
    # A lease has others wait who open the file; the program's own file stands for one of its user.
    *(
        denied(
            f"97-{name}",
            f"import fcntl, os; fcntl.fcntl(os.open('main.py' if {kind} == 1024 else '.', 0), {kind}, 0)",
        )
        for name, kind in (("lease", 1024), ("notify", 1026))
    ),
    denied("95-connect", "import socket; a, b = socket.socketpair(); a.connect('/run/x')"),
    denied("95-send", "import socket; a, b = socket.socketpair(); a.sendto(b'x', '/run/x')"),
    denied(
        "95-message",
        "import socket; a, b = socket.socketpair(); a.sendmsg([b'x'], [], 0, '/run/x')",
    ),
    Threat(
        row="95-streams",
        code="import socket\na, b = socket.socketpair()\na.sendall(b'x'); a.sendmsg([b'y'])\nb.setblocking(False)\nprint(b.recv(2))",
        says="b'xy'\n",
    ),
]

_HIDDEN_MEMORY = """
import ctypes, os, time
ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)
for _ in range(10):
    if os.fork() == 0:
        block = bytearray(b'x') * (55 << 20)
        time.sleep(20)
        os._exit(0)
time.sleep(20)
"""
_MEMORY_OF_ORPHANS = """
import os, time
for _ in range(10):
    if os.fork() == 0:
        os.setsid()
        if os.fork(): os._exit(0)
        block = bytearray(b'x') * (55 << 20)
        time.sleep(20)
        os._exit(0)
    os.wait()
time.sleep(20)
"""
_CHILDREN_THAT_END = """
import os, time
end = time.monotonic() + 0.6
while time.monotonic() < end:
    for number in range(50):
        if os.fork() == 0:
            time.sleep(0.03 + 0.002 * (number % 20))
            os._exit(0)
    for _ in range(50): os.wait()
"""
_PAGE_TABLES = """
import mmap
blocks = []
for _ in range(4):
    block = mmap.mmap(-1, 1 << 37, flags=0x4022, prot=1)
    blocks.append(block)
    for place in range(0, 1 << 37, 2 << 20): block[place]
"""
_SHARED_MEMORY = """
import mmap, os, time
block = mmap.mmap(-1, 1 << 30)
for start in range(0, 1 << 30, 1 << 20): block[start:start + (1 << 20)] = b'x' * (1 << 20)
time.sleep(20)
"""
MEMORY = [
    Threat(row="96-hidden", code=_HIDDEN_MEMORY, expect=("memory_limit",), levels=FORKING),
    Threat(row="96-orphans", code=_MEMORY_OF_ORPHANS, expect=("memory_limit",), levels=FORKING),
    # They hold next to nothing, and end while they are looked at.
    Threat(row="96-ending", code=_CHILDREN_THAT_END, levels=FORKING),
    Threat(row="96-shared", code=_SHARED_MEMORY, expect=("memory_limit",)),
    # 192 MB of page tables and no other memory.
    Threat(row="96-page-tables", code=_PAGE_TABLES, expect=("memory_limit",)),
    *(
        denied(
            f"96-hide-{value}",
            f"import ctypes\n    if ctypes.CDLL(None).prctl({value}, 0, 0, 0): raise OSError",
        )
        for value in ("4, 0", "4, 2", "0x700000004, 0")
    ),
]

FENCE = [*LEFTOVERS, *ONE_USER, *DATAGRAMS, *MEMORY]

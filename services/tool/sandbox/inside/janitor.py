"""The janitor removes the folders of dead slots, at the levels whose slots have one on the disk.

What a program leaves can take minutes to remove, so this is done neither in the zygote, which has
slots to fork, nor before the caller gets its answer. Zygotes write a folder's name into a pipe. If
the janitor dies, the factory starts another and only the folders at hand stay, until the launcher's
own folder is removed (host/pool.py).
"""

import os
import signal
import threading
from collections import deque
from pathlib import Path
from typing import NoReturn

from services.common.trees import remove_tree
from services.tool.sandbox.inside import kernel

_WORKERS = 8  # removing a folder is mostly waiting: 3 ms on some disks
_SLICE_S = 5.0
"""Then the next folder gets its turn, so that a huge one does not hold up small ones."""
_SLICES = 60
"""Then a folder stays."""
_NAME_END = b"\n"


def open_pipe() -> tuple[int, int]:
    """The pipe for names: reading end, and a writing end that never blocks a zygote."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    return reader, writer


def hand_over(writer: int, folder: str) -> None:
    """Have a slot's folder removed. One that the pipe has no room for stays."""
    name = os.path.basename(folder).encode() + _NAME_END
    try:
        os.write(writer, name)  # so short that the kernel takes all of it or nothing
    except OSError:
        return


def start(reader: int, work_root: str) -> int:
    """Fork a janitor; returns its pid descriptor."""
    pid = os.fork()
    if pid == 0:
        try:
            kernel.die_with_parent(signal.SIGKILL)
            _serve(reader, Path(work_root))
        finally:
            os._exit(1)
    return os.pidfd_open(pid)


class _Waiting:
    """Folders to remove, each with the slices of time that it has left. Not a queue.SimpleQueue,
    whose library every fork of a zygote would map."""

    def __init__(self) -> None:
        self._folders: deque[tuple[Path, int]] = deque()
        self._count = threading.Semaphore(0)

    def put(self, folder: Path, slices: int) -> None:
        self._folders.append((folder, slices))
        self._count.release()

    def take(self) -> tuple[Path, int]:
        """The next folder, once there is one."""
        self._count.acquire()
        return self._folders.popleft()


def _serve(reader: int, work_root: Path) -> NoReturn:
    waiting = _Waiting()
    for _ in range(_WORKERS):
        threading.Thread(target=_work, args=(waiting,), daemon=True).start()
    rest = b""
    while True:
        data = os.read(reader, 1 << 16)
        *names, rest = (rest + data).split(_NAME_END)
        for name in names:
            waiting.put(work_root / os.fsdecode(name), _SLICES)


def _work(waiting: _Waiting) -> NoReturn:
    while True:
        folder, slices = waiting.take()
        if not remove_tree(folder, _SLICE_S) and slices > 1:
            waiting.put(folder, slices - 1)

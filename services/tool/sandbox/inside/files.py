"""Files of a slot: those of the request, those that it fetches, and a session's files by name.

Whatever lies in the folder may have been put there by a snippet, or be changed by one meanwhile. So
paths are walked folder by folder, no link is followed, and nothing but a regular file is opened for
reading or writing.
"""

import base64
import contextlib
import os
import stat
from typing import Any

from services.tool.sandbox import wire

_BESIDE_HOME = ("/mnt/", "/tmp/", "/figures/")
_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_LISTED = 1000
_MAX_SEEN = 20_000
"""Entries looked at for one listing, which takes about 0.1 s."""
MAX_FIGURES = 32
_MAX_PATH_CHARS = 512
"""No request can name a file with a longer path (wire/schemas.py)."""


def operate(home: str, message: wire.Message) -> wire.Message:
    """Carry out one operation on a session's files: put, get, list, or take the figures."""
    try:
        if message["op"] == "put":
            write_files(home, {message["path"]: message["data"]})
            return {"reply": None}
        if message["op"] == "get":
            content = read_file(home, message["path"], message["max_bytes"])
            return {"reply": base64.b64encode(content).decode("ascii")}
        if message["op"] == "figures":
            report: wire.Message = {"files": {}, "missing": {}}
            add_figures(report, home, message["max_bytes"])
            return {"reply": report}
        return {"reply": list_files(home)}
    except (OSError, ValueError, MemoryError) as error:
        missing = isinstance(error, FileNotFoundError)
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return {"refused": reason, "missing": missing}


def write_files(home: str, contents: dict[str, str]) -> None:
    """Write files by path and base64 content. The API process has checked the paths.

    Raises:
        OSError: a part of a path is a link or no folder, or the disk is full.
        ValueError: something else than a regular file has the name.
    """
    for path, content in contents.items():
        data = base64.b64decode(content)
        # Opened without O_TRUNC: what it is has to be known before it is changed.
        descriptor = _open(home, path, os.O_WRONLY | os.O_CREAT, make_folders=True)
        with os.fdopen(descriptor, "wb") as file:
            file.truncate()
            file.write(data)


def read_file(home: str, path: str, max_bytes: int) -> bytes:
    """Read a regular file. Raises OSError, and ValueError for another kind or too large a file."""
    with os.fdopen(_open(home, path, os.O_RDONLY), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise ValueError(f"{size} bytes, the limit is {max_bytes}")
        return file.read(max_bytes)


def figure_path(home: str, number: int) -> str:
    """Where a program saves its figure of this number, counted from 1."""
    return os.path.join(os.path.dirname(home), "figures", f"{number}.png")


def add_figures(report: wire.Message, home: str, max_bytes: int) -> None:
    """Move the figures that were saved into `report`, as figure-1.png and so on.

    Args:
        report: has `files`, where no file of this name is replaced, and `missing`, with reasons.
        max_bytes: of all of them together.
    """
    name_number = 0
    for number in range(1, MAX_FIGURES + 1):
        name_number += 1
        while f"figure-{name_number}.png" in report["files"]:
            name_number += 1
        try:
            content = read_file(home, f"/figures/{number}.png", max_bytes)
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            report["missing"][f"figure-{name_number}.png"] = reason
        else:
            max_bytes -= len(content)
            encoded = base64.b64encode(content).decode("ascii")
            report["files"][f"figure-{name_number}.png"] = encoded
        with contextlib.suppress(OSError):  # no file: the program made something else there
            os.unlink(figure_path(home, number))


def _open(home: str, path: str, flags: int, *, make_folders: bool = False) -> int:
    """Open a regular file step by step and never through a link, which may point anywhere."""
    home, path = _split(home, path)
    *folders, name = path.split("/")
    folder = os.open(home, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in folders:
            if make_folders:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, dir_fd=folder)
            inner = os.open(part, _FOLDER, dir_fd=folder)
            os.close(folder)
            folder = inner
        # Without O_NONBLOCK, opening a named pipe would wait for its other end.
        flags |= os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(name, flags, 0o666, dir_fd=folder)
    finally:
        os.close(folder)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("not a regular file")
    return descriptor


def _split(home: str, path: str) -> tuple[str, str]:
    """Split a job's path into its top folder, in or beside `home`, and the rest."""
    for prefix in _BESIDE_HOME:
        if path.startswith(prefix):
            return os.path.dirname(home) + prefix.rstrip("/"), path.removeprefix(prefix)
    return home, path


def list_files(home: str) -> list[dict[str, Any]]:
    """Paths and sizes of files below `home`, in order; what no request could name is left out."""
    listed: list[dict[str, Any]] = []
    seen = 0
    waiting = [""]  # a list and not recursion: folders may be nested deeper than Python's stack
    while waiting:
        prefix = waiting.pop()
        inner: list[str] = []
        with contextlib.suppress(OSError), os.scandir(os.path.join(home, prefix)) as entries:
            for entry in entries:
                seen += 1
                path = prefix + entry.name
                if seen > _MAX_SEEN or len(listed) == _MAX_LISTED:
                    return sorted(listed, key=_by_path)
                if len(path) > _MAX_PATH_CHARS:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    inner.append(f"{path}/")
                    continue
                with contextlib.suppress(OSError):  # removed meanwhile
                    size = entry.stat(follow_symlinks=False).st_size
                    listed.append({"path": path, "size_bytes": size})
        waiting += sorted(inner, reverse=True)
    return sorted(listed, key=_by_path)


def _by_path(item: dict[str, Any]) -> str:
    return str(item["path"])

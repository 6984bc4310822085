"""Starts the services that an evaluation needs and waits until they answer."""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from openrlhf_alp.launch.supervisor import Child, Supervisor
from services.common.wire import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE, TOOL_KEY_VARIABLE

_READY_S = 600.0
_GRACE_S = 30.0
_POLL_S = 0.3


class ServiceView(Protocol):
    """Who is told about the start."""

    def say(self, stage: str, text: str) -> None: ...

    def waiting(self, text: str) -> AbstractContextManager[object]: ...


class Services:
    """Services of one command, each with a log and a URL file in `folder`.

    Args:
        supervisor: ends them.
    """

    def __init__(self, supervisor: Supervisor, folder: Path, view: ServiceView) -> None:
        self._supervisor, self._folder, self._view = supervisor, folder, view
        self._children: list[Child] = []

    def start(self, name: str, module: str, flags: Sequence[str]) -> str:
        """Starts `python -m MODULE FLAGS` on a free port; returns its URL once it serves.

        Raises:
            ProcessFailedError: it ended, or did not serve within ten minutes.
        """
        started_s = time.monotonic()
        self._folder.mkdir(parents=True, exist_ok=True)
        stem = self._folder / f"{module.rpartition('.')[2]}-{len(self._children)}"
        url_file, log = stem.with_suffix(".url"), stem.with_suffix(".log")
        # Of an earlier run in this folder.
        url_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", module, "--host", "127.0.0.1", "--port", "0"]
        command += ["--url-file", str(url_file), *flags]
        child = self._supervisor.start(name, command, log=log, grace_s=_GRACE_S)
        self._children.append(child)
        with self._view.waiting(f"Starting {name.lower()} (log: {log})"):
            while not url_file.exists():
                self.check()
                if time.monotonic() - started_s > _READY_S:
                    raise child.failure()
                time.sleep(_POLL_S)
        url = url_file.read_text(encoding="utf-8").strip()
        seconds = time.monotonic() - started_s
        self._view.say("service", f"{name} serves at {url} after {seconds:.0f} s (log: {log})")
        return url

    def check(self) -> None:
        """Raises ProcessFailedError when one of them has ended."""
        for child in self._children:
            if not child.is_running:
                raise child.failure()


def fresh_keys() -> dict[str, str]:
    """Keys for services that this process starts, by the names of their variables.

    A key that is set already is kept: the user may share it with services that run elsewhere.
    """
    names = (API_KEY_VARIABLE, ADMIN_KEY_VARIABLE, TOOL_KEY_VARIABLE)
    return {name: os.environ.get(name) or secrets.token_urlsafe(32) for name in names}

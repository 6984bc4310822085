"""The services of a run: started, waited for, watched, and started again when one dies."""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import httpx
from prometheus_client.parser import text_string_to_metric_families

from openrlhf_alp.launch.supervisor import Child, ProcessFailedError, Supervisor
from services.common.wire import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE, TOOL_KEY_VARIABLE

SERVICE_GRACE_S = 4.5
_POLL_S = 0.3
_STATUS_S = 1.0
_READY_S = 600.0
_REQUESTS = ("openrlhf_alp_rollout_requests", "openrlhf_alp_tool_executions")
_TOKENS = "openrlhf_alp_rollout_sampled_tokens"
_VERSION = "openrlhf_alp_rollout_weight_version"


@dataclass(slots=True, kw_only=True)
class Server:
    """One service that this launch started."""

    name: str
    command: Callable[[int], list[str]]
    """Command line for a port; 0 takes any free one."""
    environment: Mapping[str, str]
    url_file: Path
    log: Path
    port: int = 0
    url: str = ""
    child: Child | None = None
    restarts: int = 0
    started_s: float = 0.0
    status: Status = field(default_factory=lambda: Status())

    @property
    def is_ready(self) -> bool:
        """Whether it has said that it accepts connections."""
        return self.url_file.exists()

    def failure(self) -> ProcessFailedError:
        """The error that shows how it ended."""
        assert self.child is not None
        return self.child.failure()


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What a service counts, from its /metrics; None while it does not answer."""

    at_s: float = 0.0
    version: int | None = None
    requests: int | None = None
    tokens: float | None = None
    tokens_per_s: float | None = None


class Servers:
    """All services of one kind.

    Args:
        ready_timeout_s: how long one may take until it answers.
        max_restarts: how often one may be started again.
        say: told of every restart.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        servers: Sequence[Server],
        *,
        ready_timeout_s: float,
        max_restarts: int,
        say: Callable[[str], None],
    ) -> None:
        self.all = list(servers)
        self._supervisor = supervisor
        self._ready_timeout_s, self._max_restarts, self._say = ready_timeout_s, max_restarts, say

    def start(self, check_others: Callable[[], None]) -> None:
        """Starts all at once, and returns when every one accepts connections.

        Raises:
            ProcessFailedError: one ended, or was not ready in time.
        """
        for server in self.all:
            self._start(server)
        while waiting := [server for server in self.all if not server.is_ready]:
            for server in waiting:
                self._require_start(server)
            check_others()
            time.sleep(_POLL_S)
        for server in self.all:
            server.url = server.url_file.read_text(encoding="utf-8").strip()
            # A restart takes the same port: the learner knows no other address.
            server.port = urlsplit(server.url).port or 0

    def check(self) -> None:
        """Raises ProcessFailedError when one has ended."""
        for server in self.all:
            if server.child is not None and not server.child.is_running:
                raise server.failure()

    def keep_running(self) -> None:
        """Starts again whatever has ended; does not wait for it.

        Raises:
            ProcessFailedError: one ended too often, or does not come back.
        """
        for server in self.all:
            assert server.child is not None
            if not server.child.is_running:
                if server.restarts >= self._max_restarts:
                    raise server.failure()
                self._restart(server)
            elif not server.is_ready:
                self._require_start(server)

    def poll(self) -> None:
        """Asks every service what it has counted."""
        for server in self.all:
            server.status = _ask(server.url, server.status) if server.is_ready else Status()

    def _start(self, server: Server) -> None:
        server.started_s = time.monotonic()
        server.child = self._supervisor.start(
            server.name,
            server.command(server.port),
            log=server.log,
            grace_s=SERVICE_GRACE_S,
            environment=server.environment,
            is_service=True,
        )

    def _restart(self, server: Server) -> None:
        assert server.child is not None
        ended = server.child.failure().ending
        server.restarts += 1
        self._say(f"{ended}; started again ({server.restarts} of {self._max_restarts})")
        self._supervisor.forget(server.child)
        # A process that was killed leaves it behind.
        server.url_file.unlink(missing_ok=True)
        self._start(server)

    def _require_start(self, server: Server) -> None:
        assert server.child is not None
        late = time.monotonic() - server.started_s > self._ready_timeout_s
        if late or not server.child.is_running:
            raise server.failure()


def _ask(url: str, before: Status) -> Status:
    now_s = time.monotonic()
    try:
        text = httpx.get(f"{url}/metrics", timeout=_STATUS_S).text
    except httpx.HTTPError:
        return Status(at_s=now_s)
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        if family.name in (*_REQUESTS, _TOKENS, _VERSION):
            values = [s.value for s in family.samples if not s.name.endswith("_created")]
            sums[family.name] = sum(values)
    tokens, rate = sums.get(_TOKENS), None
    if tokens is not None and before.tokens is not None and now_s > before.at_s:
        rate = max(0.0, tokens - before.tokens) / (now_s - before.at_s)
    requests = [sums[name] for name in _REQUESTS if name in sums]
    return Status(
        at_s=now_s,
        version=int(sums[_VERSION]) if _VERSION in sums else None,
        requests=int(requests[0]) if requests else None,
        tokens=tokens,
        tokens_per_s=rate,
    )


class ServiceView(Protocol):
    """Who is told about the start."""

    def say(self, stage: str, text: str) -> None: ...

    def waiting(self, text: str) -> AbstractContextManager[object]: ...


class Services:
    """Every service that a command starts: announced, and ended by the supervisor."""

    def __init__(self, supervisor: Supervisor, view: ServiceView) -> None:
        self._supervisor, self._view = supervisor, view
        self.groups: list[Servers] = []

    @property
    def all(self) -> list[Server]:
        """In the order of their start."""
        return [server for group in self.groups for server in group.all]

    def start(
        self,
        what: str,
        servers: Sequence[Server],
        *,
        ready_timeout_s: float = _READY_S,
        max_restarts: int = 0,
    ) -> tuple[str, ...]:
        """Starts services of one kind together; returns their URLs once all of them serve.

        Args:
            what: names them while they start.

        Raises:
            ProcessFailedError: one ended, or did not serve in time.
        """
        started_s = time.monotonic()
        for server in servers:
            server.url_file.parent.mkdir(parents=True, exist_ok=True)
            # Of an earlier run in this folder.
            server.url_file.unlink(missing_ok=True)
        group = Servers(
            self._supervisor,
            servers,
            ready_timeout_s=ready_timeout_s,
            max_restarts=max_restarts,
            say=partial(self._view.say, "restart"),
        )
        with self._view.waiting(f"Starting {what} (logs: {servers[0].log.parent})"):
            group.start(self.check)
        self.groups.append(group)
        seconds = time.monotonic() - started_s
        for server in servers:
            self._view.say(
                "service",
                f"{server.name} is ready at {server.url} after {seconds:.0f} s (log: {server.log})",
            )
        return tuple(server.url for server in servers)

    def check(self) -> None:
        """Raises ProcessFailedError when one of them has ended."""
        for group in self.groups:
            group.check()


def local_server(name: str, module: str, flags: Sequence[str], folder: Path) -> Server:
    """`python -m MODULE FLAGS` on a free port of this machine; log and URL file are in `folder`."""
    url_file = folder / f"{name}.url"
    command = [sys.executable, "-m", module, "--host", "127.0.0.1", "--port", "0"]
    command += ["--url-file", str(url_file), *flags]
    return Server(
        name=name,
        command=lambda port: command,
        environment={},
        url_file=url_file,
        log=url_file.with_suffix(".log"),
    )


def fresh_keys() -> dict[str, str]:
    """Keys for services that this process starts, by the names of their variables.

    A key that is set already is kept: the user may share it with services that run elsewhere.
    """
    names = (API_KEY_VARIABLE, ADMIN_KEY_VARIABLE, TOOL_KEY_VARIABLE)
    return {name: os.environ.get(name) or secrets.token_urlsafe(32) for name in names}

"""The services of a run: started, waited for, watched, and started again when one dies."""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import httpx
from prometheus_client.parser import text_string_to_metric_families

from openrlhf_alp.launch.processes.supervisor import Child, ProcessFailedError, Supervisor
from services.common.wire import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE, TOOL_KEY_VARIABLE

SERVICE_GRACE_S = 4.5
_POLL_S = 0.3
_STATUS_S = 1.0
_REQUESTS = ("openrlhf_alp_rollout_requests", "openrlhf_alp_tool_executions")
_TOKENS = "openrlhf_alp_rollout_sampled_tokens"
_VERSION = "openrlhf_alp_rollout_weight_version"


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What a service counts, from its /metrics; None while it does not answer."""

    at_s: float = 0.0
    version: int | None = None
    requests: int | None = None
    tokens: float | None = None
    tokens_per_s: float | None = None


@dataclass(slots=True, kw_only=True)
class Server:
    """One service that this launch starts."""

    name: str
    command: Callable[[int], list[str]]
    """Command line for a port; 0 takes any free one."""
    url_file: Path
    """Written by the service once it accepts connections; its log stands beside it."""
    environment: Mapping[str, str] = field(default_factory=dict)
    port: int = 0
    ready_timeout_s: float = 600.0
    """How long it may take until it answers."""
    max_restarts: int = 0
    """How often it may be started again."""
    url: str = ""
    child: Child | None = None
    is_borrowed: bool = False
    """Whether another process started it and sees to it."""
    restarts: int = 0
    started_s: float = 0.0
    status: Status = Status()

    @property
    def log(self) -> Path:
        return self.url_file.with_suffix(".log")

    @property
    def life(self) -> int | None:
        """Another number after every start; None until it has said that it accepts connections."""
        try:
            return self.url_file.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    @property
    def is_ready(self) -> bool:
        """Whether it has said that it accepts connections."""
        return self.life is not None

    @property
    def is_running(self) -> bool:
        return self.is_borrowed or (self.child is not None and self.child.is_running)

    def failure(self) -> ProcessFailedError:
        """The error that shows how it ended."""
        assert self.child is not None
        return self.child.failure(waited_s=time.monotonic() - self.started_s)

    def require_start(self) -> None:
        """Raises ProcessFailedError when it has ended, or takes longer than it may."""
        late = time.monotonic() - self.started_s > self.ready_timeout_s
        if late or not self.is_running:
            raise self.failure()


class ServiceView(Protocol):
    """Who is told about starts."""

    def say(self, stage: str, text: str) -> None: ...

    def waiting(self, text: str) -> AbstractContextManager[object]: ...


class Services:
    """Every service that a command starts: announced, watched, and ended by the supervisor."""

    def __init__(self, supervisor: Supervisor, view: ServiceView) -> None:
        self._supervisor, self._view = supervisor, view
        self.all: list[Server] = []
        """In the order of their start."""

    def start(self, what: str, servers: Sequence[Server]) -> tuple[str, ...]:
        """Starts services together; returns their URLs once all of them serve.

        Args:
            what: names them while they start.

        Raises:
            ProcessFailedError: one ended, or did not serve in time.
        """
        started_s = time.monotonic()
        with self._view.waiting(f"Starting {what} (logs: {servers[0].log.parent})"):
            for server in servers:
                server.url_file.parent.mkdir(parents=True, exist_ok=True)
                self._start(server)
            self.all += servers
            self.wait_ready()
        seconds = time.monotonic() - started_s
        for server in servers:
            server.url = server.url_file.read_text(encoding="utf-8").strip()
            # A restart takes the same port: the learner knows no other address.
            server.port = urlsplit(server.url).port or 0
            self._view.say(
                "service",
                f"{server.name} is ready at {server.url} after {seconds:.0f} s (log: {server.log})",
            )
        return tuple(server.url for server in servers)

    def borrow(self, servers: Sequence[Server], folder: Path) -> tuple[str, ...]:
        """Takes the URLs of services that another process runs, and which it starts again itself.

        Args:
            folder: where their files of addresses are.
        """
        for server in servers:
            server.url_file, server.is_borrowed = folder / server.url_file.name, True
            server.url = server.url_file.read_text(encoding="utf-8").strip()
            self._view.say("service", f"{server.name} runs already at {server.url}")
        self.all += servers
        return tuple(server.url for server in servers)

    def stop(self) -> None:
        """Ends them all."""
        for server in self.all:
            assert server.child is not None
            self._supervisor.stop(server.child)
        self.all.clear()

    def check(self) -> None:
        """Raises ProcessFailedError when one of them has ended."""
        for server in self.all:
            if not server.is_running:
                raise server.failure()

    def keep_running(self) -> None:
        """Starts again whatever has ended; does not wait for it.

        Raises:
            ProcessFailedError: one ended too often, or does not come back.
        """
        for server in self.all:
            if server.is_borrowed:
                continue
            if not server.is_running:
                self._restart(server)
            elif not server.is_ready:
                server.require_start()

    def wait_ready(self) -> None:
        """Waits for those that are starting, or starting again.

        Raises:
            ProcessFailedError: one ended, or did not serve in time.
        """
        while waiting := [server for server in self.all if not server.is_ready]:
            for server in waiting:
                server.require_start()
            self.check()
            time.sleep(_POLL_S)

    def poll(self) -> None:
        """Asks every service what it has counted."""
        for server in self.all:
            server.status = _ask(server.url, server.status) if server.is_ready else Status()

    def _start(self, server: Server) -> None:
        # Of an earlier run in this folder, or of a process that was killed.
        server.url_file.unlink(missing_ok=True)
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
        failure = server.failure()
        if server.restarts >= server.max_restarts:
            raise failure
        server.restarts += 1
        count = f"{server.restarts} of {server.max_restarts}"
        self._view.say("restart", f"{failure.ending}; started again ({count})")
        self._supervisor.forget(server.child)
        self._start(server)


def service_command(
    module: str, flags: Mapping[str, Any], *, url_file: Path, port: int
) -> list[str]:
    """`python -m MODULE` on this machine's loopback address, unless `flags` name another host."""
    # A short drain: whoever asks it has ended by then, and the end of a launch has a time limit.
    own = {"host": "127.0.0.1", "drain_s": 1.0, **flags, "port": port, "url_file": url_file}
    command = [sys.executable, "-m", module]
    for name, value in own.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            command += [f"--{flag}", str(value)]
    return command


def local_server(name: str, module: str, flags: Mapping[str, Any], folder: Path) -> Server:
    """`module` on a free port of this machine; log and URL file are in `folder`."""
    url_file = folder / f"{name}.url"
    return Server(
        name=name,
        command=lambda port: service_command(module, flags, url_file=url_file, port=port),
        url_file=url_file,
    )


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


def fresh_keys() -> dict[str, str]:
    """Keys for services that this process starts, by the names of their variables.

    A key that is set already is kept: the user may share it with services that run elsewhere.
    """
    names = (API_KEY_VARIABLE, ADMIN_KEY_VARIABLE, TOOL_KEY_VARIABLE)
    return {name: os.environ.get(name) or secrets.token_urlsafe(32) for name in names}

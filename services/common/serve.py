"""Run an ASGI app under uvicorn: port 0, a file with the bound URL, a clean stop, loop lag."""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from pathlib import Path
from typing import Any

import uvicorn
import uvloop
from starlette.types import ASGIApp

from services.common.connections import ConnectionLimits, Connections
from services.common.errors import ConfigError

logger = logging.getLogger(__name__)

_LAG_EVERY_S = 0.25


def bind_socket(host: str, port: int) -> socket.socket:
    """Bind `host:port` (port 0: any free one) before anything slow is started.

    Raises:
        ConfigError: the address is taken or is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    # A restarted service gets its port back while old connections are still in TIME_WAIT.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except (OSError, OverflowError) as error:
        sock.close()
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise ConfigError(
            f"Cannot bind {host}:{port}: {reason}. "
            "Fix: stop what listens there, choose another --port, or --port 0 for any free one."
        ) from error
    return sock


def bound_url(sock: socket.socket) -> str:
    """`http://host:port` of a bound socket, with brackets around an IPv6 address."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def write_url_file(path: Path, url: str) -> None:
    """Write `url` so that a reader sees the whole line or no file at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(url + "\n", encoding="utf-8")
    partial.replace(path)


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run the service's main coroutine on uvloop, which takes half the CPU per request."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main)


class _Server(uvicorn.Server):
    """uvicorn that returns after a graceful stop instead of raising the signal again.

    The caller's own cleanup then runs, and the exit status says success.
    """

    url_file: Path | None = None
    url: str = ""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        # A stop signal during the start must not announce a service that is about to end.
        if self.started and not self.should_exit:
            if self.url_file is not None:
                write_url_file(self.url_file, self.url)
            print(f"listening on {self.url}", flush=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        loop = asyncio.get_running_loop()
        handled = (signal.SIGINT, signal.SIGTERM)
        for signum in handled:
            loop.add_signal_handler(signum, self.handle_exit, signum, None)
        try:
            yield
        finally:
            for signum in handled:
                loop.remove_signal_handler(signum)


def server_config(
    app: ASGIApp, *, drain_s: float = 10.0, limits: ConnectionLimits | None = None
) -> uvicorn.Config:
    """How every service is served. Arguments as of `serve`."""
    connections = Connections(ConnectionLimits() if limits is None else limits)
    return uvicorn.Config(
        app,
        # uvicorn calls it as it would call a class of protocols.
        http=connections.connection,  # type: ignore[arg-type]
        # No route is one; their handshake has limits of its own.
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        # Clients pool connections; one closed between two requests of theirs costs a retry.
        timeout_keep_alive=75,
        timeout_graceful_shutdown=max(1, round(drain_s)),
    )


async def serve(
    app: ASGIApp,
    sock: socket.socket,
    *,
    url_file: Path | None = None,
    drain_s: float = 10.0,
    limits: ConnectionLimits | None = None,
) -> None:
    """Serve `app` on a bound socket until SIGINT or SIGTERM, then let open requests end.

    Args:
        app: the ASGI app; its lifespan shutdown runs before this returns.
        sock: from `bind_socket`; closed on return.
        url_file: written when the service accepts connections, removed on return.
        drain_s: seconds that open requests get after a stop signal before they are cancelled.
        limits: what connections may cost.

    Raises:
        ConfigError: the app's own start-up failed.
    """
    config = server_config(app, drain_s=drain_s, limits=limits)
    # What is loaded by now lives as long as the process, so the garbage collector may skip it.
    gc.collect()
    gc.freeze()
    server = _Server(config)
    server.url_file, server.url = url_file, bound_url(sock)
    try:
        await server.serve(sockets=[sock])
    finally:
        sock.close()
        if url_file is not None:
            url_file.unlink(missing_ok=True)
    if not server.started:
        raise ConfigError("The service could not start. Fix: see the error logged above.")


@contextlib.asynccontextmanager
async def watch_loop_lag(observe: Callable[[float], None]) -> AsyncIterator[None]:
    """While the body runs, call `observe` four times a second with the loop's lag in seconds."""
    watcher = asyncio.create_task(_watch(observe))
    try:
        yield
    finally:
        watcher.cancel()


async def _watch(observe: Callable[[float], None]) -> None:
    # Late timers are the earliest sign that a handler blocks the loop.
    loop = asyncio.get_running_loop()
    while True:
        due_s = loop.time() + _LAG_EVERY_S
        await asyncio.sleep(_LAG_EVERY_S)
        observe(max(0.0, loop.time() - due_s))

"""What one connection may cost before, between and during its requests.

uvicorn reads heads of any length and waits for them forever. Here every head has a size, every
connection that has shown no key has a lifetime, and their number is limited, so that a caller
without a key can neither fill the process nor keep others out.

    connection made -> no key yet: closed `unauthenticated_s` after it was made, and
                       first when room is needed
                    -> KeyGate finds a key (`Connection.authenticate`): only half heads, unread
                       replies and idle time end it
"""

import asyncio
import resource
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

EXTENSION = "openrlhf_alp.connection"
"""Key of `scope["extensions"]` under which an app finds the connection of its request."""

_PIECE_BYTES = 16 * 1024
"""Bytes given to the parser at a time, so that a limit is noticed within so many."""
_MAX_PIPELINED = 8
"""Requests sent ahead on one connection; the clients that people use send none."""
_REFUSALS = {
    400: b"Bad Request",
    408: b"Request Timeout",
    431: b"Request Header Fields Too Large",
}


def _share_of_descriptors(share: float) -> int:
    """Connections that `share` of this process's descriptors allows; 512 at most, for memory."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Each program that runs and each launcher needs descriptors too.
    return 512 if soft == resource.RLIM_INFINITY else max(16, min(512, int(soft * share)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """What connections may cost."""

    head_bytes: int = 32 * 1024
    """URL and headers of one request. A parser's piece of 16 KiB may come on top."""

    num_headers: int = 128
    """Headers of one request, its trailers included."""

    head_s: float = 30.0
    """Seconds from the first byte of a head to its last."""

    unauthenticated_s: float = 30.0
    """Seconds that a connection lives on which no request has shown a key."""

    unread_s: float = 60.0
    """Seconds that a reply waits for a caller that reads none of it."""

    refused_s: float = 5.0
    """Seconds in which the rest of a body that was refused may still come."""

    refused_bytes: int = 16 * 2**20
    """Bytes read and dropped of a body that was refused, so that its sender reads the answer."""

    max_unauthenticated: int = _share_of_descriptors(1 / 2)
    """Connections without a key. One more closes the oldest."""

    soft_max_unauthenticated: int = _share_of_descriptors(1 / 8)
    """Connections without a key, beyond which those older than `new_s` are closed."""

    new_s: float = 1.0
    """Seconds in which a caller with a key should have sent its first head, even in a burst."""

    max_idle: int = _share_of_descriptors(1 / 4)
    """Connections between two requests. One more closes the one that was idle longest."""


class Connections:
    """All connections of one server: who has shown no key, who is idle.

    Args:
        limits: what connections may cost.
    """

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        # In order of arrival: dictionaries keep it, and remove in constant time.
        self._unauthenticated: dict[Connection, float] = {}
        self._idle: dict[Connection, None] = {}

    def connection(self, *args: Any, **kwargs: Any) -> "Connection":
        """Build a connection of this server; uvicorn's `http` option takes this method."""
        return Connection(self, *args, **kwargs)

    def add(self, connection: "Connection") -> None:
        """Count a connection that has shown no key, and make room for it."""
        now = connection.loop.time()
        self._unauthenticated[connection] = now
        num = len(self._unauthenticated)
        oldest, since = next(iter(self._unauthenticated.items()))
        old = num > self.limits.soft_max_unauthenticated and now - since > self.limits.new_s
        if old or num > self.limits.max_unauthenticated:
            oldest.drop()

    def mark_idle(self, connection: "Connection") -> None:
        """Count a connection that waits for its next request."""
        self._idle[connection] = None
        if len(self._idle) > self.limits.max_idle:
            next(iter(self._idle)).drop()

    def mark_busy(self, connection: "Connection") -> None:
        """Stop counting a connection as idle."""
        self._idle.pop(connection, None)

    def leave_unauthenticated(self, connection: "Connection") -> None:
        """Stop counting a connection as one without a key: it has shown one, or it is gone."""
        self._unauthenticated.pop(connection, None)


class Connection(HttpToolsProtocol):
    """One connection."""

    def __init__(self, connections: Connections, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._connections = connections
        self._limits = connections.limits
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._authenticated = False
        self._refused = False
        self._in_head = False
        self._in_body = False
        self._num_headers = 0
        self._gap_bytes = 0
        """Bytes of the request since its beginning or the last piece of its body: a head, a
        trailer or a chunk extension, which the parser keeps in memory."""
        self._dropped_bytes = 0

    def authenticate(self) -> None:
        """A request of this connection has shown a key."""
        if not self._authenticated:
            self._authenticated = True
            self._connections.leave_unauthenticated(self)
            self._disarm("unauthenticated")

    def drop(self) -> None:
        """Close at once, whatever is unsent."""
        self._forget()
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm("unauthenticated", self._limits.unauthenticated_s, self._too_late)
        self._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._connections.mark_busy(self)
        for start in range(0, len(data), _PIECE_BYTES):
            if self._refused or self.transport.is_closing():
                return
            piece = data[start : start + _PIECE_BYTES]
            super().data_received(piece)
            self._gap_bytes += len(piece)
            if self._gap_bytes > self._limits.head_bytes:
                self._refuse(431)
        # Also before the first byte that counts: line breaks ahead of a request begin none.
        half = self._in_head or not (self.timeout_keep_alive_task or self._busy())
        if half and not self._in_body and "head" not in self._timers and not self._refused:
            self._arm("head", self._limits.head_s, self._too_late)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {EXTENSION: {"connection": self}}
        self._in_head = True
        self._gap_bytes = self._num_headers = self._dropped_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_headers += 1
        if self._num_headers > self._limits.num_headers:
            self._refuse(431)
        elif self._in_head:  # what comes after the head is a trailer, which nobody reads
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head, self._in_body = False, True
        self._gap_bytes = 0  # or a head that was just short enough would be refused with no answer
        self._disarm("head")
        if self._refused:
            return
        super().on_headers_complete()
        if len(self.pipeline) > _MAX_PIPELINED:
            self._refuse(400)

    def on_body(self, body: bytes) -> None:
        self._gap_bytes = 0
        if self._refused:
            return
        super().on_body(body)
        if self.cycle.response_complete:
            self._dropped_bytes += len(body)
            if self._dropped_bytes > self._limits.refused_bytes:
                self._refuse(400)

    def on_message_complete(self) -> None:
        self._in_body = False
        self._disarm("refused")
        if not self._refused:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        if self.cycle.response_complete:  # otherwise it is the next one, sent ahead
            # What came of a body that nobody read would be kept until the next request.
            self.cycle.body.clear()
            if self._in_body and not self.transport.is_closing():
                self._arm("refused", self._limits.refused_s, self.transport.close)
        super().on_response_complete()
        if self.timeout_keep_alive_task is not None:
            self._connections.mark_idle(self)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_unread()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._disarm("unread")

    def _unsupported_upgrade_warning(self) -> None:
        """Ignore the upgrade, as HTTP allows; a warning each would let anybody fill the log."""

    def _watch_unread(self, before: int | None = None) -> None:
        """Drop the connection when its caller reads nothing of a reply for `unread_s`."""
        unread = self.transport.get_write_buffer_size()
        if before is not None and unread >= before:
            self.drop()
        else:
            self._arm("unread", self._limits.unread_s, partial(self._watch_unread, unread))

    def _too_late(self) -> None:
        """The time for a head, or for showing a key, is over."""
        if self._in_head and not self._busy():
            self._refuse(408)
        else:
            self.drop()

    def _refuse(self, status: int) -> None:
        """Answer what cannot become a request, and close."""
        if self._refused:
            return
        self._refused = True
        # A status line behind another reply would be taken for the answer to the next request.
        if self._in_head and not self._busy():
            line = b"HTTP/1.1 %d %s\r\n" % (status, _REFUSALS[status])
            self.transport.write(line + b"content-length: 0\r\nconnection: close\r\n\r\n")
        self.transport.close()

    def _busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _forget(self) -> None:
        self._connections.leave_unauthenticated(self)
        self._connections.mark_busy(self)
        for name in list(self._timers):
            self._disarm(name)

    def _arm(self, name: str, after_s: float, then: Callable[[], None]) -> None:
        self._disarm(name)
        self._timers[name] = self.loop.call_later(after_s, then)

    def _disarm(self, name: str) -> None:
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()


def authenticate_connection(scope: Scope) -> None:
    """Say that the request of `scope` has shown a key; nothing under another server."""
    found = scope.get("extensions", {}).get(EXTENSION)
    if found is not None:
        found["connection"].authenticate()

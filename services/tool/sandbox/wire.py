"""Frames between the API process and a slot: four bytes of big-endian length, then one JSON object.

What a slot sends once it runs a snippet may be an attacker's: `FrameReader` bounds it, and reading
fails with `FrameError` only. Nothing read here decides a verdict; it describes an exception or
carries files.
"""

import json
import os
import struct
from typing import Any

Message = dict[str, Any]

_HEADER = struct.Struct(">I")


class FrameError(ValueError):
    """The bytes are not a frame: too long, not JSON, or not an object."""


def encode(message: Message) -> bytes:
    """Encode one message; JSON escapes lone surrogates."""
    body = json.dumps(message, separators=(",", ":")).encode("ascii")
    return _HEADER.pack(len(body)) + body


def decode(body: bytes) -> Message:
    """Decode the body of one frame. Raises FrameError."""
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise FrameError(f"frame is not JSON: {type(error).__name__}") from error
    if not isinstance(message, dict):
        raise FrameError(f"frame is a JSON {type(message).__name__}, an object is required")
    return message


class FrameReader:
    """Cut a byte stream into messages, holding at most one frame of `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """Add bytes and return the messages they complete. A FrameError makes it unusable."""
        self._buffer += data
        messages: list[Message] = []
        while len(self._buffer) >= _HEADER.size:
            (length,) = _HEADER.unpack_from(self._buffer)
            if length > self._max_bytes:
                raise FrameError(f"frame of {length} bytes, the limit is {self._max_bytes}")
            end = _HEADER.size + length
            if len(self._buffer) < end:
                break
            messages.append(decode(bytes(self._buffer[_HEADER.size : end])))
            del self._buffer[:end]
        return messages


def printable(message: Message) -> Message:
    """Replace lone surrogates in every text of a message: JSON may carry them, UTF-8 cannot.

    Raises:
        FrameError: it is nested too deeply.
    """
    try:
        return {key: _printable(value) for key, value in message.items()}
    except RecursionError as error:
        raise FrameError("frame is nested too deeply") from error


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_printable(key): _printable(item) for key, item in value.items()}
    return [_printable(item) for item in value] if isinstance(value, list) else value


def send(descriptor: int, message: Message) -> None:
    """Send one message on a blocking socket."""
    rest = memoryview(encode(message))
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def receive(descriptor: int) -> Message:
    """Receive one message on a blocking socket. Raises EOFError when the peer is gone."""
    (length,) = _HEADER.unpack(_receive_exactly(descriptor, _HEADER.size))
    return decode(_receive_exactly(descriptor, length))


def _receive_exactly(descriptor: int, count: int) -> bytes:
    buffer = bytearray()
    while len(buffer) < count:
        data = os.read(descriptor, count - len(buffer))
        if not data:
            raise EOFError("the peer closed the channel")
        buffer += data
    return bytes(buffer)

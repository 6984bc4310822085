"""Framing between the API process and a slot: a message comes out or FrameError, never else."""

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.tool.sandbox import wire

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner),
    max_leaves=8,
)
MESSAGES = st.dictionaries(st.text(), JSON_VALUES, max_size=4)


@given(st.lists(MESSAGES, max_size=5), st.integers(1, 50))
def test_messages_survive_any_cut_of_the_stream(messages: list[wire.Message], cut: int) -> None:
    stream = b"".join(wire.encode(message) for message in messages)
    reader = wire.FrameReader(1 << 20)
    read = [m for i in range(0, len(stream), cut) for m in reader.feed(stream[i : i + cut])]
    assert read == messages


@given(st.binary(max_size=300), st.integers(1, 64))
def test_garbage_is_a_frame_error_or_nothing(data: bytes, cut: int) -> None:
    reader = wire.FrameReader(256)
    try:
        messages = [m for i in range(0, len(data), cut) for m in reader.feed(data[i : i + cut])]
    except wire.FrameError:
        return
    assert all(isinstance(message, dict) for message in messages)


@given(st.integers(257, 2**32 - 1))
def test_an_announced_frame_above_the_limit_is_refused_before_it_is_read(length: int) -> None:
    with pytest.raises(wire.FrameError, match=f"frame of {length} bytes"):
        wire.FrameReader(256).feed(struct.pack(">I", length))


@pytest.mark.parametrize("body", [b"[]", b"1", b"nonsense", b"\xff", b"[" * 100_000])
def test_a_body_that_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(wire.FrameError):
        wire.decode(body)


def test_a_lone_surrogate_survives() -> None:
    """JSON escapes it, so the frame stays ASCII: length 4 + len('{"a":"\\ud800"}') = 4 + 14."""
    frame = wire.encode({"a": "\ud800"})
    assert len(frame) == 4 + 14
    assert json.loads(frame[4:]) == {"a": "\ud800"}

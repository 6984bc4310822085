"""Limits of JSON, hand-counted: a list of n items has n - 1 commas."""

import json
import time

import pytest

from services.common.errors import ApiError
from services.common.json_body import (
    MAX_CONTAINERS,
    MAX_DEPTH,
    MAX_ITEMS,
    MAX_VALUES,
    parse_json,
)

LARGE = 16 * 2**20


@pytest.mark.parametrize(
    "value",
    [
        {"code": "x = [1, 2]\n" * 100_000},
        {"code": '"\\"[{,}]' * 500_000},
        {"requests": [{"code": "print(1)", "timeout_s": 2.0}] * 4096},
        "\ud800",
        [[0] * MAX_ITEMS] * (MAX_VALUES // MAX_ITEMS),
        0,
    ],
)
async def test_bodies_that_people_send_pass(value: object) -> None:
    assert await parse_json(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    "body",
    [
        b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1),
        b'{"a":' * 500 + b"1" + b"}" * 500,
        b"[" * LARGE,
        b"[" + b"[]," * 5_300_000 + b"[]]",
        b"[" + b"0," * MAX_VALUES + b"00,0]",
        b"[" + b'"",' * (LARGE // 3),
        b'""' * (LARGE // 2) + b"[" * MAX_DEPTH + b"[",
        b"[{}" + b",{}" * MAX_CONTAINERS + b"]",
        b'{"a": [0' + b",0" * MAX_ITEMS + b"]}",
        b'[{"a":0' + b"".join(b',"%d":0' % i for i in range(MAX_ITEMS)) + b"}]",
    ],
    ids=[
        *("depth", "objects", "open", "wide", "values", "strings", "no commas", "containers"),
        *("items", "keys"),
    ],
)
async def test_bodies_above_a_limit_are_refused_quickly(body: bytes) -> None:
    started = time.process_time()
    with pytest.raises(ApiError, match="body_too_complex"):
        await parse_json(body)
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    "body", [b'["' + b'\\"' * (LARGE // 2), b'["' * 100_000, b"[" * 65 + b'"\\', b"{", b""]
)
async def test_what_is_no_json_is_told_quickly(body: bytes) -> None:
    started = time.process_time()
    with pytest.raises((json.JSONDecodeError, ApiError)):
        await parse_json(body)
    assert time.process_time() - started < 2


async def test_only_utf_8_is_json() -> None:
    """U+2200 holds the byte of a quote: a scanner of UTF-16 would take lists for strings."""
    assert await parse_json(b"\xef\xbb\xbf[1]") == [1]
    text = '["\u2200",' + "[]," * 1_000_000 + "[]]"
    for encoding in ("utf-16", "utf-16-le", "utf-32-be"):
        started = time.process_time()
        with pytest.raises((ValueError, ApiError)):
            await parse_json(text.encode(encoding))
        assert time.process_time() - started < 2

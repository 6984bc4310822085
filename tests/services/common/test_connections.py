"""Callers without a key, on real sockets: what they hold is small, and not for long."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx
import pytest
import uvicorn
from guarded_app import JSON, KEY, guarded_app

from services.common.connections import ConnectionLimits
from services.common.serve import bind_socket, server_config

RIGHT = {"authorization": f"Bearer {KEY}", **JSON}
HALF = b"POST /echo HTTP/1.1\r\nhost: x\r\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    port: int
    server: uvicorn.Server
    writers: list[asyncio.StreamWriter]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def connect(self, data: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writers.append(writer)
        writer.write(data)
        return reader, writer

    async def answer(self, data: bytes) -> bytes:
        """What the service sends before it closes the connection."""
        reader, _ = await self.connect(data)
        with contextlib.suppress(ConnectionResetError):
            return await asyncio.wait_for(reader.read(), 10)
        return b""


@contextlib.asynccontextmanager
async def serving(limits: ConnectionLimits, body_within_s: float = 60.0) -> AsyncIterator[Served]:
    sock = bind_socket("127.0.0.1", 0)
    app = guarded_app(body_within_s=body_within_s)
    server = uvicorn.Server(server_config(app, drain_s=1, limits=limits))
    task = asyncio.create_task(server.serve(sockets=[sock]))
    while not server.started:
        await asyncio.sleep(0.01)
    writers: list[asyncio.StreamWriter] = []
    try:
        yield Served(port=sock.getsockname()[1], server=server, writers=writers)
    finally:
        for writer in writers:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        server.should_exit = True
        await task
        sock.close()


async def test_a_half_head_is_cut_and_told_why() -> None:
    async with serving(ConnectionLimits(unauthenticated_s=0.3)) as served:
        assert (await served.answer(HALF)).startswith(b"HTTP/1.1 408 ")
        assert await served.answer(b"") == b""
        assert await served.answer(b"\r\n" * 10) == b""
        assert not served.server.server_state.connections


async def test_a_head_that_drips_is_cut_also_after_a_request_with_the_key() -> None:
    async with serving(ConnectionLimits(head_s=0.3)) as served:
        whole = b"GET /secret HTTP/1.1\r\nauthorization: Bearer %s\r\n\r\n" % KEY.encode()
        reader, writer = await served.connect(whole)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        started = time.monotonic()
        start_line = True
        end = asyncio.create_task(reader.read())
        while not end.done() and time.monotonic() - started < 5:
            writer.write(b"GET /long" if start_line else b"g")
            start_line = False
            await asyncio.sleep(0.02)
        assert time.monotonic() - started < 3
        with contextlib.suppress(ConnectionResetError):
            await end


@pytest.mark.parametrize(
    "data",
    [
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nx: " + b"a" * 200_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"a" * 200_000 + b": x\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"a:\r\n" * 10_000 + b"\r\n",
        b"\r\n" * 100_000,
    ],
    ids=["url", "value", "name", "many", "blank"],
)
async def test_a_long_head_is_refused(data: bytes) -> None:
    async with serving(ConnectionLimits()) as served:
        answer = await served.answer(data)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize("length", [31_000, 33_000, 40_000, 47_000, 50_000, 60_000])
async def test_a_head_of_about_the_limit_is_answered(length: int) -> None:
    async with serving(ConnectionLimits()) as served:
        data = b"GET /livez HTTP/1.1\r\nhost: x\r\nx: " + b"a" * length
        answer = await served.answer(data + b"\r\nconnection: close\r\n\r\n")
        assert answer.startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 431 "))


@pytest.mark.parametrize(
    "tail",
    [b"1;" + b"x" * 200_000, b"1\r\nx\r\n0\r\nt: " + b"x" * 200_000, b"0\r\n" + b"t:\r\n" * 9_000],
    ids=["extension", "trailer", "trailers"],
)
async def test_what_surrounds_chunks_is_limited_too(tail: bytes) -> None:
    async with serving(ConnectionLimits()) as served:
        head = b"POST /echo HTTP/1.1\r\nauthorization: Bearer %s\r\n" % KEY.encode()
        head += b"content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
        before = time.monotonic()
        answer = await served.answer(head + tail)
        assert b" 200 " not in answer
        assert time.monotonic() - before < 5


async def test_requests_sent_ahead_are_few() -> None:
    async with serving(ConnectionLimits()) as served:
        answer = await served.answer(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n" * 1_000)
        assert answer.count(b"HTTP/1.1") <= 10


async def test_an_unfinished_body_without_a_key_is_refused_at_once_and_then_cut() -> None:
    async with serving(ConnectionLimits(refused_s=0.3)) as served:
        begun = b"content-length: 15000000\r\n\r\n" + b"[" * 100_000
        started = time.monotonic()
        reader, _ = await served.connect(HALF + begun)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 401 ")
        assert time.monotonic() - started < 1
        await asyncio.wait_for(reader.read(), 5)


async def test_an_unfinished_body_with_the_key_is_a_408() -> None:
    async with serving(ConnectionLimits(refused_s=0.3), body_within_s=0.3) as served:
        head = HALF + b"content-type: application/json\r\n"
        head += b"authorization: Bearer %s\r\ncontent-length: 9\r\n\r\n[" % KEY.encode()
        assert (await served.answer(head)).startswith(b"HTTP/1.1 408 ")


async def test_a_large_nested_body_without_a_key_is_answered_while_others_are_served() -> None:
    body = b"[" + b"[]," * 5_300_000 + b"[]]"
    async with serving(ConnectionLimits()) as served, httpx.AsyncClient() as http:
        lags: list[float] = []

        async def probe() -> None:
            while True:
                before = time.monotonic()
                await asyncio.sleep(0.005)
                lags.append(time.monotonic() - before)

        watcher = asyncio.create_task(probe())
        started = time.monotonic()
        answer = await http.post(f"{served.url}/echo", content=body, headers=JSON, timeout=20)
        elapsed = time.monotonic() - started
        watcher.cancel()
    assert answer.status_code == 401
    assert elapsed < 1.5 and max(lags) < 0.5


async def test_half_requests_without_end_keep_nobody_out() -> None:
    limits = ConnectionLimits(max_unauthenticated=100, soft_max_unauthenticated=20, new_s=0.2)
    async with serving(limits) as served, httpx.AsyncClient(headers=RIGHT) as http:
        for _ in range(15):
            await asyncio.gather(*(served.connect(HALF) for _ in range(100)))
            assert (await http.get(f"{served.url}/secret")).status_code == 200
            assert len(served.server.server_state.connections) <= 103
        async with httpx.AsyncClient(headers=RIGHT) as newcomer:
            assert (await newcomer.get(f"{served.url}/secret")).status_code == 200


async def test_idle_connections_are_limited_and_the_oldest_goes() -> None:
    async with serving(ConnectionLimits(max_idle=3)) as served:
        whole = b"GET /secret HTTP/1.1\r\nauthorization: Bearer %s\r\n\r\n" % KEY.encode()
        readers = []
        for _ in range(5):
            reader, _ = await served.connect(whole)
            await reader.readuntil(b"}")
            readers.append(reader)
        for reader in readers[:2]:
            with contextlib.suppress(ConnectionResetError):
                assert await asyncio.wait_for(reader.read(), 5) == b""
        assert len(served.server.server_state.connections) == 3


async def test_a_reply_that_nobody_reads_is_dropped() -> None:
    async with serving(ConnectionLimits(unread_s=0.2)) as served:
        head = b"GET /large HTTP/1.1\r\nauthorization: Bearer %s\r\n\r\n" % KEY.encode()
        await served.connect(head)
        until = time.monotonic() + 10
        await asyncio.sleep(0.3)
        while served.server.server_state.connections:
            assert time.monotonic() < until
            await asyncio.sleep(0.05)


async def test_two_hundred_callers_at_once_are_all_served() -> None:
    limits = ConnectionLimits(soft_max_unauthenticated=20)
    async with serving(limits) as served:

        async def one() -> int:
            async with httpx.AsyncClient(headers=RIGHT, timeout=30) as http:
                return (await http.get(f"{served.url}/secret")).status_code

        assert set(await asyncio.gather(*(one() for _ in range(200)))) == {200}

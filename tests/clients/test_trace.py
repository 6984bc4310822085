"""The turns of one episode share a W3C trace, and so do the services' log lines."""

import asyncio
import json
import logging
import re
from typing import Any

import httpx
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, use_span

from services.common.logging import JsonFormatter
from services.rollout.wire.schemas import GenerateRequest, Sampling

TRACEPARENT = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-01")


def request(request_id: str) -> GenerateRequest:
    sampling = Sampling(max_tokens=2, ignore_eos=True)
    return GenerateRequest(request_id=request_id, token_ids=[1, 2], sampling=sampling)


class Recorder(httpx.AsyncBaseTransport):
    """Keeps the traceparent of each call, and beside it that of its reply."""

    def __init__(self, inner: httpx.AsyncBaseTransport) -> None:
        self._inner = inner
        self.sent: list[str] = []
        self.returned: list[tuple[str, str | None]] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.sent.append(request.headers["traceparent"])
        response = await self._inner.handle_async_request(request)
        self.returned.append((request.headers["traceparent"], response.headers.get("traceparent")))
        return response


async def test_each_task_has_one_trace_over_all_its_calls_and_retries(
    make_service: Any, network: Any, make_client: Any
) -> None:
    recorder = Recorder(network)
    lost = 0

    def lose_the_first_reply(*_: Any) -> None:
        nonlocal lost
        lost += 1
        if lost == 1:
            raise httpx.ReadError("connection reset")

    network.after = lose_the_first_reply
    async with make_client(network.add("a", make_service()), transport=recorder) as client:

        async def episode(name: str) -> None:
            for turn in range(3):
                await client.generate(request(f"{name}-{turn}"))

        await asyncio.gather(episode("a"), episode("b"))
    assert all(TRACEPARENT.fullmatch(sent) for sent in recorder.sent)
    assert sorted(recorder.sent.count(trace) for trace in set(recorder.sent)) == [3, 4]
    assert len(recorder.returned) == 6
    assert all(sent == returned for sent, returned in recorder.returned)


async def test_inside_a_span_of_the_caller_calls_belong_to_that_span(
    make_service: Any, network: Any, make_client: Any
) -> None:
    recorder = Recorder(network)
    span = SpanContext(0xAB, 0xCD, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))
    async with make_client(network.add("a", make_service()), transport=recorder) as client:
        with use_span(NonRecordingSpan(span)):
            await client.generate(request("inside"))
        await client.generate(request("outside"))
    inside, outside = recorder.sent
    assert inside == f"00-{0xAB:032x}-{0xCD:016x}-01"
    assert outside.split("-")[1] != inside.split("-")[1]


async def test_log_lines_of_a_request_carry_its_trace(
    make_service: Any, network: Any, make_client: Any
) -> None:
    lines: list[dict[str, Any]] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(json.loads(JsonFormatter().format(record)))

    logger = logging.getLogger("services.common.middleware")
    keep = Keep()
    logger.addHandler(keep)
    level = logger.level
    logger.setLevel(logging.INFO)
    recorder = Recorder(network)
    try:
        async with make_client(network.add("a", make_service()), transport=recorder) as client:
            await client.generate(request("r"))
    finally:
        logger.removeHandler(keep)
        logger.setLevel(level)
    assert [line["trace_id"] for line in lines] == [recorder.sent[0].split("-")[1]]

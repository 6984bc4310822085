"""What every part shares: requests, clients, servers in child processes, and the report."""

import asyncio
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

from services.rollout.engines.protocol import EngineInfo, JobResult
from services.rollout.wire.schemas import GenerateRequest, Sampling

NUM_TOKENS = 256
CONCURRENCY = 64
KEY = "a-key-for-the-benchmark"
KEYS = {"OPENRLHF_ALP_ROLLOUT_API_KEY": KEY, "OPENRLHF_ALP_ROLLOUT_ADMIN_KEY": KEY}
SCRIPT = Path(__file__).parents[1] / "rollout_service.py"
INFO = EngineInfo(
    engine="instant",
    engine_version="0",
    architecture="none",
    dtype="bfloat16",
    vocab_size=49152,
    max_model_len=8192,
    eos_token_ids=(2,),
)


def report(name: str, value: float, target: float, *, at_least: bool) -> None:
    """Print one figure against its target."""
    reached = value >= target if at_least else value <= target
    sign = ">=" if at_least else "<="
    print(f"{name:<58} {value:10.3f}  target {sign} {target:g}  {'ok' if reached else 'MISSED'}")


def example_request(request_id: str = "r-1") -> GenerateRequest:
    random.seed(0)
    prompt = [random.randrange(49152) for _ in range(128)]
    return GenerateRequest(
        request_id=request_id, token_ids=prompt, sampling=Sampling(max_tokens=NUM_TOKENS)
    )


def example_result() -> JobResult:
    """Tokens and float32 log-probs as an engine returns them."""
    random.seed(1)
    float32 = memoryview(bytearray(4 * NUM_TOKENS)).cast("f")
    for index in range(NUM_TOKENS):
        float32[index] = -random.expovariate(1.0)
    return JobResult(
        token_ids=[random.randrange(49152) for _ in range(NUM_TOKENS)],
        logprobs=float32.tolist(),
        finish_reason="length",
        stop_reason=None,
    )


def connect(url: str, headers: dict[str, str]) -> httpx.AsyncClient:
    """A client that keeps as many connections open as our own does: httpx's default is 20."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
    return httpx.AsyncClient(base_url=url, headers=headers, timeout=600.0, limits=limits)


async def bounded(calls: Sequence[Callable[[], Any]], concurrency: int = CONCURRENCY) -> None:
    """Await every call, `concurrency` at a time."""
    pending = iter(calls)

    async def worker() -> None:
        for call in pending:
            await call()

    await asyncio.gather(*(worker() for _ in range(concurrency)))


def child_command(part: str, *arguments: str) -> list[str]:
    """A command line that runs one part of the benchmark in a process of its own."""
    return [sys.executable, str(SCRIPT), part, *arguments]

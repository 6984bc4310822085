"""Tokens per second of real vLLM: in process, behind our service, behind its own server.

All three are up at the same time and take turns, so that what else the machine does falls on all.
"""

import asyncio
import contextlib
import itertools
import json
import random
import statistics
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
from common.serving import environment
from rollout.common import KEY, bounded, child_command, connect, report
from rollout.servers import our_service, vllm_serve

from services.common.wire import JSON_TYPE, MSGPACK_TYPE
from services.rollout.engines.protocol import Job
from services.rollout.wire.schemas import Sampling

_NUM_TOKENS = 64
_ROUNDS = 3

Measure = Callable[[], float]
"""One round; returns tokens per second."""


def bench_engine(model: Path, num_requests: int) -> None:
    with contextlib.ExitStack() as stack:
        contenders: dict[str, Measure] = {
            "in process": stack.enter_context(_in_process(model, num_requests)),
            "service": _over_http(stack.enter_context(our_service(model)), _ours(), num_requests),
            "vllm serve": _over_http(
                stack.enter_context(vllm_serve(model)), _vllms(model), num_requests
            ),
        }
        for measure in contenders.values():
            measure()  # warm-up
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(_ROUNDS):
            for name, measure in contenders.items():
                rates[name].append(measure())
                print(f"{name:<12} {rates[name][-1]:8.1f} tokens/s", flush=True)
    middle = {name: statistics.median(values) for name, values in rates.items()}
    service = middle["service"]
    report("service / in-process engine", service / middle["in process"], 0.95, at_least=True)
    report("service / vllm serve", service / middle["vllm serve"], 1.0, at_least=True)


@contextlib.contextmanager
def _in_process(model: Path, num_requests: int) -> Iterator[Measure]:
    """vLLM's async engine in a process of its own; each line sent to it is one round."""
    arguments = ("--model", str(model), "--requests", str(num_requests))
    process = subprocess.Popen(
        child_command("in-process", *arguments),
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def measure() -> float:
        stdin.write("\n")
        stdin.flush()
        while not (line := stdout.readline()).startswith("rate "):
            if not line:
                raise SystemExit("The engine did not start; see its log above.")
        return float(line.split()[1])

    try:
        yield measure
    finally:
        stdin.close()
        process.wait()


async def serve_in_process(model: Path, num_requests: int) -> None:
    """The other end of `_in_process`: an engine without any server."""
    from services.rollout.engines.vllm_engine import VllmEngine
    from services.rollout.settings import RolloutSettings

    engine = VllmEngine.start(RolloutSettings(model=model), ())
    sampling = Sampling(max_tokens=_NUM_TOKENS, ignore_eos=True)
    loop = asyncio.get_running_loop()
    try:
        for round_number in itertools.count():
            if not await asyncio.to_thread(_input_line):
                return
            jobs = [
                Job(
                    job_id=f"{round_number}-{index}",
                    token_ids=prompt,
                    sampling=sampling,
                    index=0,
                    cache_salt="0",
                )
                for index, prompt in enumerate(_prompts(num_requests, round_number))
            ]
            started_s = loop.time()
            await bounded([lambda job=job: engine.sample(job) for job in jobs])
            print("rate", num_requests * _NUM_TOKENS / (loop.time() - started_s), flush=True)
    finally:
        await engine.close()


def _input_line() -> bool:
    """Wait for a line; False at the end of the input."""
    try:
        input()
    except EOFError:
        return False
    return True


def _prompts(num_requests: int, round_number: int) -> list[list[int]]:
    """Random ids, other ones in each round: no prefix is cached, and every contender has the
    same."""
    draw = random.Random(round_number)
    return [[draw.randrange(100, 40000) for _ in range(32)] for _ in range(num_requests)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Api:
    """How one server is asked for the tokens that follow a prompt."""

    path: str
    media_type: str
    body: Callable[[list[int], str], bytes]
    """Of the request for a prompt under a request id."""


def _ours() -> _Api:
    def body(prompt: list[int], request_id: str) -> bytes:
        sampling = {"max_tokens": _NUM_TOKENS, "ignore_eos": True}
        fields = {"request_id": request_id, "token_ids": prompt, "sampling": sampling}
        return msgpack.packb(fields)

    return _Api(path="/v1/generate", media_type=MSGPACK_TYPE, body=body)


def _vllms(model: Path) -> _Api:
    def body(prompt: list[int], request_id: str) -> bytes:
        fields: dict[str, Any] = {"model": str(model), "prompt": prompt, "return_token_ids": True}
        fields |= {"max_tokens": _NUM_TOKENS, "ignore_eos": True, "logprobs": 0, "temperature": 1.0}
        return json.dumps(fields).encode()

    return _Api(path="/v1/completions", media_type=JSON_TYPE, body=body)


def _over_http(url: str, api: _Api, num_requests: int) -> Measure:
    headers = {
        "authorization": f"Bearer {KEY}",
        "content-type": api.media_type,
        "accept": api.media_type,
    }
    rounds = itertools.count()

    async def play(round_number: int) -> float:
        loop = asyncio.get_running_loop()
        async with connect(url, headers) as http:

            async def one(index: int, prompt: list[int]) -> None:
                content = api.body(prompt, f"{round_number}-{index}")
                (await http.post(api.path, content=content)).raise_for_status()

            prompts = enumerate(_prompts(num_requests, round_number))
            started_s = loop.time()
            await bounded([lambda i=i, p=p: one(i, p) for i, p in prompts])
            return num_requests * _NUM_TOKENS / (loop.time() - started_s)

    return lambda: asyncio.run(play(next(rounds)))

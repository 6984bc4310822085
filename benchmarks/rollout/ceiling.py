"""The service's own cost: an engine that answers at once, so that nothing else is measured."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from common.serving import serving
from rollout.common import (
    INFO,
    KEY,
    NUM_TOKENS,
    SCRIPT,
    bounded,
    connect,
    example_request,
    example_result,
    report,
)

from openrlhf_alp.clients.rollout import RolloutClient
from services.common.wire import JSON_TYPE, MSGPACK_TYPE, decode, encode
from services.rollout.engines.protocol import Job, JobResult
from services.rollout.generator import Generator, check_request
from services.rollout.ledger import Ledger, LedgerLimits, body_hash
from services.rollout.weights.versions import Version, VersionLog
from services.rollout.wire.schemas import GenerateRequest, GenerateResponse, Sample, Span, Timings

_ROUNDS = 5
_REQUESTS_PER_ROUND = 1000
_OVERLOAD_ADMITTED = 64
_OVERLOAD_FACTOR = 10
_OVERLOAD_REQUESTS = 4000
_PACE_S = 0.02
_KEEP_BYTES = 16 << 20


def microseconds(call: Callable[[], object], repeats: int = 500) -> float:
    """Smallest mean of five rounds, in microseconds."""
    rounds = []
    for _ in range(5):
        started_s = time.perf_counter()
        for _ in range(repeats):
            call()
        rounds.append((time.perf_counter() - started_s) / repeats * 1e6)
    return min(rounds)


def bench_wire() -> None:
    request, result = example_request(), example_result()
    span = Span(version=1, digest="0" * 64, start=0, end=NUM_TOKENS)
    sample = Sample(
        token_ids=result.token_ids,
        logprobs=result.logprobs,
        finish_reason="length",
        stop_reason=None,
        spans=[span],
    )
    response = GenerateResponse(
        request_id="r-1",
        samples=[sample],
        contract_hash="0" * 64,
        version=1,
        timings=Timings(total_s=1.0),
    )
    size = {form: len(encode(response, form)) for form in (JSON_TYPE, MSGPACK_TYPE)}
    report("msgpack bytes / JSON bytes", size[MSGPACK_TYPE] / size[JSON_TYPE], 0.35, at_least=False)
    print("\nmicroseconds per request")
    for form in (JSON_TYPE, MSGPACK_TYPE):
        body = encode(request, form)
        content = decode(body, form)
        stages = {
            "decode request": lambda body=body, form=form: decode(body, form),
            "validate request": lambda c=content: GenerateRequest.model_validate(c),
            "encode reply": lambda form=form: encode(response, form),
        }
        for stage, call in stages.items():
            print(f"  {form:<22} {stage:<20} {microseconds(call):8.1f}")
    checked_us = microseconds(lambda: check_request(request, INFO))
    hashed_us = microseconds(lambda: body_hash(request))
    print(f"  {'either':<22} {'check request':<20} {checked_us:8.1f}")
    print(f"  {'either':<22} {'ledger identity':<20} {hashed_us:8.1f}")


class PacedEngine:
    """Answers every job with the same tokens after `pace_s`; 0: at once."""

    info = INFO

    def __init__(self, pace_s: float = 0.0) -> None:
        self._result = example_result()
        self._pace_s = pace_s

    async def sample(self, job: Job, on_tokens: object = None) -> JobResult:
        if self._pace_s:
            await asyncio.sleep(self._pace_s)
        return self._result


def serve_paced(url_file: Path, pace_s: float, max_pending: int) -> None:
    """Entry of the child process: the real app around the paced engine."""
    from services.common.logging import configure_logging
    from services.common.serve import bind_socket, run, serve
    from services.rollout.api.app import create_app
    from services.rollout.gpu_transfer.link import WeightTransfer
    from services.rollout.service import RolloutService
    from services.rollout.settings import RolloutSettings
    from services.rollout.weights.serving import SleepSwitch
    from services.rollout.weights.staging import ServedModel, Staging
    from services.rollout.weights.store import WeightStore
    from services.rollout.weights.uploads import Uploads

    configure_logging("WARNING")
    engine: Any = PacedEngine(pace_s)
    versions = VersionLog(Version(number=0, digest="0" * 64))
    model = ServedModel(tensors={}, dtype_code="BF16", head_is_tied=False)
    staging = Staging(model, url_file.parent)
    weights = WeightStore(engine, versions, model, staging)
    uploads = Uploads(staging.uploads_dir, 0)
    contract: Any = None
    service = RolloutService(
        engine=engine,
        versions=versions,
        weights=weights,
        sleep_switch=SleepSwitch(engine, weights.state, weights.serving_plan),
        generator=Generator(engine, versions, "0" * 64),
        ledger=Ledger(ledger_limits(max_pending)),
        uploads=uploads,
        transfer=WeightTransfer(engine, uploads),
        static_contract=contract,
    )
    app = create_app(service, RolloutSettings(model=Path("none")), api_key=KEY, admin_key=KEY)
    run(serve(app, bind_socket("127.0.0.1", 0), url_file=url_file))


def serve_bare(url_file: Path) -> None:
    """Entry of the child process: uvicorn with an app that reads the body and answers 2 kB."""
    from services.common.serve import bind_socket, run, serve

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for phase in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{phase}.complete"})
            return
        while (await receive()).get("more_body"):
            pass
        headers = [(b"content-type", MSGPACK_TYPE.encode()), (b"content-length", b"2300")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": bytes(2300)})

    run(serve(app, bind_socket("127.0.0.1", 0), url_file=url_file))


def ledger_limits(max_pending_samples: int = 1 << 20) -> LedgerLimits:
    return LedgerLimits(
        max_pending_samples=max_pending_samples,
        keep_s=900.0,
        keep_bytes=_KEEP_BYTES,
        detach_grace_s=30.0,
    )


@contextlib.contextmanager
def served(part: str, *arguments: str) -> Iterator[tuple[str, psutil.Process]]:
    """A child process that serves; its URL and the process."""
    with serving(str(SCRIPT), part, *arguments) as (url, pid):
        yield url, psutil.Process(pid)


def cpu_per_request_s(url: str, process: psutil.Process, form: str) -> float:
    """CPU seconds of the server per request: the best round, as neighbours only make it worse."""
    headers = {"authorization": f"Bearer {KEY}", "content-type": form, "accept": form}

    async def measure() -> float:
        rounds = []
        async with connect(url, headers) as http:

            async def post(body: bytes) -> None:
                (await http.post("/v1/generate", content=body)).raise_for_status()

            for label in range(_ROUNDS + 1):
                ids = (f"{form[-4:]}-{label}-{i}" for i in range(_REQUESTS_PER_ROUND))
                bodies = [encode(example_request(name), form) for name in ids]
                before_s = sum(process.cpu_times()[:2])
                await bounded([lambda body=body: post(body) for body in bodies])
                rounds.append((sum(process.cpu_times()[:2]) - before_s) / _REQUESTS_PER_ROUND)
        return min(rounds[1:])

    return asyncio.run(measure())


def bench_ceiling() -> None:
    """Requests per CPU second, and what uvicorn and the kernel take of each."""
    with served("serve-bare") as (url, process):
        bare_s = cpu_per_request_s(url, process, MSGPACK_TYPE)
    with served("serve-paced") as (url, process):
        for form, target in ((MSGPACK_TYPE, 1000.0), (JSON_TYPE, 400.0)):
            cpu_s = cpu_per_request_s(url, process, form)
            report(f"requests per CPU second, {form}", 1.0 / cpu_s, target, at_least=True)
            print(f"  CPU per request {cpu_s * 1e6:.0f} us, of it uvicorn alone {bare_s * 1e6:.0f}")
    asyncio.run(bench_ledger())


def bench_overload() -> None:
    """Ten times more requests at once than are admitted: all come back, and memory stays."""
    logging.getLogger("openrlhf_alp").setLevel(logging.ERROR)  # a warning for each 429
    pace = ("--pace-s", str(_PACE_S), "--max-pending", str(_OVERLOAD_ADMITTED))
    with served("serve-paced", *pace) as (url, process):
        asyncio.run(overload(url, process))


async def overload(url: str, process: psutil.Process) -> None:
    num_replies = 0
    kept = _KEEP_BYTES // (80 * NUM_TOKENS)  # from here on the ledger is full
    full_bytes = largest_bytes = 0

    async with RolloutClient([url], api_key=KEY) as client:

        async def one(index: int) -> None:
            nonlocal num_replies, full_bytes, largest_bytes
            await client.generate(example_request(f"o-{index}"))
            num_replies += 1
            if num_replies == kept:
                full_bytes = process.memory_info().rss
            if num_replies % 100 == 0:
                largest_bytes = max(largest_bytes, process.memory_info().rss)

        calls = [lambda i=i: one(i) for i in range(_OVERLOAD_REQUESTS)]
        await bounded(calls, concurrency=_OVERLOAD_FACTOR * _OVERLOAD_ADMITTED)
    report("replies / requests at 10x overload", num_replies / len(calls), 1.0, at_least=True)
    growth = largest_bytes / full_bytes
    print(f"  memory of the service: {full_bytes / 2**20:.0f} MiB with a full ledger")
    report("largest memory / memory with a full ledger", growth, 1.1, at_least=False)


async def bench_ledger(num_requests: int = 2000) -> None:
    """CPU that the ledger adds to a request, over the CPU of a whole request without it."""
    engine: Any = PacedEngine()
    generator = Generator(engine, VersionLog(Version(number=0, digest="0" * 64)), "0" * 64)
    requests = [example_request(f"r-{i}") for i in range(num_requests)]

    async def bare() -> None:
        for request in requests:
            await generator.run(request)

    async def with_ledger() -> None:
        ledger = Ledger(ledger_limits())
        for request in requests:
            ledger.submit(request, lambda request=request: generator.run(request))
            await ledger.attach(request.request_id)

    costs = {}
    for name, run in (("bare", bare), ("ledger", with_ledger)):
        rounds = []
        for _ in range(3):
            started_s = time.process_time()
            await run()
            rounds.append((time.process_time() - started_s) / num_requests * 1e6)
        costs[name] = min(rounds)
    added = costs["ledger"] - costs["bare"]
    print(f"ledger and admission add {added:.0f} us of CPU to a request")
    # At 200 tokens per second and core of a real engine a request of 256 tokens takes 1.28 s.
    report("ledger share of a 256-token request at 1 s", added / 1e6, 0.02, at_least=False)

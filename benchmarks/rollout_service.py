"""What the rollout service costs. Prints ratios and says whether they reach the target.

    python benchmarks/rollout_service.py wire
        bytes of a reply in msgpack over JSON, and CPU by stage of one request
    python benchmarks/rollout_service.py ceiling
        requests per second of one core with an engine that answers at once; cost of the ledger
    python benchmarks/rollout_service.py engine --model DIR
        tokens per second over HTTP against vLLM's in-process async engine and its own server
    python benchmarks/rollout_service.py weights --model DIR
        a weight push against a plain copy of the same bytes plus vLLM's reload

`engine` and `weights` start real services and want a quiet machine.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import msgpack
import psutil

from services.common.wire import JSON_TYPE, MSGPACK_TYPE, decode, encode
from services.rollout.engine import EngineInfo, Job, JobResult
from services.rollout.generator import Generator, check_request
from services.rollout.ledger import Ledger, LedgerLimits, body_hash
from services.rollout.schemas import (
    GenerateRequest,
    GenerateResponse,
    Sample,
    Sampling,
    Span,
    Timings,
)
from services.rollout.versions import Version, VersionLog

NUM_TOKENS = 256
CONCURRENCY = 64
KEY = "a-key-for-the-benchmark"
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


def microseconds(call: Callable[[], object], repeats: int = 500) -> float:
    """Smallest mean of five rounds, in microseconds."""
    rounds = []
    for _ in range(5):
        started_s = time.perf_counter()
        for _ in range(repeats):
            call()
        rounds.append((time.perf_counter() - started_s) / repeats * 1e6)
    return min(rounds)


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


class InstantEngine:
    """Answers every job at once with the same tokens."""

    info = INFO

    def __init__(self) -> None:
        self._result = example_result()

    async def sample(self, job: Job, on_tokens: object = None) -> JobResult:
        return self._result


def serve_instant(url_file: str) -> None:
    """Entry of the child process: the real app around the instant engine."""
    from services.common.logging import configure_logging
    from services.common.serve import bind_socket, run, serve
    from services.rollout.app import create_app
    from services.rollout.service import RolloutService
    from services.rollout.settings import RolloutSettings
    from services.rollout.staging import ServedModel, Staging
    from services.rollout.uploads import Uploads
    from services.rollout.weights import WeightStore

    configure_logging("WARNING")
    engine: Any = InstantEngine()
    versions = VersionLog(Version(number=0, digest="0" * 64))
    model = ServedModel(tensors={}, dtype_code="BF16", head_is_tied=False)
    staging = Staging(model, Path(url_file).parent)
    contract: Any = None
    service = RolloutService(
        engine=engine,
        versions=versions,
        weights=WeightStore(engine, versions, model, staging),
        generator=Generator(engine, versions, "0" * 64),
        ledger=Ledger(ledger_limits()),
        uploads=Uploads(staging.uploads_dir, 0),
        static_contract=contract,
    )
    app = create_app(RolloutSettings(model=Path("none")), service, api_key=KEY, admin_key=KEY)
    run(serve(app, bind_socket("127.0.0.1", 0), url_file=Path(url_file)))


def ledger_limits() -> LedgerLimits:
    return LedgerLimits(
        max_pending_samples=1 << 20, keep_s=900.0, keep_bytes=64 << 20, detach_grace_s=30.0
    )


def connect(url: str, headers: dict[str, str]) -> httpx.AsyncClient:
    """A client that keeps as many connections open as our own does: httpx's default is 20."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
    return httpx.AsyncClient(base_url=url, headers=headers, timeout=600.0, limits=limits)


async def send_all(url: str, bodies: Sequence[bytes], headers: dict[str, str]) -> None:
    """POST every body to /v1/generate, CONCURRENCY at a time."""
    pending = iter(bodies)
    async with connect(url, headers) as http:

        async def worker() -> None:
            for body in pending:
                (await http.post("/v1/generate", content=body)).raise_for_status()

        await asyncio.gather(*(worker() for _ in range(CONCURRENCY)))


def wait_for_url(process: subprocess.Popen[bytes], url_file: Path) -> str:
    while not url_file.exists():
        if process.poll() is not None:
            raise SystemExit("The service did not start; see its log above.")
        time.sleep(0.05)
    return url_file.read_text().strip()


def bench_ceiling(num_requests: int = 3000) -> None:
    folder = Path(tempfile.mkdtemp())
    child = subprocess.Popen(
        [sys.executable, __file__, "serve-instant", "--url-file", str(folder / "url")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    try:
        url = wait_for_url(child, folder / "url")
        process = psutil.Process(child.pid)
        for form, target in ((MSGPACK_TYPE, 1000.0), (JSON_TYPE, 400.0)):
            headers = {"authorization": f"Bearer {KEY}", "content-type": form, "accept": form}
            requests = [example_request(f"{form[-4:]}-{i}") for i in range(num_requests)]
            bodies = [encode(request, form) for request in requests]
            asyncio.run(send_all(url, bodies[:200], headers))
            before = sum(process.cpu_times()[:2])
            asyncio.run(send_all(url, bodies[200:], headers))
            cpu_s = sum(process.cpu_times()[:2]) - before
            rate = (num_requests - 200) / cpu_s
            report(f"requests per CPU second, {form}", rate, target, at_least=True)
            print(f"  CPU per request: {cpu_s / (num_requests - 200) * 1e6:.0f} us")
    finally:
        child.terminate()
        child.wait()
        shutil.rmtree(folder)
    asyncio.run(bench_ledger())


async def bench_ledger(num_requests: int = 2000) -> None:
    """CPU that the ledger adds to a request, over the CPU of a whole request without it."""
    engine: Any = InstantEngine()
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


def bench_engine(model: Path, num_requests: int) -> None:
    rates = {
        "in process": run_child("in-process", model, num_requests),
        "service": rate_over_http(model, num_requests, ours=True),
        "vllm serve": rate_over_http(model, num_requests, ours=False),
    }
    for name, rate in rates.items():
        print(f"{name:<12} {rate:8.1f} tokens/s")
    service = rates["service"]
    report("service / in-process engine", service / rates["in process"], 0.95, at_least=True)
    report("service / vllm serve", service / rates["vllm serve"], 1.0, at_least=True)


def run_child(command: str, model: Path, num_requests: int) -> float:
    """Run a part of this file in a fresh process and return the number it prints last."""
    output = subprocess.run(
        [sys.executable, __file__, command, "--model", str(model), "--requests", str(num_requests)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return float(output.stdout.strip().splitlines()[-1])


def engine_prompts(num_requests: int) -> list[list[int]]:
    random.seed(2)
    return [[random.randrange(100, 40000) for _ in range(32)] for _ in range(num_requests)]


async def in_process(model: Path, num_requests: int) -> float:
    """Tokens per second of vLLM's async engine without any server."""
    from services.rollout.settings import RolloutSettings
    from services.rollout.vllm_engine import VllmEngine

    engine = VllmEngine.start(RolloutSettings(model=model), ())
    sampling = Sampling(max_tokens=64, ignore_eos=True)

    async def run(prompts: list[list[int]], label: str) -> None:
        jobs = [
            Job(job_id=f"{label}{i}", token_ids=p, sampling=sampling, index=0, cache_salt="0")
            for i, p in enumerate(prompts)
        ]
        await bounded([lambda job=job: engine.sample(job) for job in jobs])

    try:
        prompts = engine_prompts(num_requests)
        await run(prompts[:CONCURRENCY], "warm")
        started_s = time.perf_counter()
        await run(prompts, "run")
        return num_requests * 64 / (time.perf_counter() - started_s)
    finally:
        await engine.close()


async def bounded(calls: Sequence[Callable[[], Any]]) -> None:
    pending = iter(calls)

    async def worker() -> None:
        for call in pending:
            await call()

    await asyncio.gather(*(worker() for _ in range(CONCURRENCY)))


def rate_over_http(model: Path, num_requests: int, *, ours: bool) -> float:
    """Tokens per second of our service, or of vLLM's own server asked for the same log-probs."""
    folder = Path(tempfile.mkdtemp())
    port = free_port()
    if ours:
        command = [sys.executable, "-m", "services.rollout", "--model", str(model)]
        command += ["--port", str(port), "--log-level", "WARNING"]
    else:
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(model), "--port", str(port), "--max-num-seqs", "64"]
        command += ["--logprobs-mode", "processed_logprobs", "--api-key", KEY]
        command += ["--generation-config", "vllm", "--kv-cache-memory-bytes", str(1 << 30)]
    keys = {"OPENRLHF_ALP_ROLLOUT_API_KEY": KEY, "OPENRLHF_ALP_ROLLOUT_ADMIN_KEY": KEY}
    process = subprocess.Popen(command, env={**os.environ, **keys}, stdout=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_healthy(process, url + ("/readyz" if ours else "/health"))
        return asyncio.run(drive(url, model, num_requests, ours=ours))
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    from services.common.serve import bind_socket

    with bind_socket("127.0.0.1", 0) as sock:
        port: int = sock.getsockname()[1]
        return port


def wait_until_healthy(process: subprocess.Popen[bytes], url: str) -> None:
    while process.poll() is None:
        try:
            if httpx.get(url, timeout=5.0).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise SystemExit(f"The server behind {url} did not start; see its log above.")


async def drive(url: str, model: Path, num_requests: int, *, ours: bool) -> float:
    headers = {"authorization": f"Bearer {KEY}", "content-type": JSON_TYPE}
    if ours:
        headers |= {"content-type": MSGPACK_TYPE, "accept": MSGPACK_TYPE}
    prompts = engine_prompts(num_requests)
    async with connect(url, headers) as http:

        async def one(prompt: list[int], label: str) -> None:
            body: dict[str, Any]
            if ours:
                sampling = {"max_tokens": 64, "ignore_eos": True}
                body = {"request_id": label, "token_ids": prompt, "sampling": sampling}
                path, content = "/v1/generate", msgpack.packb(body)
            else:
                body = {"model": str(model), "prompt": prompt, "return_token_ids": True}
                body |= {"max_tokens": 64, "ignore_eos": True, "logprobs": 0, "temperature": 1.0}
                path, content = "/v1/completions", json.dumps(body).encode()
            (await http.post(path, content=content)).raise_for_status()

        await bounded([lambda i=i: one(prompts[i], f"warm{i}") for i in range(CONCURRENCY)])
        started_s = time.perf_counter()
        await bounded([lambda i=i: one(prompts[i], f"run{i}") for i in range(num_requests)])
        return num_requests * 64 / (time.perf_counter() - started_s)


def bench_weights(model: Path) -> None:
    """A full push, every tensor changed, against a plain copy and vLLM's reload."""
    from safetensors.torch import load_file

    from openrlhf_alp.clients.push import WeightPusher

    tensors: dict[str, Any] = {}
    for file in sorted(model.glob("*.safetensors")):
        tensors |= load_file(file)
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    copies = []
    for _ in range(3):
        started_s = time.perf_counter()
        for file in model.glob("*.safetensors"):
            shutil.copyfile(file, folder / file.name)
        copies.append(time.perf_counter() - started_s)
    port = free_port()
    command = [sys.executable, "-m", "services.rollout", "--model", str(model), "--port", str(port)]
    keys = {"OPENRLHF_ALP_ROLLOUT_API_KEY": KEY, "OPENRLHF_ALP_ROLLOUT_ADMIN_KEY": KEY}
    process = subprocess.Popen(
        [*command, "--log-level", "WARNING", "--weights-dir", str(folder)],
        env={**os.environ, **keys},
        stdout=subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_healthy(process, url + "/readyz")
        pusher = WeightPusher([url], api_key=KEY, admin_key=KEY)
        pushes = []
        for step in range(3):
            changed = {name: tensor * (1.0 + 0.01 * (step + 1)) for name, tensor in tensors.items()}
            started_s = time.perf_counter()
            result = pusher.push(changed.items())
            pushes.append((time.perf_counter() - started_s, result))
            print(result)
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)
    push_s, best = min(pushes, key=lambda push: push[0])
    base_s = min(copies) + best.load_s
    print(f"{best.num_bytes / 1e6:.0f} MB: copy {min(copies):.3f} s, reload {best.load_s:.3f} s")
    report("push / (copy + reload)", push_s / base_s, 3.0, at_least=False)
    report("stall / (copy + reload)", (best.pause_s + best.load_s) / base_s, 3.0, at_least=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "part", choices=["wire", "ceiling", "engine", "weights", "serve-instant", "in-process"]
    )
    parser.add_argument("--model", type=Path)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--url-file")
    args = parser.parse_args()
    if args.part in {"engine", "weights", "in-process"} and args.model is None:
        parser.error("--model DIR is needed")
    parts: dict[str, Callable[[], object]] = {
        "wire": bench_wire,
        "ceiling": bench_ceiling,
        "engine": lambda: bench_engine(args.model, args.requests),
        "weights": lambda: bench_weights(args.model),
        "serve-instant": lambda: serve_instant(args.url_file),
        "in-process": lambda: print(asyncio.run(in_process(args.model, args.requests))),
    }
    parts[args.part]()


if __name__ == "__main__":
    main()

"""Real vLLM: throughput against its own engine and server, and weight updates against a copy."""

import asyncio
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import msgpack
from rollout.common import (
    CONCURRENCY,
    KEY,
    KEYS,
    bounded,
    child_command,
    child_environment,
    connect,
    report,
)

from services.common.wire import JSON_TYPE, MSGPACK_TYPE
from services.rollout.engine import Job
from services.rollout.schemas import Sampling


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
        child_command(command, "--model", str(model), "--requests", str(num_requests)),
        env=child_environment(),
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


def rate_over_http(model: Path, num_requests: int, *, ours: bool) -> float:
    """Tokens per second of our service, or of vLLM's own server asked for the same log-probs."""
    port = free_port()
    if ours:
        command = [sys.executable, "-m", "services.rollout", "--model", str(model)]
        command += ["--port", str(port), "--log-level", "WARNING"]
    else:
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(model), "--port", str(port), "--max-num-seqs", "64"]
        command += ["--logprobs-mode", "processed_logprobs", "--api-key", KEY]
        command += ["--generation-config", "vllm", "--kv-cache-memory-bytes", str(1 << 30)]
    process = subprocess.Popen(command, env=child_environment(**KEYS), stdout=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_healthy(process, url + ("/readyz" if ours else "/health"))
        return asyncio.run(drive(url, model, num_requests, ours=ours))
    finally:
        process.terminate()
        process.wait()


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
    process = subprocess.Popen(
        [*command, "--log-level", "WARNING", "--weights-dir", str(folder)],
        env=child_environment(**KEYS),
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

"""Real servers in child processes that end with the benchmark."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
from common.serving import running, serving
from rollout.common import KEY, KEYS


@contextlib.contextmanager
def our_service(model: Path, *arguments: str) -> Iterator[str]:
    """Our service with vLLM; yields its URL."""
    command = ("-m", "services.rollout", "--model", str(model), "--port", "0")
    with serving(*command, "--log-level", "WARNING", *arguments, **KEYS) as (url, _):
        yield url


@contextlib.contextmanager
def vllm_serve(model: Path) -> Iterator[str]:
    """vLLM's own server with the engine settings of our service; yields its URL."""
    port = free_port()
    # Not the command `vllm`, which wants a distribution of that name; the CPU build has another.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--port", str(port), "--api-key", KEY, "--max-num-seqs", "64"]
    command += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"]
    command += ["--kv-cache-memory-bytes", str(1 << 30), "--enforce-eager"]
    command += ["--no-enable-chunked-prefill"]
    url = f"http://127.0.0.1:{port}"
    with running(command) as process:
        _wait_until_healthy(process, f"{url}/health")
        yield url


def free_port() -> int:
    from services.common.serve import bind_socket

    with bind_socket("127.0.0.1", 0) as sock:
        port: int = sock.getsockname()[1]
        return port


def _wait_until_healthy(process: subprocess.Popen[bytes], url: str) -> None:
    while process.poll() is None:
        try:
            if httpx.get(url, timeout=5.0).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise SystemExit(f"The server behind {url} did not start; see its log above.")

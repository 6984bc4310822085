"""Overload, and a server killed in mid-step: every episode arrives exactly once."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from openrlhf_alp.clients.fleet import Backoff
from openrlhf_alp.clients.rollout import RolloutClient
from services.rollout.wire.schemas import GenerateRequest, Sampling

KEY = "a-key-for-tests"


def request(index: int, max_tokens: int = 4) -> GenerateRequest:
    return GenerateRequest(
        request_id=f"q-{index}",
        token_ids=[1, 2, 3],
        sampling=Sampling(max_tokens=max_tokens, ignore_eos=True),
    )


async def test_ten_times_more_than_fits_is_held_back_and_none_is_lost(
    make_service: Any, network: Any, make_client: Any
) -> None:
    service = make_service(max_pending_samples=8)
    most_pending = 0

    def watch(*_: Any) -> None:
        nonlocal most_pending
        most_pending = max(most_pending, service.ledger.pending_samples)

    network.after = watch
    async with make_client(network.add("a", service), total_s=60.0) as client:
        replies = await asyncio.gather(*(client.generate(request(i)) for i in range(80)))
    assert sorted(reply.request_id for reply in replies) == sorted(f"q-{i}" for i in range(80))
    assert most_pending <= 8
    assert service.engine.num_jobs == 80
    assert len(network.calls) > 80, "some were told to come back"


@pytest.fixture
def two_servers(model_folder: Path, tmp_path: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two real service processes on a tiny model; their URLs are in url-0 and url-1."""
    keys = {"OPENRLHF_ALP_ROLLOUT_API_KEY": KEY, "OPENRLHF_ALP_ROLLOUT_ADMIN_KEY": KEY}
    flags = ["--model", str(model_folder), "--engine", "hf", "--port", "0"]
    command = [sys.executable, "-m", "services.rollout", *flags]
    processes = [
        subprocess.Popen(
            [*command, "--url-file", str(tmp_path / f"url-{index}")],
            env={**os.environ, **keys, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for index in range(2)
    ]
    try:
        for index in range(2):
            give_up_s = time.monotonic() + 90
            while not (tmp_path / f"url-{index}").exists():
                assert time.monotonic() < give_up_s, "a service did not start"
                time.sleep(0.05)
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.e2e
async def test_a_step_outlives_the_kill_of_one_of_two_servers(
    two_servers: list[subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    urls = [(tmp_path / f"url-{index}").read_text().strip() for index in range(2)]
    num_requests = 60
    async with RolloutClient(
        urls, api_key=KEY, admin_key=KEY, backoff=Backoff(first_s=0.01, largest_s=0.1)
    ) as client:
        running = [
            asyncio.create_task(client.generate(request(i, 60))) for i in range(num_requests)
        ]
        await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        two_servers[0].send_signal(signal.SIGKILL)
        killed_s = time.monotonic()
        unfinished = sum(not task.done() for task in running)
        async with asyncio.timeout(60.0):
            replies = await asyncio.gather(*running)
    assert unfinished > 0, "the kill came in the middle of the step"
    assert sorted(r.request_id for r in replies) == sorted(f"q-{i}" for i in range(num_requests))
    assert all(len(reply.samples[0].token_ids) == 60 for reply in replies)
    print(f"{unfinished} requests finished {time.monotonic() - killed_s:.2f} s after the kill")

"""A thousand tool-integrated episodes over services whose network breaks all the time.

Two rollout services and a tool service, all real, in this process; between them and the learner
stands a plan of faults, one of the engines is killed in mid-token, and a launcher of the sandbox is
killed by a signal. Every episode ends in a state that is recorded, none twice, and a group is whole
or dropped by name.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import pytest_asyncio
import torch
from transformers import AutoTokenizer

from openrlhf_alp.clients.channel import Timeouts
from openrlhf_alp.clients.fleet import Backoff
from openrlhf_alp.clients.rollout import RolloutClient
from openrlhf_alp.clients.tool import ToolClient
from openrlhf_alp.learner.flags.config import ServiceConfig
from openrlhf_alp.learner.rollout_engine import RolloutEngine
from openrlhf_alp.rewards.protocol import RewardResult
from openrlhf_alp.rollouts.runners import ToolConfig
from services.rollout.api.app import create_app as create_rollout_app
from services.rollout.engines.hf_engine import HfEngine
from services.rollout.model_folder import read_model_folder
from services.rollout.service import build_service
from services.rollout.settings import FaultPlan, RolloutSettings
from services.tool.api.app import create_app as create_tool_app
from services.tool.service import ToolService
from services.tool.settings import ToolSettings

torch.set_num_threads(1)  # the engines of this process draw one token at a time

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(900)]

KEY, ADMIN_KEY, TOOL_KEY = "api-key-of-a-test", "admin-key-of-a-test", "tool-key-of-a-test"
NUM_GROUPS, GROUP_SIZE, AT_ONCE = 250, 4, 8
FAULT_SHARE = 0.4
KEPT = ("content-type", "retry-after")
KILLED_AT = 1_000
"""Tokens that the first engine draws before it dies: about a third of its share."""
FAST = Backoff(first_s=0.001, largest_s=0.01)


class Faults(httpx.AsyncBaseTransport):
    """The network, on which calls to one kind of path go wrong as a seeded generator says."""

    KINDS: tuple[str, ...] = ("refuse", "drop_request", "drop_reply", "truncate", "429", "500")

    def __init__(self, apps: dict[str, Any], path: str, seed: int) -> None:
        self._apps = {host: httpx.ASGITransport(app=app) for host, app in apps.items()}
        self._path = path
        self._random = random.Random(seed)
        self.counts: Counter[str] = Counter()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        network = self._apps[request.url.host]
        hit = request.method == "POST" and request.url.path.endswith(self._path)
        if not hit or self._random.random() > FAULT_SHARE:
            return await network.handle_async_request(request)
        fault = self._random.choice(self.KINDS)
        self.counts[fault] += 1
        if fault == "refuse":
            raise httpx.ConnectError("refused")
        if fault == "drop_request":
            raise httpx.RemoteProtocolError("cut before")
        if fault.isdigit():
            return httpx.Response(int(fault), headers={"retry-after": "0"}, request=request)
        response = await network.handle_async_request(request)
        return self._spoil(fault, response, await response.aread())

    def _spoil(self, fault: str, response: httpx.Response, content: bytes) -> httpx.Response:
        if fault == "drop_reply":
            raise httpx.ReadError("cut after")
        half = content[: len(content) // 2]
        headers = {"content-type": response.headers["content-type"]}
        return httpx.Response(response.status_code, headers=headers, content=half)


class ToolFaults(Faults):
    """Beside a broken network, a sandbox that fails; often enough to lose some episodes."""

    KINDS = ("refuse", "drop_reply", "503", "sandbox_error", "sandbox_error", "sandbox_error")

    def _spoil(self, fault: str, response: httpx.Response, content: bytes) -> httpx.Response:
        if fault == "drop_reply":
            raise httpx.ReadError("cut after")
        if response.status_code != 200:  # overloaded, or a session that went with its launcher
            kept = {name: response.headers[name] for name in KEPT if name in response.headers}
            return httpx.Response(response.status_code, headers=kept, content=content)
        body = {**json.loads(content), "status": "sandbox_error", "message": "fault plan"}
        return httpx.Response(200, json=body)


class CountingReward:
    """1.0 for the right answer; counts how many episodes came to be scored."""

    def __init__(self) -> None:
        self.num_scored = 0

    async def score(self, *, prompt: str, response: str, label: str) -> RewardResult:
        self.num_scored += 1
        right = f"\\boxed{{{label}}}" in response
        return RewardResult(value=float(right), detail={"answered": float("boxed" in response)})


@pytest_asyncio.fixture
async def rollout_apps(tiny_policy: Path, tmp_path: Path) -> AsyncIterator[dict[str, Any]]:
    settings = RolloutSettings(model=tiny_policy, engine="hf", dtype="float32")
    model = read_model_folder(settings)
    services = []
    for name, faults in (("one", FaultPlan(kill_after_tokens=KILLED_AT)), ("two", FaultPlan())):
        engine = HfEngine.load(model, settings.model_copy(update={"faults": faults}))
        folder = tmp_path / name
        folder.mkdir()
        services.append(build_service(engine, model, settings, folder))
    yield {
        name: create_rollout_app(service, settings, api_key=KEY, admin_key=ADMIN_KEY)
        for name, service in zip(("one", "two"), services, strict=True)
    }
    for service in services:
        await service.close()


@pytest_asyncio.fixture
async def tool() -> AsyncIterator[tuple[Any, ToolService]]:
    settings = ToolSettings(slots=2, launchers=1, presets="numpy")
    async with ToolService.running(settings) as service:
        yield create_tool_app(service, settings, api_key=TOOL_KEY), service


@pytest.mark.parametrize("session", [False, True])
async def test_every_episode_ends_in_a_recorded_state_and_groups_are_whole_or_dropped(
    tiny_policy: Path,
    rollout_apps: dict[str, Any],
    tool: tuple[Any, ToolService],
    session: bool,
) -> None:
    tool_app, sandbox = tool[0], tool[1].sandbox
    urls = ["http://one", "http://two"]
    service = ServiceConfig(
        urls=tuple(urls),
        request_timeout_s=600.0,
        ready_timeout_s=60.0,
        max_staleness=None,
        preflight_every=0,
        preflight_stop=False,
        metrics_jsonl=None,
    )
    setting = ToolConfig(urls=("http://tool",), session=session, void="off", template="plain")
    engine = RolloutEngine(
        urls=urls,
        api_key=KEY,
        admin_key=ADMIN_KEY,
        service=service,
        reward_urls=["math-verify"],
        tool=setting,
        tool_key=TOOL_KEY,
    )
    generate_faults = Faults(rollout_apps, "/generate", seed=1)
    tool_faults = ToolFaults({"tool": tool_app}, "/execute", seed=2)
    timeouts = Timeouts(total_s=600.0)
    engine.client = RolloutClient(
        urls, api_key=KEY, timeouts=timeouts, backoff=FAST, transport=generate_faults
    )
    engine.tool_client = ToolClient(
        ["http://tool"], api_key=TOOL_KEY, timeouts=timeouts, backoff=FAST, transport=tool_faults
    )
    reward = engine.reward = CountingReward()
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    sampling = SimpleNamespace(temperature=1.0, top_p=1.0, top_k=-1, max_tokens=60)
    turns = asyncio.Semaphore(AT_ONCE)
    num_groups = NUM_GROUPS // 2  # two settings make the thousand

    async def group(number: int) -> list[dict[str, Any]]:
        async with turns:
            if number == num_groups // 2:
                os.kill(sandbox.processes()[0], signal.SIGKILL)
            return await engine.generate_responses(
                prompt=f"Task {number % 4}\n",
                label=str(number % 4),
                sampling_params=sampling,
                max_length=128,
                hf_tokenizer=tokenizer,
                num_samples=GROUP_SIZE,
            )

    try:
        groups = await asyncio.gather(*(group(number) for number in range(num_groups)))
    finally:
        await engine.client.aclose()
        await engine.tool_client.aclose()

    assert sandbox.restarts >= 1
    sizes = Counter(len(responses) for responses in groups)
    dropped = Counter(engine.take_dropped_groups())
    assert set(sizes) <= {0, GROUP_SIZE}
    assert sizes[0] == dropped.total() and set(dropped) <= {"tool_sandbox_error"}
    # The plan has hit hard enough to lose some groups, and not so hard as to lose most.
    assert 0 < dropped.total() < num_groups / 2
    assert generate_faults.counts.total() + tool_faults.counts.total() > num_groups * GROUP_SIZE / 2
    assert engine.get_num_unfinished_requests() == 0
    responses = [response for responses in groups for response in responses]
    assert len(responses) <= reward.num_scored <= num_groups * GROUP_SIZE
    assert sum(response["reward"] for response in responses) > 0.8 * len(responses)
    for response in responses:
        calls = response["extra_logs"]["tir/tool_calls"]
        # What a fault broke was done again elsewhere; the policy never read of it.
        assert "sandbox" not in tokenizer.decode(response["observation_tokens"])
        assert response["extra_logs"]["tir/status_ok"] <= calls
        assert len(response["action_ranges"]) in (calls, calls + 1)

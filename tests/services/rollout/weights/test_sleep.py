"""Sleep is a state of its own: nothing is drawn, committed or resumed before wake_up."""

import asyncio
import inspect
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from vllm.v1.engine.async_llm import AsyncLLM

from services.rollout.engines.protocol import NoSleepModeError
from services.rollout.engines.vllm_engine import VllmEngine
from services.rollout.service import RolloutService

REQUEST = {
    "token_ids": [72, 105],
    "sampling": {"max_tokens": 6, "temperature": 0.0, "ignore_eos": True},
}


async def generate(http: httpx.AsyncClient, request_id: str) -> httpx.Response:
    return await http.post("/v1/generate", json={**REQUEST, "request_id": request_id})


@pytest.mark.parametrize("level", [1, 2])
async def test_a_server_that_slept_draws_what_it_drew_before(
    http: httpx.AsyncClient, service: RolloutService, level: int
) -> None:
    before = (await generate(http, "r-1")).json()["samples"]
    for _ in range(2):
        assert (await http.post("/v1/sleep", json={"level": level})).status_code == 200
    refused = await generate(http, "r-2")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "sleeping")
    assert refused.headers["retry-after"] == "1"
    assert (await http.get("/readyz")).status_code == 503
    assert (await http.get("/livez")).status_code == 200
    assert (await http.get("/v1/weights")).json()["state"] == "sleeping"
    for _ in range(2):
        assert (await http.post("/v1/wake_up")).status_code == 200
    assert (await generate(http, "r-3")).json()["samples"] == before
    assert service.engine.num_jobs == 2  # type: ignore[attr-defined]


async def test_a_paused_server_says_so_where_readiness_is_asked_for(
    http: httpx.AsyncClient,
) -> None:
    assert (await http.post("/v1/pause")).status_code == 200  # every field has a default
    ready = await http.get("/readyz")
    assert ready.status_code == 200
    assert "paused" in ready.json()["detail"]
    await http.post("/v1/resume")
    assert (await http.get("/readyz")).json()["detail"] is None


async def test_level_2_drops_the_weights_until_wake_up(
    http: httpx.AsyncClient, service: RolloutService
) -> None:
    model = service.engine._model  # type: ignore[attr-defined]
    whole = [parameter.clone() for parameter in model.parameters()]
    await http.post("/v1/sleep", json={"level": 2})
    assert not any(parameter.any() for parameter in model.parameters())
    await http.post("/v1/wake_up")
    assert all(map(torch.equal, service.engine._model.parameters(), whole))  # type: ignore[attr-defined]


@pytest.mark.parametrize("route", ["pause", "resume", "weights/commit"])
async def test_what_a_sleeping_engine_would_not_survive_is_a_409(
    http: httpx.AsyncClient, route: str
) -> None:
    await http.post("/v1/sleep", json={})
    body = {"version": 1, "digest": "0" * 64} if route == "weights/commit" else {}
    refused = await http.post(f"/v1/{route}", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "sleeping")


@pytest.mark.parametrize(("mode", "reason"), [("wait", "length"), ("abort", "abort")])
async def test_running_requests_finish_or_end_as_the_mode_says(
    http: httpx.AsyncClient, service: RolloutService, mode: str, reason: str
) -> None:
    running = asyncio.create_task(generate(http, "r-1"))
    while service.versions.num_running == 0:
        await asyncio.sleep(0)
    assert (await http.post("/v1/sleep", json={"mode": mode})).status_code == 200
    assert (await running).json()["samples"][0]["finish_reason"] == reason


async def test_sleep_needs_the_admin_key(http: httpx.AsyncClient) -> None:
    wrong = {"authorization": "Bearer api-key-for-tests"}
    for route in ("sleep", "wake_up"):
        assert (await http.post(f"/v1/{route}", json={}, headers=wrong)).status_code == 401


class RecordingLLM:
    """Stands where AsyncLLM does on a GPU; takes only calls that AsyncLLM's signatures take."""

    def __init__(self, *, enable_sleep_mode: bool) -> None:
        self.model_config = type("Config", (), {"enable_sleep_mode": enable_sleep_mode})
        self.engine_core = type("Core", (), {"outputs_queue": None, "get_output_async": None})
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        signature = inspect.signature(getattr(AsyncLLM, name))

        async def call(*args: Any, **kwargs: Any) -> None:
            bound = signature.bind(self, *args, **kwargs)
            self.calls.append((name, *list(bound.arguments.values())[1:]))

        return call


def vllm_engine(llm: RecordingLLM, service: RolloutService) -> VllmEngine:
    unused: Any = None
    return VllmEngine(llm, service.engine.info, Path("unused"), unused)  # type: ignore[arg-type]


async def test_vllm_schedules_again_only_after_dropped_weights_are_loaded(
    service: RolloutService,
) -> None:
    llm = RecordingLLM(enable_sleep_mode=True)
    engine = vllm_engine(llm, service)
    await engine.sleep(2, "wait")
    await engine.wake_up({})
    assert llm.calls == [
        ("sleep", 2, "wait"),
        ("wake_up", ["weights"]),
        ("collective_rpc", "alp_reload_weights", ({},)),
        ("wake_up", ["kv_cache"]),
    ]


async def test_vllm_without_sleep_mode_is_not_asked_to_sleep(service: RolloutService) -> None:
    llm = RecordingLLM(enable_sleep_mode=False)
    with pytest.raises(NoSleepModeError):
        await vllm_engine(llm, service).sleep(1, "abort")
    assert llm.calls == []

import json
from typing import Any

import httpx

from services.rollout.service import RolloutService

SSE = {"accept": "text/event-stream"}


def body(request_id: str = "s-1", **changes: Any) -> dict[str, Any]:
    sampling = {"max_tokens": 6, "ignore_eos": True}
    return {
        "request_id": request_id,
        "token_ids": [72, 105],
        "n": 2,
        "sampling": sampling,
        **changes,
    }


async def events(http: httpx.AsyncClient, request: dict[str, Any]) -> list[tuple[str, Any]]:
    got = []
    async with http.stream("POST", "/v1/generate", json=request, headers=SSE) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        text = (await response.aread()).decode()
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        got.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return got


async def test_the_events_add_up_to_the_reply(http: httpx.AsyncClient) -> None:
    got = await events(http, body())
    assert [name for name, _ in got] == ["tokens"] * 12 + ["done"]
    done = got[-1][1]
    for index, sample in enumerate(done["samples"]):
        mine = [data for name, data in got if name == "tokens" and data["index"] == index]
        assert [t for data in mine for t in data["token_ids"]] == sample["token_ids"]
        assert [p for data in mine for p in data["logprobs"]] == sample["logprobs"]
    replayed = (await http.post("/v1/generate", json=body())).json()
    assert replayed == done


async def test_a_stream_of_a_finished_request_is_its_reply(
    http: httpx.AsyncClient, service: RolloutService
) -> None:
    first = (await http.post("/v1/generate", json=body())).json()
    assert await events(http, body()) == [("done", first)]
    assert service.engine.num_jobs == 2  # type: ignore[attr-defined]


async def test_a_failure_in_mid_stream_is_an_error_event(
    http: httpx.AsyncClient, service: RolloutService
) -> None:
    await service.engine.pause("keep")
    ((name, data),) = await events(http, body(deadline_s=0.05))
    assert (name, data["error"]["code"]) == ("error", "deadline_exceeded")
    assert service.versions.num_running == 0

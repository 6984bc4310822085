import asyncio
from typing import Any

import httpx
import pytest
import torch

from services.rollout.service import RolloutService

PROMPT = [72, 101, 108, 108, 111]
MSGPACK = {"accept": "application/msgpack"}


def body(**changes: Any) -> dict[str, Any]:
    sampling = {"max_tokens": 8, "seed": 7, **changes.pop("sampling", {})}
    return {"request_id": "r-1", "token_ids": PROMPT, "sampling": sampling, **changes}


def forward_log_probs(
    service: RolloutService, token_ids: list[int], temperature: float
) -> torch.Tensor:
    """(N,) log-probs of the sampled ids by one plain forward pass over prompt + sample."""
    model = service.engine._model  # type: ignore[attr-defined]
    ids = torch.tensor([PROMPT + token_ids])
    with torch.no_grad():
        logits = model(ids).logits[0, len(PROMPT) - 1 : -1] / temperature
    return torch.log_softmax(logits, -1).gather(-1, ids[0, len(PROMPT) :, None])[:, 0]


async def test_log_probs_are_those_of_the_tempered_model(
    http: httpx.AsyncClient, service: RolloutService
) -> None:
    request = body(n=3, sampling={"temperature": 0.7, "ignore_eos": True})
    reply = (await http.post("/v1/generate", json=request)).json()
    for sample in reply["samples"]:
        assert len(sample["token_ids"]) == len(sample["logprobs"]) == 8
        expected = forward_log_probs(service, sample["token_ids"], 0.7)
        torch.testing.assert_close(torch.tensor(sample["logprobs"]), expected, atol=1e-4, rtol=0)


async def test_json_and_msgpack_carry_the_same_float32(http: httpx.AsyncClient) -> None:
    from services.common.wire import MSGPACK_TYPE, decode

    as_json = (await http.post("/v1/generate", json=body())).json()
    packed = await http.post("/v1/generate", json=body(), headers=MSGPACK)
    as_msgpack = decode(packed.content, MSGPACK_TYPE)
    assert as_msgpack["samples"][0]["logprobs"] == as_json["samples"][0]["logprobs"]
    as_float32 = torch.tensor(as_json["samples"][0]["logprobs"], dtype=torch.float32)
    assert as_float32.double().tolist() == as_json["samples"][0]["logprobs"]


async def test_samples_of_one_request_differ_and_repeat_with_the_seed(
    http: httpx.AsyncClient,
) -> None:
    first = (await http.post("/v1/generate", json=body(n=4))).json()["samples"]
    again = (await http.post("/v1/generate", json=body(n=4, request_id="r-2"))).json()["samples"]
    assert [s["token_ids"] for s in first] == [s["token_ids"] for s in again]
    assert len({tuple(s["token_ids"]) for s in first}) > 1


async def test_a_sampled_stop_token_stays_in_the_reply(http: httpx.AsyncClient) -> None:
    free = (await http.post("/v1/generate", json=body(sampling={"temperature": 0.0}))).json()
    second = free["samples"][0]["token_ids"][1]
    stopping = body(request_id="r-2", sampling={"temperature": 0.0, "stop_token_ids": [second]})
    sample = (await http.post("/v1/generate", json=stopping)).json()["samples"][0]
    cut = free["samples"][0]["token_ids"].index(second) + 1
    assert sample["token_ids"] == free["samples"][0]["token_ids"][:cut]
    assert (sample["finish_reason"], sample["stop_reason"]) == ("stop", second)


async def test_spans_cover_each_sample_with_the_serving_version(http: httpx.AsyncClient) -> None:
    reply = (await http.post("/v1/generate", json=body(n=2))).json()
    contract = (await http.get("/v1/contract")).json()
    assert reply["contract_hash"] == contract["contract_hash"]
    for sample in reply["samples"]:
        end = len(sample["token_ids"])
        span = {"version": 0, "digest": contract["digest"], "start": 0, "end": end}
        assert sample["spans"] == [span]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"token_ids": []}, "token_ids"),
        ({"token_ids": [258]}, "token_ids"),
        ({"token_ids": [-1]}, "token_ids.0"),
        ({"token_ids": ["72"]}, "token_ids.0"),
        ({"token_ids": [1] * 256}, "token_ids"),
        ({"request_id": "white space"}, "request_id"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"deadline_s": True}, "deadline_s"),
        ({"sampling": {"top_k": True}}, "sampling.top_k"),
        ({"sampling": {"temperature": True}}, "sampling.temperature"),
        ({"deadline_s": 0}, "deadline_s"),
        ({"surprise": 1}, "surprise"),
        ({"sampling": {"top_p": 0.0}}, "sampling.top_p"),
        ({"sampling": {"temperature": 0.001}}, "sampling.temperature"),
        ({"sampling": {"temperature": 2.5}}, "sampling.temperature"),
        ({"sampling": {"min_tokens": 9}}, "sampling.min_tokens"),
        ({"sampling": {"max_tokens": 0}}, "sampling.max_tokens"),
        ({"sampling": {"max_tokens": 252}}, "sampling.max_tokens"),
        ({"sampling": {"stop_token_ids": [999]}}, "sampling.stop_token_ids"),
        ({"sampling": {"stop": [""]}}, "sampling.stop.0"),
    ],
)
async def test_bad_input_is_a_422_that_names_the_field(
    http: httpx.AsyncClient, change: dict[str, Any], field: str
) -> None:
    response = await http.post("/v1/generate", json=body(**change))
    assert response.status_code == 422, response.text
    assert response.json()["error"]["field"] == field


async def test_a_deadline_cancels_the_work_and_frees_the_slot(
    http: httpx.AsyncClient, service: RolloutService
) -> None:
    await service.engine.pause("keep")
    response = await http.post("/v1/generate", json=body(deadline_s=0.05))
    assert response.status_code == 504
    assert response.json()["error"]["field"] == "deadline_s"
    assert service.versions.num_running == 0
    assert service.engine.num_tokens("anything") is None
    await service.engine.resume()
    assert (await http.post("/v1/generate", json=body(request_id="r-2"))).status_code == 200


async def test_time_in_the_queue_is_no_time_of_work(
    http: httpx.AsyncClient, service: RolloutService
) -> None:
    await service.engine.pause("keep")
    request = body(work_limit_s=1.0, sampling={"max_tokens": 1})
    waiting = asyncio.create_task(http.post("/v1/generate", json=request))
    await asyncio.sleep(1.2)  # nothing is drawn for longer than the limit
    assert not waiting.done()
    await service.engine.resume()
    # Its first token is its last, so its work takes no time at all.
    assert (await waiting).status_code == 200


async def test_work_that_takes_too_long_is_cancelled(
    http: httpx.AsyncClient, service: RolloutService
) -> None:
    started = asyncio.create_task(http.post("/v1/generate", json=body(work_limit_s=0.2)))
    while service.engine._running == {} or not any(  # type: ignore[attr-defined]
        running.token_ids
        for running in service.engine._running.values()  # type: ignore[attr-defined]
    ):
        assert not started.done()
        await asyncio.sleep(0)
    await service.engine.pause("keep")
    response = await started
    assert response.status_code == 504
    assert "work_limit_s 0.2" in response.json()["error"]["message"]
    assert service.versions.num_running == 0


async def test_a_nan_log_prob_is_an_error_and_never_a_sample(
    http: httpx.AsyncClient, service: RolloutService
) -> None:
    with torch.no_grad():
        service.engine._model.lm_head.weight[:, 0] = torch.inf  # type: ignore[attr-defined]
    response = await http.post("/v1/generate", json=body(sampling={"temperature": 0.0}))
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "invalid_logprobs"


async def test_requests_run_side_by_side(http: httpx.AsyncClient) -> None:
    replies = await asyncio.gather(
        *(http.post("/v1/generate", json=body(request_id=f"r-{i}")) for i in range(8))
    )
    assert {r.status_code for r in replies} == {200}
    assert {r.json()["request_id"] for r in replies} == {f"r-{i}" for i in range(8)}

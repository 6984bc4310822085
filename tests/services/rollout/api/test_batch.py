"""A batch behaves as its requests would alone, and answers each as it finishes."""

import asyncio
import io
import json
from dataclasses import replace
from typing import Any

import httpx
import msgpack

from services.common.wire import MSGPACK_TYPE, encode
from services.rollout.service import RolloutService
from services.rollout.wire.schemas import BatchRequest, GenerateRequest, Sampling


def request(request_id: str, num_tokens: int = 4, **changes: Any) -> dict[str, Any]:
    sampling = {"max_tokens": num_tokens, "ignore_eos": True}
    return {"request_id": request_id, "token_ids": [72, 105], "sampling": sampling, **changes}


async def send(http: httpx.AsyncClient, *requests: dict[str, Any]) -> list[dict[str, Any]]:
    reply = await http.post("/v1/generate/batch", json={"requests": requests})
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in reply.text.splitlines()]


async def test_items_come_in_the_order_in_which_they_finish(http: httpx.AsyncClient) -> None:
    items = await send(http, request("long", 30), request("short", 2), request("middle", 12))
    assert [(item["index"], item["request_id"]) for item in items] == [
        (1, "short"),
        (2, "middle"),
        (0, "long"),
    ]
    assert [len(item["response"]["samples"][0]["token_ids"]) for item in items] == [2, 12, 30]


async def test_a_failing_request_fails_alone_and_says_why(
    http: httpx.AsyncClient, service: RolloutService
) -> None:
    wrong = request("wrong", token_ids=[999])
    items = await send(http, request("good"), wrong, request("same"), request("same", 5))
    by_index = {item["index"]: item for item in items}
    assert [by_index[i]["status"] for i in range(4)] == [200, 422, 200, 409]
    assert by_index[1]["error"]["field"] == "token_ids"
    assert by_index[3]["error"]["code"] == "request_id_reused"
    assert service.engine.num_jobs == 2  # type: ignore[attr-defined]


async def test_a_repeated_batch_costs_the_engine_nothing(
    http: httpx.AsyncClient, service: RolloutService
) -> None:
    first = await send(http, request("a"), request("b"))
    again = await send(http, request("b"), request("a"))
    replies = {item["request_id"]: item["response"] for item in first}
    assert {item["request_id"]: item["response"] for item in again} == replies
    alone = (await http.post("/v1/generate", json=request("a"))).json()
    assert alone == replies["a"]
    assert service.engine.num_jobs == 2  # type: ignore[attr-defined]


async def test_what_does_not_fit_is_told_to_come_back(
    http: httpx.AsyncClient, service: RolloutService
) -> None:
    service.ledger._limits = replace(service.ledger._limits, max_pending_samples=3)
    items = await send(http, request("a", n=2), request("b", n=2), request("c", n=1))
    assert {item["request_id"]: item["status"] for item in items} == {"a": 200, "b": 429, "c": 200}


async def test_a_batch_in_msgpack_is_a_sequence_of_objects(http: httpx.AsyncClient) -> None:
    sampling = Sampling(max_tokens=3, ignore_eos=True)
    requests = [
        GenerateRequest(request_id=f"m-{i}", token_ids=[72], sampling=sampling) for i in range(3)
    ]
    reply = await http.post(
        "/v1/generate/batch",
        content=encode(BatchRequest(requests=requests), MSGPACK_TYPE),
        headers={"content-type": MSGPACK_TYPE, "accept": MSGPACK_TYPE},
    )
    assert reply.headers["content-type"] == MSGPACK_TYPE
    items = list(msgpack.Unpacker(io.BytesIO(reply.content)))
    assert {item["request_id"] for item in items} == {"m-0", "m-1", "m-2"}
    assert {len(item["response"]["samples"][0]["logprobs"].data) for item in items} == {3 * 4}


async def test_a_batch_that_breaks_off_is_picked_up_by_its_requests(
    http: httpx.AsyncClient, service: RolloutService
) -> None:
    call = asyncio.create_task(send(http, request("a"), request("b")))
    while service.versions.num_running < 2:
        await asyncio.sleep(0)
    call.cancel()
    await asyncio.wait([call])
    again = await send(http, request("a"), request("b"))
    assert {item["status"] for item in again} == {200}
    assert service.engine.num_jobs == 2  # type: ignore[attr-defined]


async def test_a_request_that_does_not_match_the_schema_is_named(http: httpx.AsyncClient) -> None:
    bad = request("bad", n=0)
    reply = await http.post("/v1/generate/batch", json={"requests": [request("good"), bad]})
    assert (reply.status_code, reply.json()["error"]["field"]) == (422, "requests.1.n")


async def test_a_body_without_its_type_is_not_blamed_on_its_fields(http: httpx.AsyncClient) -> None:
    form = {"content-type": "application/x-www-form-urlencoded"}  # what curl -d sends
    answer = await http.post("/v1/generate", content=b'{"token_ids": [1]}', headers=form)
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert (error["code"], error["field"]) == ("wrong_content_type", "Content-Type")

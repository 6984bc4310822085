import asyncio
import json
from functools import partial

import httpx
import pytest
from pydantic import BaseModel

from services.common.routes import BoundedItemStream, SendBudget

KEY = "a-key-for-tests"
JSON = {"content-type": "application/json"}


async def test_the_right_key_passes(client: httpx.AsyncClient) -> None:
    response = await client.get("/locked", headers={"authorization": f"Bearer {KEY}"})
    assert response.json() == {"open": True}


@pytest.mark.parametrize("header", [None, "Bearer wrong", f"Basic {KEY}", "Bearer sch\u00fcssel"])
async def test_a_missing_or_wrong_key_is_a_401(
    client: httpx.AsyncClient, header: str | None
) -> None:
    headers = {} if header is None else {"authorization": header.encode("utf-8")}
    response = await client.get("/locked", headers=headers)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "unauthorized"
    assert response.headers["www-authenticate"] == "Bearer"


async def test_a_stranger_learns_nothing_about_a_body(client: httpx.AsyncClient) -> None:
    garbage = await client.post("/locked", content=b"{", headers=JSON)
    assert garbage.status_code == 401
    right = {**JSON, "authorization": f"Bearer {KEY}"}
    assert (await client.post("/locked", content=b"{", headers=right)).status_code == 422


class Item(BaseModel):
    index: int


async def test_results_that_nobody_reads_hold_up_what_follows() -> None:
    started: list[int] = []

    async def job(index: int) -> Item:
        started.append(index)
        return Item(index=index)

    budget = SendBudget(limit_bytes=50)
    streams = [
        BoundedItemStream(
            [(10, partial(job, index)) for index in range(20)], window=4, budget=budget
        )
        for _ in range(3)
    ]
    lines = [stream.body_iterator.__aiter__() for stream in streams]
    first = await anext(lines[0])
    await asyncio.sleep(0.05)
    assert len(started) == 4 and budget.held_bytes == 40
    other = asyncio.create_task(anext(lines[1]))  # 10 bytes are left: one of its jobs
    await other
    await asyncio.sleep(0.05)
    assert len(started) == 5 and budget.held_bytes == 50
    # What is read makes room; in the end everything comes, once.
    rest = [json.loads(line)["index"] async for line in lines[0]]
    assert sorted([json.loads(first)["index"], *rest]) == list(range(20))
    await lines[1].aclose()
    assert budget.held_bytes == 0
    assert len([line async for line in lines[2]]) == 20


async def test_a_result_larger_than_the_budget_passes_alone() -> None:
    async def job() -> Item:
        return Item(index=0)

    stream = BoundedItemStream([(1000, job)] * 3, window=3, budget=SendBudget(limit_bytes=50))
    assert len([line async for line in stream.body_iterator]) == 3


async def test_a_job_that_fails_ends_its_stream_and_gives_back_its_share() -> None:
    async def job() -> Item:
        raise ValueError("a bug")

    budget = SendBudget(limit_bytes=50)
    stream = BoundedItemStream([(10, job)] * 3, window=1, budget=budget)
    with pytest.raises(ValueError, match="a bug"):
        [line async for line in stream.body_iterator]
    assert budget.held_bytes == 0

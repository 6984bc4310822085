"""What reaches an engine's OpenAI routes, and what is refused before."""

import asyncio
import dataclasses
import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from services.common.errors import install_error_handlers
from services.rollout.api.openai_requests import AdmittedApp, num_samples
from services.rollout.errors import ERRORS
from services.rollout.ledger import Ledger, LedgerLimits

LIMITS = LedgerLimits(max_pending_samples=8, keep_s=0.0, keep_bytes=0, detach_grace_s=0.0)


def app_over(ledger: Ledger, release: asyncio.Event) -> httpx.AsyncClient:
    """The mount with a route below it that answers what it received, once it may."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        body = await request.body()
        assert int(request.headers["content-length"]) == len(body)
        await release.wait()
        await JSONResponse({"got": body.decode()})(scope, receive, send)

    app = FastAPI()
    install_error_handlers(app, ERRORS)
    app.router.routes.append(Route("/v1/chat/completions", AdmittedApp(answer, ledger.hold)))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://rollout")


async def ask(http: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await http.post("/v1/chat/completions", json={"messages": [], **fields})


async def test_samples_of_openai_requests_count_until_they_are_answered() -> None:
    ledger, release = Ledger(LIMITS), asyncio.Event()
    async with app_over(ledger, release) as http:
        never = await ask(http, n=4000)
        assert (never.status_code, never.json()["error"]["code"]) == (422, "too_many_samples")
        running = asyncio.create_task(ask(http, n=6))
        while ledger.pending_samples != 6:
            await asyncio.sleep(0)
        later = await ask(http, n=3)
        assert (later.status_code, later.json()["error"]["code"]) == (429, "overloaded")
        assert int(later.headers["retry-after"]) >= 1
        release.set()
        assert (await running).status_code == 200
        assert ledger.pending_samples == 0
        assert (await ask(http, n=8)).status_code == 200


async def test_a_prompt_is_sampled_no_more_often_than_by_generate() -> None:
    roomy = dataclasses.replace(LIMITS, max_pending_samples=100_000)
    release = asyncio.Event()
    release.set()
    async with app_over(Ledger(roomy), release) as http:
        assert (await ask(http, n=1024)).status_code == 200
        refused = await ask(http, n=4000)
    assert (refused.status_code, refused.json()["error"]["field"]) == (422, "n")
    assert "at most 1024" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"logprobs": True, "top_logprobs": None}, 0),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 3}, 3),
        ({"logprobs": False}, None),
        ({}, None),
        ({"logprobs": True, "logprob_token_ids": [1]}, None),
    ],
)
async def test_a_chat_that_asks_for_logprobs_alone_gets_those_of_its_own_tokens(
    fields: dict[str, Any], expected: int | None
) -> None:
    release = asyncio.Event()
    release.set()
    async with app_over(Ledger(LIMITS), release) as http:
        got = json.loads((await ask(http, **fields, seed=1)).json()["got"])
    assert got.get("top_logprobs") == expected
    assert got["seed"] == 1


async def test_a_body_that_is_no_object_reaches_the_engine_as_it_is() -> None:
    release = asyncio.Event()
    release.set()
    async with app_over(Ledger(LIMITS), release) as http:
        for body in (b"{", b"[1]", b"\xff"[:0], b"[" * 100_000):
            reply = await http.post("/v1/chat/completions", content=body)
            assert reply.json()["got"].encode() == body


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt": "a", "n": 3}, 3),
        ({"prompt": ["a", "b"], "n": 3}, 6),
        ({"prompt": [1, 2, 3]}, 1),
        ({"prompt": [[1, 2], [3]], "n": None}, 2),
        ({"prompt": [], "n": 2}, 2),
        ({"prompt": "a", "n": -5}, 1),
        ({"prompt": "a", "n": "many"}, 1),
    ],
)
def test_every_prompt_has_n_samples(fields: dict[str, Any], expected: int) -> None:
    assert num_samples(fields) == expected

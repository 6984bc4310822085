"""schemathesis over the OpenAPI document: no input gives a 5xx, and a 4xx says what is wrong."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgpack
import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.core.transport import Response as Reply

from services.common.wire import MSGPACK_TYPE
from services.rollout.api.app import create_app
from services.rollout.engines.hf_engine import HfEngine
from services.rollout.model_folder import read_model_folder
from services.rollout.service import build_service
from services.rollout.settings import RolloutSettings


@schemathesis.serializer(MSGPACK_TYPE)
def as_msgpack(_: schemathesis.SerializationContext, value: Any) -> bytes:
    """What msgpack cannot hold goes out as a byte that is no msgpack."""
    try:
        packed: bytes = msgpack.packb(value)
        return packed
    except (OverflowError, TypeError, ValueError):
        return b"\xc1"


KEY = "admin-key-for-tests"
# A client cannot cause these; 503, 504 and 507 are answers, not bugs.
BUGS = {500, 501, 502}
WITHOUT_GPU = "transport_unavailable"
OPEN, RECEIVE = "/v1/weights/transfer/open", "/v1/weights/transfer/receive"


@pytest.fixture(scope="module")
def app(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    chosen = RolloutSettings(
        model=model_folder, engine="hf", dtype="float32", max_pending_samples=4, max_model_len=16
    )
    model = read_model_folder(chosen)
    engine = HfEngine.load(model, chosen)
    service = build_service(engine, model, chosen, tmp_path_factory.mktemp("weights"))
    yield create_app(service, chosen, api_key="api-key-for-tests", admin_key=KEY)
    asyncio.run(service.close())


def test_the_document_names_every_form_of_a_body(app: FastAPI) -> None:
    paths = app.openapi()["paths"]
    json_or_msgpack = {"application/json", MSGPACK_TYPE}
    for path in (
        "/v1/weights/prepare",
        "/v1/weights/commit",
        "/v1/pause",
        "/v1/sleep",
        OPEN,
        RECEIVE,
    ):
        operation = paths[path]["post"]
        assert set(operation["requestBody"]["content"]) == json_or_msgpack
        assert set(operation["responses"]["200"]["content"]) == json_or_msgpack
    generate = paths["/v1/generate"]["post"]
    assert set(generate["requestBody"]["content"]) == json_or_msgpack
    assert set(generate["responses"]["200"]["content"]) == {*json_or_msgpack, "text/event-stream"}
    assert set(generate["responses"]["422"]["content"]) == {"application/json"}
    batch = paths["/v1/generate/batch"]["post"]
    assert set(batch["responses"]["200"]["content"]) == {"application/x-ndjson", MSGPACK_TYPE}
    upload = paths["/v1/weights/files/{name}"]["put"]
    assert set(upload["requestBody"]["content"]) == {"application/octet-stream"}


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
async def test_no_page_needs_the_internet(app: FastAPI, path: str) -> None:
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://rollout") as http:
        assert (await http.get(path)).status_code == 401
        key = {"authorization": f"Bearer {KEY}"}
        assert (await http.get(path, headers=key)).status_code == 404


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_no_input_breaks_a_route(app: FastAPI, mode: GenerationMode) -> None:
    key = {"authorization": f"Bearer {KEY}"}
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers=key)
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 12
    for operation in operations:
        # A pause that waits, in a service that nobody resumes, is what it was asked for.
        if operation.path == "/v1/pause":
            continue
        if mode is GenerationMode.POSITIVE or operation.body:
            hammer(operation, mode)


def hammer(operation: Any, mode: GenerationMode) -> None:
    @settings(
        max_examples=15,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def one_operation(case: schemathesis.Case) -> None:
        check(case.call(headers={"authorization": f"Bearer {KEY}"}, timeout=20))

    one_operation()


def check(reply: Reply) -> None:
    error = reply.json()["error"] if reply.status_code >= 400 else None
    assert reply.status_code not in BUGS or error["code"] == WITHOUT_GPU, reply.text
    if error is not None:
        assert error["message"] and error["fix"] and error["code"]
        if reply.status_code == 422:
            assert error["field"]


async def test_a_stranger_is_refused_before_a_body_and_redirected_nowhere(app: FastAPI) -> None:
    transport = httpx.ASGITransport(app=app)

    async def body() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    async with httpx.AsyncClient(transport=transport, base_url="http://rollout") as http:
        for path in ("/v1/generate", "/v1/pause", "/v1/nowhere", "/v1/generate/", "/openapi.json"):
            assert (await http.post(path, content=body())).status_code == 401
        key = {"authorization": f"Bearer {KEY}", "host": "evil.example"}
        answer = await http.post("/v1/generate/batch/", json={}, headers=key)
        assert answer.status_code in (404, 405) and "location" not in answer.headers

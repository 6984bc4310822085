from collections.abc import AsyncIterator

import httpx

GOOD = b'{"token_ids":[1],"logprobs":[-0.5],"inner":{"top_p":1.0}}'
JSON = {"content-type": "application/json"}


async def test_a_safe_request_id_is_echoed(client: httpx.AsyncClient) -> None:
    response = await client.get("/nowhere", headers={"x-request-id": "step-7.sample:3"})
    assert response.headers["x-request-id"] == "step-7.sample:3"


async def test_an_unsafe_request_id_is_replaced(client: httpx.AsyncClient) -> None:
    for bad in ("x" * 129, 'a"b', "a b"):
        response = await client.get("/nowhere", headers={"x-request-id": bad})
        assert len(response.headers["x-request-id"]) == 16


async def test_a_valid_traceparent_is_echoed_and_another_is_not(
    client: httpx.AsyncClient,
) -> None:
    valid = f"00-{'ab' * 16}-{'cd' * 8}-01"
    response = await client.get("/nowhere", headers={"traceparent": valid})
    assert response.headers["traceparent"] == valid
    for bad in (
        f"00-{'0' * 32}-{'cd' * 8}-01",
        f"00-{'ab' * 16}-{'0' * 16}-01",
        "00-ab-cd-01",
        "x",
    ):
        response = await client.get("/nowhere", headers={"traceparent": bad})
        assert "traceparent" not in response.headers


async def test_a_declared_body_above_the_limit_is_a_413(client: httpx.AsyncClient) -> None:
    response = await client.post("/echo", content=GOOD + b" " * 10_000, headers=JSON)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"


async def test_a_chunked_body_above_the_limit_is_a_413(client: httpx.AsyncClient) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield GOOD
        for _ in range(20):
            yield b" " * 1_000

    response = await client.post("/echo", content=chunks(), headers=JSON)
    assert response.status_code == 413
    assert response.json()["error"]["field"] == "body"


async def test_a_body_of_exactly_the_limit_passes(client: httpx.AsyncClient) -> None:
    body = GOOD + b" " * (10_000 - len(GOOD))
    assert (await client.post("/echo", content=body, headers=JSON)).status_code == 200

import httpx
import pytest

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

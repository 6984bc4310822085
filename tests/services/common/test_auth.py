import httpx
import pytest

from services.common.errors import ConfigError
from services.common.settings import is_loopback, resolve_api_key

KEY = "a-key-for-tests"
JSON = {"content-type": "application/json"}
NAMES = {"flag": "--api-key", "variable": "SERVICE_API_KEY"}


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


def test_a_key_is_generated_on_loopback_and_differs_each_time() -> None:
    first = resolve_api_key(None, host="127.0.0.1", **NAMES)
    second = resolve_api_key(None, host="::1", **NAMES)
    assert first.generated and second.generated
    assert first.value != second.value
    assert len(first.value) >= 32


def test_a_key_never_shows_in_its_repr() -> None:
    key = resolve_api_key("correct-horse", host="0.0.0.0", **NAMES)
    assert not key.generated
    assert "horse" not in repr(key)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_an_open_bind_without_a_key_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match=r"--api-key or \$SERVICE_API_KEY"):
        resolve_api_key(None, host=host, **NAMES)


@pytest.mark.parametrize("key", ["", "short", "has\nnewline-in-it", "schl\u00fcssel-lang"])
def test_a_weak_or_unsendable_key_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=r"--api-key or \$SERVICE_API_KEY"):
        resolve_api_key(key, host="127.0.0.1", **NAMES)


def test_loopback_is_told_from_the_rest() -> None:
    assert all(map(is_loopback, ["127.0.0.1", "127.8.8.8", "::1", "localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "192.168.0.1", "localhost.example"]))

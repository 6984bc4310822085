"""GET /v1/rl/workers: the fields that SMG 1.13 and Dynamo 1.6 list their workers with."""

import httpx
import pytest

from services.rollout.api.app import create_app
from services.rollout.service import RolloutService
from services.rollout.settings import RolloutSettings

API_KEY, ADMIN_KEY = "api-key-for-tests", "admin-key-for-tests"
URL = "http://rollout-1.rollout:8000"

# Fields without a default in the Rust structs of both, read in November 2026.
SMG = {
    *("id", "url", "base_url", "engine", "engine_version", "model_id", "worker_type"),
    *("connection_mode", "tp_size", "dp_size", "pp_size", "dp_ranks", "role", "health"),
    *("weight_version", "labels", "capabilities"),
}
SMG_CAPABILITIES = {
    *("source", "pause_modes", "update_from", "abort", "flush_cache", "sleep_wake"),
    "reports_weight_version",
}
DYNAMO = {
    *("namespace", "component", "endpoint", "instance_id", "transport", "request_plane_url"),
    *("system_url", "admin_base_url", "model", "routes", "world_size", "error"),
}


@pytest.fixture
async def caller(settings: RolloutSettings, service: RolloutService):
    app = create_app(service, settings, api_key=API_KEY, admin_key=ADMIN_KEY)
    key = {"authorization": f"Bearer {API_KEY}"}
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url=URL, headers=key) as client:
        yield client


async def test_the_list_has_the_fields_of_both_gateways(caller: httpx.AsyncClient) -> None:
    reply = (await caller.get("/v1/rl/workers")).json()
    assert (reply["protocol_version"], reply["total"], len(reply["workers"])) == (1, 1, 1)
    worker = reply["workers"][0]
    assert worker.keys() == SMG | DYNAMO
    assert worker["capabilities"].keys() == SMG_CAPABILITIES
    assert worker["namespace"] == reply["namespace"]


async def test_a_row_says_where_the_server_is_and_what_it_serves(caller: httpx.AsyncClient) -> None:
    contract = (await caller.get("/v1/contract")).json()
    worker = (await caller.get("/v1/rl/workers")).json()["workers"][0]
    assert {worker[name] for name in ("url", "base_url", "system_url", "admin_base_url")} == {URL}
    assert (worker["engine"], worker["model"]) == (contract["engine"], contract["model"])
    assert (worker["health"], worker["error"]) == ("ready", None)
    assert worker["weight_version"] == "0"
    assert worker["labels"]["digest"] == contract["digest"]
    assert worker["capabilities"]["update_from"] == ["disk", "http"]
    assert worker["world_size"] == worker["tp_size"] == 1


async def test_the_routes_named_are_the_control_routes(
    settings: RolloutSettings, service: RolloutService, caller: httpx.AsyncClient
) -> None:
    app = create_app(service, settings, api_key=API_KEY, admin_key=ADMIN_KEY)
    tagged = {
        path
        for path, operations in app.openapi()["paths"].items()
        for operation in operations.values()
        if "control" in operation["tags"]
    }
    routes = (await caller.get("/v1/rl/workers")).json()["workers"][0]["routes"]
    assert set(routes) == tagged and "/v1/weights/commit" in routes


async def test_a_sleeping_server_is_listed_as_not_ready_with_the_reason(
    caller: httpx.AsyncClient,
) -> None:
    admin = {"authorization": f"Bearer {ADMIN_KEY}"}
    assert (await caller.post("/v1/sleep", json={}, headers=admin)).status_code == 200
    worker = (await caller.get("/v1/rl/workers")).json()["workers"][0]
    assert worker["health"] == "not_ready" and "sleep" in worker["error"]


async def test_the_list_needs_a_key(caller: httpx.AsyncClient) -> None:
    refused = await caller.get("/v1/rl/workers", headers={"authorization": "Bearer other"})
    assert refused.status_code == 401

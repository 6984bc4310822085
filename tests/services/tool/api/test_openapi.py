"""The OpenAPI document is true: generated requests never break the service, answers fit it."""

import asyncio

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, settings
from tool_server import KEY, served

from services.tool.api.app import EXECUTE_RESPONSES
from services.tool.sandbox.host.verdict import Status
from services.tool.service import ToolService
from services.tool.wire.schemas import ExecuteResult, StatusName

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize("status", list(Status))
async def test_every_status_has_an_example_that_is_valid(status: Status) -> None:
    examples = EXECUTE_RESPONSES[200]["content"]["application/json"]["examples"]
    assert ExecuteResult.model_validate(examples[status.value]["value"]).status == status.value


async def test_the_wire_names_exactly_the_statuses_there_are() -> None:
    assert set(StatusName.__args__) == {status.value for status in Status}  # type: ignore[attr-defined]


def fuzz(operation: schemathesis.APIOperation, url: str) -> None:
    """Send generated requests to one operation and check status, type and body of each answer."""

    @settings(
        max_examples=10,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def one(case: schemathesis.Case) -> None:
        checks = [
            schemathesis.checks.not_a_server_error,
            schemathesis.checks.status_code_conformance,
            schemathesis.checks.content_type_conformance,
            schemathesis.checks.response_schema_conformance,
        ]
        headers = {"Authorization": f"Bearer {KEY}"}
        case.call_and_validate(base_url=url, headers=headers, checks=checks)

    one()


async def test_generated_requests_get_documented_answers(
    app: FastAPI, service: ToolService
) -> None:
    async with served(service) as url:
        schema = schemathesis.openapi.from_dict(app.openapi())
        operations = [result.ok() for result in schema.get_all_operations()]
        assert len(operations) >= 15
        for operation in operations:
            await asyncio.to_thread(fuzz, operation, url)


async def test_what_a_body_can_do_wrong_is_documented(app: FastAPI) -> None:
    for path, operations in app.openapi()["paths"].items():
        if path not in ("/livez", "/readyz", "/metrics"):
            for operation in operations.values():
                assert {"400", "401", "408", "413", "422"} <= set(operation["responses"]), path

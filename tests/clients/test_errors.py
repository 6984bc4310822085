"""Errors cross process borders whole, and say what another attempt may expect."""

import pickle

import httpx
import pytest

from openrlhf_alp.clients.errors import (
    DeadlineExceeded,
    RequestRejected,
    ServiceUnavailable,
    Unauthorized,
    error_of,
)


@pytest.mark.parametrize("kind", [RequestRejected, Unauthorized])
def test_an_error_with_fields_can_be_pickled(kind: type[RequestRejected]) -> None:
    error = kind("wrong", status=422, code="bad", field="n")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind and str(again) == "wrong"
    assert (again.status, again.code, again.field) == (422, "bad", "n")
    lost = pickle.loads(pickle.dumps(ServiceUnavailable("gone", may_be_running=True)))
    assert (str(lost), lost.may_be_running) == ("gone", True)


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_refusals_that_another_attempt_may_overcome_carry_retry_after(status: int) -> None:
    for header, least_s in (("2.5", 2.5), ("Wed, 21 Oct 2026 07:28:00 GMT", 0.0), ("-1", 0.0)):
        response = httpx.Response(status, headers={"retry-after": header})
        error = error_of(response, "http://a")
        assert isinstance(error, ServiceUnavailable)
        assert (error.retry_after_s, error.may_be_running) == (least_s, False)


def test_other_refusals_are_not_repeated() -> None:
    for status in (400, 404, 409, 410, 422, 501):
        assert type(error_of(httpx.Response(status), "http://a")) is RequestRejected
    assert type(error_of(httpx.Response(401), "http://a")) is Unauthorized
    assert type(error_of(httpx.Response(504), "http://a")) is DeadlineExceeded

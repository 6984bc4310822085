"""The one retry loop of all clients, without a network."""

import logging

import pytest

from openrlhf_alp.clients.errors import IncompleteReply, RequestRejected, ServiceUnavailable
from openrlhf_alp.clients.fleet import Backoff, Fleet, Server

FAST = Backoff(first_s=0.001, largest_s=0.002)


class Attempts:
    """Fails as often as there are failures, then succeeds; keeps the servers it was tried on."""

    def __init__(self, *failures: Exception) -> None:
        self._failures = list(failures)
        self.hosts: list[str] = []

    async def __call__(self, server: Server, give_up_s: float) -> str:
        self.hosts.append(server.channel.url.removeprefix("http://"))
        if self._failures:
            raise self._failures.pop(0)
        return "done"


def two_servers() -> Fleet:
    return Fleet("tool", ["http://a", "http://b"], api_key="x", backoff=FAST)


@pytest.mark.parametrize(
    ("failure", "attach", "hosts"),
    [
        # Lost in mid-request: once more on the same server, but only where a retry can join.
        (ServiceUnavailable("lost", may_be_running=True), True, "aabb"),
        (IncompleteReply("cut"), True, "aabb"),
        (ServiceUnavailable("lost", may_be_running=True), False, "abab"),
        (ServiceUnavailable("refused"), True, "abab"),
    ],
)
async def test_the_next_attempt_goes_where_it_may_succeed(
    failure: Exception, attach: bool, hosts: str
) -> None:
    fleet, attempts = two_servers(), Attempts(failure, failure, failure)
    assert await fleet.call(attempts, what="x", within_s=5.0, load=1, attach=attach) == "done"
    assert "".join(attempts.hosts) == hosts
    assert [server.num_outstanding for server in fleet.servers] == [0, 0]
    await fleet.aclose()


async def test_a_pinned_call_stays_and_gives_up_after_its_attempts_with_the_last_cause() -> None:
    fleet = two_servers()
    failures = [ServiceUnavailable(f"failure {number}") for number in range(1, 4)]
    attempts = Attempts(*failures)
    with pytest.raises(ServiceUnavailable, match=r"x: gave up after 3 attempts. failure 3") as e:
        await fleet.call(attempts, what="x", within_s=5.0, only=fleet.servers[1], max_attempts=3)
    assert attempts.hosts == ["b"] * 3
    assert e.value.__cause__ is failures[-1]
    await fleet.aclose()


async def test_a_wait_that_would_pass_the_deadline_is_not_begun() -> None:
    fleet, attempts = two_servers(), Attempts(ServiceUnavailable("full", retry_after_s=60.0))
    with pytest.raises(ServiceUnavailable, match=r"gave up after 1 attempts. full"):
        await fleet.call(attempts, what="x", within_s=5.0)
    await fleet.aclose()


async def test_a_wrong_request_is_tried_once_and_costs_the_server_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    fleet = two_servers()
    attempts = Attempts(RequestRejected("wrong", status=422, code="bad", field=None))
    with pytest.raises(RequestRejected):
        await fleet.call(attempts, what="x", within_s=5.0, load=3)
    assert attempts.hosts == ["a"]
    assert {server.state for server in fleet.servers} == {"healthy"}
    assert [server.num_outstanding for server in fleet.servers] == [0, 0]
    assert not caplog.records
    await fleet.aclose()

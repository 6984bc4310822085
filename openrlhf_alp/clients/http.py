"""Time limits, waiting between attempts, and the table from a service's errors to ours."""

import random
from dataclasses import dataclass
from typing import Any

import httpx

from openrlhf_alp.clients.errors import (
    DeadlineExceeded,
    InvalidReply,
    RequestRejected,
    ServiceError,
    ServiceUnavailable,
    Unauthorized,
)

RETRYABLE = frozenset({429, 502, 503})

LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=8)
"""Of one server. Every request asks every idle connection whether it is still open: 256 of them
were most of a learner's time with 64 episodes at once. A new connection costs less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Seconds. Every call has all of them; none can wait for ever."""

    connect_s: float = 5.0
    """To open a connection."""

    read_s: float = 600.0
    """Without a byte from the server: at least the longest generation."""

    total_s: float = 1800.0
    """For one generate call with all its attempts."""

    control_s: float = 600.0
    """For one prepare, commit or status call."""

    transfer_s: float = 60.0
    """Over nccl or ipc, for the group to meet, and for each bucket. A server whose learner went
    away in mid-bucket draws no token for so long."""

    def httpx(self) -> httpx.Timeout:
        return httpx.Timeout(
            connect=self.connect_s, read=self.read_s, write=self.read_s, pool=self.total_s
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Exponential waiting with full jitter between attempts."""

    first_s: float = 0.1
    largest_s: float = 5.0

    def delay_s(self, attempt: int, retry_after: str | None) -> float:
        """Seconds before attempt number `attempt` (1 is the first retry).

        A Retry-After header sets the least; the jitter keeps clients apart.
        """
        ceiling = min(self.largest_s, self.first_s * 2 ** min(attempt - 1, 16))
        delay = random.uniform(0.0, ceiling)
        try:
            return delay + max(0.0, float(retry_after)) if retry_after else delay
        except ValueError:  # an HTTP date; our services send seconds
            return delay


def error_of(response: httpx.Response, url: str) -> ServiceError:
    """Turn a reply with status 400 or above into the exception of our tree."""
    try:
        detail: dict[str, Any] = response.json()["error"]
        code, field = str(detail["code"]), detail["field"]
        message = f"{url}: {detail['message']} Fix: {detail['fix']}"
    except (ValueError, KeyError, TypeError):
        code, field = "no_error_body", None
        message = (
            f"{url} answered {response.status_code} without our error body. Fix: check that the "
            "URL is that of a service of this project and that no proxy stands before it."
        )
    status = response.status_code
    if status == 401:
        return Unauthorized(message, status=status, code=code, field=field)
    if status == 504:
        return DeadlineExceeded(message)
    if code == "invalid_logprobs":
        return InvalidReply(message)
    if status == 429 or (status >= 500 and status != 501):
        return ServiceUnavailable(message)
    return RequestRejected(message, status=status, code=code, field=field)

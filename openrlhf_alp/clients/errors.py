"""What can go wrong between the learner and a service. Every message says the cause and the fix.

ServiceError                        anything below
|- ServiceUnavailable               no server answered; another attempt may succeed
|- DeadlineExceeded                 the server gave up at the request's own deadline
|- RequestRejected                  the request is wrong (4xx, 501); sending it again cannot help
|  `- Unauthorized                  the bearer key is missing or wrong
|- InvalidReply                     a reply that breaks the contract (lengths, NaN, no parse)
|  `- IncompleteReply               a body cut short on the way; the server has kept the whole
|- ContractMismatch                 learner and server disagree on what is served
`- WeightUpdateFailed               an update was not staged or not loaded; the old one serves
   `- UpdateUnanswered              because no server answered; one may come back
"""

from functools import partial
from typing import Any

import httpx


class ServiceError(Exception):
    """Base of everything a client of a service raises."""


class ServiceUnavailable(ServiceError):
    """No server answered: it refused, timed out, is overloaded or restarts.

    Attributes:
        retry_after_s: the shortest wait before another attempt that the server asked for.
        may_be_running: the connection was lost in mid-request, so the server may still work on it.
    """

    def __init__(
        self, message: str, *, retry_after_s: float = 0.0, may_be_running: bool = False
    ) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.may_be_running = may_be_running


class DeadlineExceeded(ServiceError):
    """The request was cancelled at its deadline; its slot on the server is free again."""


class RequestRejected(ServiceError):
    """The server refused the request as wrong.

    Attributes:
        status: HTTP status.
        code: the service's stable error code.
        field: the part of the request that is wrong, or None.
    """

    def __init__(self, message: str, *, status: int, code: str, field: str | None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.field = field

    def __reduce__(self) -> tuple[Any, ...]:
        # Ray and torch.distributed pickle errors; the default would call the class without keywords
        # and hide the cause behind a TypeError.
        make = partial(type(self), status=self.status, code=self.code, field=self.field)
        return make, self.args


class Unauthorized(RequestRejected):
    """The bearer key is missing or wrong."""


class InvalidReply(ServiceError):
    """The server answered something that must not be trained on."""


class IncompleteReply(InvalidReply):
    """The body was cut short on the way; asking again under the same id returns the whole."""

    retry_after_s = 0.0
    may_be_running = True


class ContractMismatch(ServiceError):
    """Learner and server disagree; the message lists each field with both values."""


class WeightUpdateFailed(ServiceError):
    """A weight update did not reach every server. The message names each server and its state."""


class UpdateUnanswered(WeightUpdateFailed):
    """No server answered in one phase of an update; one that is started again takes the next."""


def error_of(response: httpx.Response, url: str) -> ServiceError:
    """The exception that a reply with status 400 or above stands for."""
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
        return ServiceUnavailable(message, retry_after_s=_retry_after_s(response))
    return RequestRejected(message, status=status, code=code, field=field)


def _retry_after_s(response: httpx.Response) -> float:
    try:
        return max(0.0, float(response.headers.get("retry-after", 0.0)))
    except ValueError:  # an HTTP date, as a proxy may send; our services send seconds
        return 0.0

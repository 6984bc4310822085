"""What can go wrong between the learner and a service. Every message says cause and fix.

ServiceError                        anything below
|- ServiceUnavailable               no server answered within the retry budget
|- DeadlineExceeded                 the server gave up at the request's own deadline
|- RequestRejected                  the request is wrong (4xx, 501); sending it again cannot help
|  `- Unauthorized                  the bearer key is missing or wrong
|- InvalidReply                     a reply that breaks the contract (lengths, NaN, no parse)
|  `- IncompleteReply               a body cut short on the way; the server has kept the whole
|- ContractMismatch                 learner and server disagree on what is served
`- WeightUpdateFailed               an update was not staged or not loaded; the old one serves
"""


class ServiceError(Exception):
    """Base of everything a client of a service raises."""


class ServiceUnavailable(ServiceError):
    """No server answered: refused, timed out, overloaded or restarting, for the whole budget."""


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


class Unauthorized(RequestRejected):
    """The bearer key is missing or wrong."""


class InvalidReply(ServiceError):
    """The server answered something that must not be trained on."""


class IncompleteReply(InvalidReply):
    """The body was cut short on the way; asking again under the same id gets the whole."""


class ContractMismatch(ServiceError):
    """Learner and server disagree; the message lists each field with both values."""


class WeightUpdateFailed(ServiceError):
    """A weight update did not reach every server. The message names each server and its state."""

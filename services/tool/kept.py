"""What the tool service keeps of answers, for callers that ask again: see `common/idempotent`."""

import hashlib
import json
import sys

from services.tool.sandbox.host.verdict import Status
from services.tool.wire.schemas import CellResult, ExecuteRequest, ExecuteResult

GRACE_S = 10.0
"""Seconds that a program whose caller hung up runs on, in which a retry can join it."""

_OBJECT_BYTES = 4_000  # an answer without its texts, and its entry


def size_bytes(answer: ExecuteResult | CellResult) -> int:
    """Memory that an answer holds: its texts, which may take up to 4 bytes a character."""
    texts = [answer.stdout, answer.stderr, answer.message, *answer.files.values()]
    if isinstance(answer, CellResult) and answer.result is not None:
        texts.append(answer.result)
    return _OBJECT_BYTES + sum(map(sys.getsizeof, texts))


def digest_of(request: ExecuteRequest) -> bytes:
    """Equal for requests that mean the same."""
    # As ASCII JSON: programs may hold half surrogate pairs, which have no UTF-8.
    return hashlib.sha256(json.dumps(request.model_dump()).encode()).digest()


def is_final(answer: ExecuteResult) -> bool:
    """Whether a retry gets this answer: a sandbox that failed says that a retry runs it again."""
    return answer.status != Status.SANDBOX_ERROR

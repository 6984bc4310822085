"""What of an answer is kept, and which answers are."""

import pytest

from services.tool.kept import digest_of, is_final, size_bytes
from services.tool.wire.schemas import ExecuteRequest, ExecuteResult, Usage


def answer(stdout: str, status: str = "ok") -> ExecuteResult:
    return ExecuteResult(
        status=status,
        exit_code=0,
        signal=None,
        error=None,
        message="",
        stdout=stdout,
        stderr="",
        stdout_truncated=False,
        stderr_truncated=False,
        files={},
        missing={},
        usage=Usage(wall_ms=1.0, cpu_ms=1.0, peak_mb=1.0, queue_ms=0.0),
        isolation="full",
        request_id=None,
    )


def test_sizes_are_those_in_memory() -> None:
    # Python holds what is no Latin-1 in 2 bytes a character.
    assert size_bytes(answer("\ufffd" * 1_000_000)) - size_bytes(answer("")) == pytest.approx(
        2_000_000, rel=0.01
    )


def test_a_sandbox_that_failed_is_tried_again() -> None:
    assert is_final(answer("", "timeout"))
    assert not is_final(answer("", "sandbox_error"))


def test_requests_with_half_surrogate_pairs_have_a_digest() -> None:
    one, two = (ExecuteRequest(code=code, request_id="a") for code in ("\ud800", "\ud801"))
    assert digest_of(one) == digest_of(ExecuteRequest(code="\ud800", request_id="a"))
    assert digest_of(one) != digest_of(two)

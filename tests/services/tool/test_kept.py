"""Kept answers are bounded in bytes and seconds, all together."""

import asyncio

import pytest

from services.tool.kept import KeptAnswers, Ledger, size_bytes
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


def test_the_oldest_answers_make_room() -> None:
    kept: KeptAnswers[ExecuteResult] = KeptAnswers(keep_bytes=5 * 110_000)
    for key in range(100):
        kept.put(key, b"", answer("x" * 100_000))
    assert [key for key in range(100) if kept.get(key) is not None] == [95, 96, 97, 98, 99]
    assert kept.held_bytes <= 5 * 110_000
    for key in range(100):
        kept.drop(key)
    assert kept.held_bytes == 0


def test_an_answer_above_everything_is_not_kept_and_old_ones_go() -> None:
    kept: KeptAnswers[ExecuteResult] = KeptAnswers(keep_bytes=50_000)
    kept.put("large", b"", answer("x" * 100_000))
    assert kept.get("large") is None and kept.held_bytes == 0
    aged: KeptAnswers[ExecuteResult] = KeptAnswers(keep_bytes=50_000, keep_s=-1.0)
    aged.put("old", b"", answer(""))
    assert aged.get("old") is None and aged.held_bytes == 0


async def test_a_run_without_callers_ends_after_its_grace_and_is_forgotten() -> None:
    ledger = Ledger(KeptAnswers(keep_bytes=1_000_000), grace_s=0.05)
    request = ExecuteRequest(code="1", request_id="a")
    cancelled = asyncio.Event()

    async def forever() -> ExecuteResult:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        raise AssertionError

    caller = asyncio.create_task(ledger.run(request, forever))
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.wait_for(cancelled.wait(), 5)
    while len(ledger):
        await asyncio.sleep(0)

    async def quick() -> ExecuteResult:
        return answer("second")

    assert (await ledger.run(request, quick)).stdout == "second"


async def test_a_sandbox_that_failed_is_tried_again() -> None:
    ledger = Ledger(KeptAnswers(keep_bytes=1_000_000))
    request = ExecuteRequest(code="\ud800", request_id="a")
    statuses = iter(["sandbox_error", "ok"])

    async def work() -> ExecuteResult:
        return answer("", next(statuses))

    answers = [(await ledger.run(request, work)).status for _ in range(3)]
    assert answers == ["sandbox_error", "ok", "ok"]

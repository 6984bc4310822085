"""Kept answers are bounded in bytes and seconds; a run has at most one start for each key."""

import asyncio

import pytest

from services.common.idempotent import (
    IdempotentRuns,
    KeptAnswers,
    RequestCancelledError,
    RequestConflictError,
)


def kept_texts(keep_bytes: int, keep_s: float = 60.0) -> KeptAnswers[str]:
    return KeptAnswers(len, keep_bytes, keep_s)


def test_the_oldest_answers_make_room() -> None:
    kept = kept_texts(50)
    for key in range(100):
        kept.put(key, b"", "x" * 10)
    assert [key for key in range(100) if kept.get(key) is not None] == [95, 96, 97, 98, 99]
    assert kept.held_bytes == 50
    assert [kept.drop(key) for key in (99, 99)] == [True, False]
    for key in range(100):
        kept.drop(key)
    assert kept.held_bytes == 0


def test_an_answer_above_everything_is_not_kept_and_old_ones_go() -> None:
    kept = kept_texts(50)
    kept.put("large", b"", "x" * 51)
    assert kept.get("large") is None and kept.held_bytes == 0
    aged = kept_texts(50, keep_s=-1.0)
    aged.put("old", b"", "x")
    assert aged.get("old") is None and aged.held_bytes == 0


async def test_a_run_without_callers_ends_after_its_grace_and_is_forgotten() -> None:
    runs = IdempotentRuns(kept_texts(50), grace_s=0.05)
    cancelled = asyncio.Event()

    async def forever() -> str:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        raise AssertionError

    runs.submit("a", b"1", forever)
    caller = asyncio.create_task(runs.attach("a"))
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.wait_for(cancelled.wait(), 5)
    while len(runs):
        await asyncio.sleep(0)

    async def quick() -> str:
        return "second"

    assert runs.submit("a", b"2", quick) == "started", "another body: nothing is kept of the first"
    assert await runs.attach("a") == "second"


async def test_callers_share_one_run_and_another_body_is_refused_then_and_later() -> None:
    runs = IdempotentRuns(kept_texts(50), grace_s=60.0)
    release, ended = asyncio.Event(), []

    async def work() -> str:
        await release.wait()
        return "answer"

    started = [runs.submit("a", b"1", work, lambda task: ended.append(task.result()))]
    started.append(runs.submit("a", b"1", work))
    callers = [asyncio.create_task(runs.attach("a")) for _ in range(3)]
    for _ in range(2):
        with pytest.raises(RequestConflictError, match="'a' was used with another body"):
            runs.submit("a", b"2", work)
        release.set()
        assert [await caller for caller in callers] == ["answer"] * 3
    started.append(runs.submit("a", b"1", work))
    assert started == ["started", "attached", "replayed"]
    assert ended == ["answer"]


async def test_what_cannot_start_leaves_nothing_behind() -> None:
    runs = IdempotentRuns(kept_texts(50), grace_s=60.0)

    def full() -> None:
        raise OverflowError("full")

    with pytest.raises(OverflowError):
        runs.submit("a", b"1", full)

    async def work() -> str:
        return "x"

    assert runs.submit("a", b"2", work) == "started"
    assert await runs.attach("a") == "x"


async def test_closing_tells_the_callers() -> None:
    runs = IdempotentRuns(kept_texts(50), grace_s=60.0)

    async def forever() -> str:
        await asyncio.Event().wait()
        raise AssertionError

    runs.submit("a", b"1", forever)
    caller = asyncio.create_task(runs.attach("a"))
    await asyncio.sleep(0)
    await runs.close()
    with pytest.raises(RequestCancelledError, match="'a' was cancelled"):
        await caller


async def test_an_answer_that_is_not_final_runs_again() -> None:
    runs = IdempotentRuns(kept_texts(50), 60.0, is_final=lambda answer: answer != "failed")
    answers = iter(["failed", "fine", "never"])

    async def work() -> str:
        return next(answers)

    seen = []
    for _ in range(3):
        runs.submit("a", b"1", work)
        seen.append(await runs.attach("a"))
    assert seen == ["failed", "fine", "fine"]

import asyncio
import time
from typing import Any

import httpx
import pytest

from services.common.errors import ApiError, to_api_error
from services.common.idempotent import (
    RequestCancelledError,
    RequestConflictError,
    RequestUnknownError,
)
from services.rollout.errors import ERRORS
from services.rollout.generator import GenerateError
from services.rollout.ledger import Ledger, LedgerError, LedgerLimits
from services.rollout.service import RolloutService
from services.rollout.wire.schemas import GenerateRequest, GenerateResponse

PROMPT = [72, 101, 108, 108, 111]


def limits(**changes: Any) -> LedgerLimits:
    fields = {
        "max_pending_samples": 4,
        "keep_s": 60.0,
        "keep_bytes": 1 << 20,
        "detach_grace_s": 60.0,
    }
    return LedgerLimits(**{**fields, **changes})


def request(request_id: str = "r", **changes: Any) -> GenerateRequest:
    fields = {"request_id": request_id, "token_ids": [1], "sampling": {"max_tokens": 1}}
    return GenerateRequest.model_validate({**fields, **changes})


def answer(raised: pytest.ExceptionInfo[Exception]) -> ApiError:
    """What a caller sees of a raised error."""
    return to_api_error(raised.value, ERRORS)


class Work:
    """A run that ends when told, and counts how often it was started."""

    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.num_started = 0
        self.num_cancelled = 0

    async def __call__(self) -> GenerateResponse:
        self.num_started += 1
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        sample = {
            "token_ids": [5],
            "logprobs": [-1.0],
            "finish_reason": "length",
            "stop_reason": None,
            "spans": [],
        }
        return GenerateResponse.model_validate(
            {
                "request_id": "r",
                "samples": [sample],
                "contract_hash": "c",
                "version": 0,
                "timings": {"total_s": 0.0},
            }
        )


async def test_retries_attach_and_then_replay_without_new_work() -> None:
    ledger, work = Ledger(limits()), Work()
    ledger.submit(request(), work)
    first = asyncio.create_task(ledger.attach("r"))
    ledger.submit(request(), work)
    second = asyncio.create_task(ledger.attach("r"))
    assert await ledger.attach("r", wait_s=0.0) is None
    work.release.set()
    assert await first is await second
    ledger.submit(request(), work)
    assert await ledger.attach("r") is await first
    assert work.num_started == 1


async def test_the_same_id_with_another_body_is_a_409() -> None:
    ledger, work = Ledger(limits()), Work()
    ledger.submit(request(), work)
    for _ in range(2):
        with pytest.raises(RequestConflictError) as raised:
            ledger.submit(request(token_ids=[2]), work)
        assert (answer(raised).status_code, answer(raised).field) == (409, "request_id")
        work.release.set()
        await ledger.attach("r")


async def test_a_failed_run_is_forgotten_so_that_a_retry_works_again() -> None:
    ledger = Ledger(limits())

    async def fail() -> GenerateResponse:
        raise GenerateError("engine_dead", "Dead.")

    ledger.submit(request(), fail)
    with pytest.raises(GenerateError) as raised:
        await ledger.attach("r")
    assert raised.value.code == "engine_dead"
    work = Work()
    work.release.set()
    ledger.submit(request(), work)
    assert await ledger.attach("r") is not None
    assert work.num_started == 1


async def test_a_full_ledger_answers_429_with_retry_after_and_frees_up() -> None:
    ledger, work = Ledger(limits()), Work()
    ledger.submit(request("a", n=3), work)
    with pytest.raises(LedgerError) as raised:
        ledger.submit(request("b", n=2), work)
    assert answer(raised).status_code == 429
    assert int((answer(raised).headers or {})["Retry-After"]) >= 1
    ledger.submit(request("c", n=1), work)
    ledger.submit(request("a", n=3), work)
    assert ledger.pending_samples == 4
    work.release.set()
    await ledger.attach("a")
    await ledger.attach("c")
    assert ledger.pending_samples == 0
    ledger.submit(request("b", n=2), work)
    assert await ledger.attach("b") is not None


async def test_more_samples_than_can_ever_fit_are_a_422() -> None:
    with pytest.raises(LedgerError) as raised:
        Ledger(limits()).submit(request(n=5), Work())
    assert (answer(raised).status_code, answer(raised).field) == (422, "n")


async def test_the_last_caller_leaving_starts_the_grace_period() -> None:
    ledger, work = Ledger(limits(detach_grace_s=0.0)), Work()
    ledger.submit(request(), work)
    one, two = (asyncio.create_task(ledger.attach("r")) for _ in range(2))
    await asyncio.sleep(0)
    one.cancel()
    await asyncio.wait([one])
    assert work.num_cancelled == 0, "the other caller still waits"
    two.cancel()
    await asyncio.wait([two])
    while ledger.pending_samples:
        await asyncio.sleep(0)
    assert work.num_cancelled == 1


async def test_a_retry_within_the_grace_period_saves_the_run() -> None:
    ledger, work = Ledger(limits()), Work()
    ledger.submit(request(), work)
    caller = asyncio.create_task(ledger.attach("r"))
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.wait([caller])
    ledger.submit(request(), work)
    work.release.set()
    assert await ledger.attach("r") is not None
    assert (work.num_started, work.num_cancelled) == (1, 0)


async def test_forget_cancels_at_once_and_tells_the_callers() -> None:
    ledger, work = Ledger(limits()), Work()
    ledger.submit(request(), work)
    caller = asyncio.create_task(ledger.attach("r"))
    await asyncio.sleep(0)
    assert ledger.forget("r") == "cancelled"
    with pytest.raises(RequestCancelledError) as raised:
        await caller
    assert answer(raised).status_code == 410
    assert ledger.pending_samples == 0
    assert ledger.forget("r") == "unknown"
    work.release.set()
    ledger.submit(request(), work)
    await ledger.attach("r")
    assert ledger.forget("r") == "dropped"


async def test_kept_replies_expire_by_time_and_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One kept sample of one token is estimated at 80 + 2000 bytes; 5000 bytes hold two."""
    ledger, work = Ledger(limits(keep_bytes=5_000)), Work()
    work.release.set()
    for name in ("a", "b", "c"):
        ledger.submit(request(name), work)
        await ledger.attach(name)
    assert ledger.kept_bytes == 2 * 2_080
    with pytest.raises(RequestUnknownError) as raised:
        await ledger.attach("a")
    assert answer(raised).status_code == 404
    assert await ledger.attach("c") is not None
    later_s = time.monotonic() + 61.0
    monkeypatch.setattr(time, "monotonic", lambda: later_s)
    with pytest.raises(RequestUnknownError):
        await ledger.attach("c")
    assert ledger.kept_bytes == 0


def body(request_id: str, **changes: Any) -> dict[str, Any]:
    sampling = {"max_tokens": 6}
    return {"request_id": request_id, "token_ids": PROMPT, "sampling": sampling, **changes}


async def test_over_http_a_dropped_connection_is_picked_up_by_id(
    http: httpx.AsyncClient, service: RolloutService
) -> None:
    await service.engine.pause("keep")
    first = asyncio.create_task(http.post("/v1/generate", json=body("x", n=2)))
    while service.versions.num_running < 2:
        await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    running = await http.get("/v1/generate/x")
    assert (running.status_code, running.json()["state"]) == (202, "running")
    await service.engine.resume()
    got = await http.get("/v1/generate/x", params={"wait_s": 30})
    again = await http.post("/v1/generate", json=body("x", n=2))
    assert got.status_code == again.status_code == 200
    assert got.json() == again.json()
    assert service.engine.num_jobs == 2  # type: ignore[attr-defined]


async def test_over_http_delete_frees_the_slot(
    http: httpx.AsyncClient, service: RolloutService
) -> None:
    await service.engine.pause("keep")
    waiting = asyncio.create_task(http.post("/v1/generate", json=body("x", n=2)))
    while service.versions.num_running < 2:
        await asyncio.sleep(0)
    assert (await http.delete("/v1/generate/x")).json()["state"] == "cancelled"
    assert (await waiting).status_code == 410
    assert service.versions.num_running == 0
    await service.engine.resume()


async def test_over_http_an_absolute_deadline_is_kept(
    http: httpx.AsyncClient, service: RolloutService
) -> None:
    past = await http.post(
        "/v1/generate", json=body("x"), headers={"x-request-deadline": str(time.time() - 1)}
    )
    assert (past.status_code, past.json()["error"]["field"]) == (504, "x-request-deadline")
    for wrong in ("soon", "nan", "inf"):
        refused = await http.post(
            "/v1/generate", json=body("x"), headers={"x-request-deadline": wrong}
        )
        assert (refused.status_code, refused.json()["error"]["field"]) == (
            422,
            "x-request-deadline",
        )
    await service.engine.pause("keep")
    soon = await http.post(
        "/v1/generate", json=body("x"), headers={"x-request-deadline": str(time.time() + 0.05)}
    )
    assert soon.status_code == 504
    assert service.versions.num_running == 0


async def test_json_and_msgpack_of_one_request_are_the_same_request(
    http: httpx.AsyncClient,
) -> None:
    import msgpack

    first = await http.post("/v1/generate", json=body("x"))
    packed = await http.post(
        "/v1/generate",
        content=msgpack.packb(body("x")),
        headers={"content-type": "application/msgpack"},
    )
    assert packed.json() == first.json()


async def test_prometheus_sees_what_is_pending_and_kept(
    http: httpx.AsyncClient, service: RolloutService
) -> None:
    async def gauge(name: str) -> float:
        lines = (await http.get("/metrics")).text.splitlines()
        (line,) = [line for line in lines if line.startswith(f"openrlhf_alp_rollout_{name} ")]
        return float(line.rpartition(" ")[2])

    await service.engine.pause("keep")
    call = asyncio.create_task(http.post("/v1/generate", json=body("x")))
    while service.versions.num_running == 0:
        await asyncio.sleep(0)
    assert await gauge("pending_samples") == service.ledger.pending_samples > 0
    await service.engine.resume()
    assert (await call).status_code == 200
    assert await gauge("pending_samples") == 0
    assert await gauge("kept_bytes") == service.ledger.kept_bytes > 0

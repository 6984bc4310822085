"""Runs an evaluation into a folder: ask what is missing, grade everything, write the numbers."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from inspect_ai import eval_async
from inspect_ai.model import Model, get_model
from inspect_ai.util import display_type

from openrlhf_alp.clients.contract import LearnerExpectation, check_contract
from openrlhf_alp.clients.control import ControlClient
from openrlhf_alp.clients.errors import ContractMismatch, ServiceError, ServiceUnavailable
from openrlhf_alp.data.sources import DataError
from openrlhf_alp.evaluate.folder import (
    RESULTS_FILE,
    Identity,
    RunFolder,
    write_json,
    write_lines,
    write_text,
)
from openrlhf_alp.evaluate.grading import Grader, check_references, compare_graders
from openrlhf_alp.evaluate.model import PROVIDER, RolloutModel
from openrlhf_alp.evaluate.player import Plan, Player, Prompts, check_template
from openrlhf_alp.evaluate.results import Results, average_over_suites, markdown, summarise
from openrlhf_alp.evaluate.store import StoreError
from openrlhf_alp.evaluate.suites import LoadedSuite
from openrlhf_alp.evaluate.task import Session, build_task
from openrlhf_alp.rollouts.runners import tool_client
from services.common.wire import API_KEY_VARIABLE, TOOL_KEY_VARIABLE
from services.rollout.wire.fingerprint import chat_template_hash, tokenizer_hash
from services.rollout.wire.schemas import Contract

_READY_S = 120.0
_NOTICE_S = 3.0
"""Seconds after which a service that does not answer is named; it may still load its model."""
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class EvaluationFailed(DataError):
    """The run could not be finished; what was generated is stored."""


class Progress(Protocol):
    """Who is told how far a run is."""

    def suite(self, title: str, *, done: int, total: int) -> Callable[[], None]:
        """Begins a suite; returns what to call after each answer."""
        ...

    def say(self, stage: str, text: str) -> None:
        """One line for the reader."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What to evaluate, and where."""

    output: Path
    suites: Sequence[LoadedSuite]
    n: int
    plan: Plan
    model: str
    """Name for tables and logs."""

    tokenizer: Any
    tokenizer_flag: str
    """The flag and value that gave the tokenizer, for messages."""

    rollout_urls: Sequence[str]
    num_workers: int
    """Processes that grade."""

    concurrency: int
    """Answers that are played at the same time."""

    request_timeout_s: float
    check_services: Callable[[], None] = lambda: None


def run_evaluation(
    run: Run, progress: Progress, *, start: Callable[[Run], Run] = lambda run: run
) -> Results:
    """Plays what the folder lacks, grades all of it and writes the results.

    Args:
        start: starts the services that the run lacks and returns it with their URLs. It is called
            once everything is right that can be looked at without them: they take a minute.

    Raises:
        DataError: a suite, the folder or the tokenizer is not right, or answers are missing at the
            end; the message says what is kept.
        ServiceError: a service refuses the run or is gone.
    """
    folder = RunFolder(run.output)
    grader = Grader(num_workers=run.num_workers)
    try:
        check_template(run.plan, run.tokenizer, named=run.tokenizer_flag)
        folder.open()
        run = replace(run, suites=[*folder.others(run.suites), *run.suites])
        for loaded in run.suites:
            check_references(loaded, grader)
        run = start(run)
        contract = asyncio.run(_contract(run, progress))
        prompts = {loaded.name: _prompts(run, loaded, contract, progress) for loaded in run.suites}
        identity = _identity(run, contract)
        run_id = folder.begin(identity, run.suites, n=run.n)
        header = {**folder.described(), "model": run.model}
        sessions = [
            _session(
                folder, loaded, grader, progress, n=run.n, run=run, prompts=prompts[loaded.name]
            )
            for loaded in run.suites
        ]
        asyncio.run(_until_stopped(_play(run, folder, sessions, header, run_id)))
        return _finish(folder, sessions, header, run.n)
    finally:
        grader.close()
        folder.release()


def regrade(path: Path, *, num_workers: int, progress: Progress) -> Results:
    """Grades the stored answers of a run again, without any service.

    Raises:
        DataError: the folder is no run, or lacks answers.
    """
    folder = RunFolder(path)
    header = folder.described()
    folder.lock()
    grader = Grader(num_workers=num_workers)
    try:
        n = header["n"]
        sessions = [_session(folder, loaded, grader, progress, n=n) for loaded in folder.suites()]
        for session in sessions:
            check_references(session.loaded, grader)
            session.store.check_coverage(_keys(session.loaded, n))
        asyncio.run(_log(folder, sessions, header, n=n, model=None, concurrency=num_workers * 8))
        return _finish(folder, sessions, header, n)
    finally:
        grader.close()
        folder.release()


def differences_of_graders(path: Path, *, num_workers: int) -> dict[str, Any]:
    """Grades every stored answer with math-verify alone too; writes and returns where they differ.

    Raises:
        DataError: the folder is no run, or lacks answers.
    """
    folder = RunFolder(path)
    n = folder.described()["n"]
    folder.lock()
    found: dict[str, Any] = {}
    grader = Grader(num_workers=num_workers)
    try:
        for loaded in folder.suites():
            store = folder.store(loaded.name)
            keys = _keys(loaded, n)
            store.check_coverage(keys)
            answers = [answer for key in keys if (answer := store.get(key))]
            by_id = {problem.id: problem for problem in loaded.problems}
            pairs = [(by_id[answer.problem_id], answer.response) for answer in answers]
            grades = asyncio.run(grader.grade_all(pairs))
            differing = compare_graders(loaded.problems, answers, grades, workers=num_workers)
            found[loaded.name] = {
                "num_answers": len(answers),
                "differences": [one.to_json() for one in differing],
            }
    finally:
        grader.close()
        folder.release()
    write_json(path / "grader_differences.json", found)
    return found


async def _until_stopped(work: Coroutine[Any, Any, None]) -> None:
    """Runs `work`; a stop signal cancels it, and then does what it does outside of a loop.

    An exception that a signal handler raises within a loop ends some task, and Inspect would take
    it for the error of a sample.
    """
    if threading.current_thread() is not threading.main_thread():
        return await work
    loop, running = asyncio.get_running_loop(), asyncio.ensure_future(work)
    received: list[int] = []

    def stop(signum: int) -> None:
        received.append(signum)
        running.cancel()

    before = {signum: signal.getsignal(signum) for signum in _STOP_SIGNALS}
    for signum in before:
        loop.add_signal_handler(signum, stop, signum)
    try:
        await running
    except (asyncio.CancelledError, Exception):
        if not received:
            raise
    finally:
        for signum, handler in before.items():
            loop.remove_signal_handler(signum)
            signal.signal(signum, handler)
    if received:
        signal.raise_signal(received[0])


async def _contract(run: Run, progress: Progress) -> Contract:
    """The contract of the servers, which must serve what this tokenizer and plan ask for."""
    key = os.environ.get(API_KEY_VARIABLE, "")
    async with ControlClient(run.rollout_urls, api_key=key) as control:
        try:
            await control.wait_ready(_NOTICE_S)
        except ServiceUnavailable as error:
            progress.say("waiting", f"up to {_READY_S:.0f} s. {error}")
            await control.wait_ready(_READY_S)
        contracts = await control.contracts()
    if len({contract.digest for contract in contracts}) > 1:
        named = ", ".join(
            f"{url} {contract.digest[:12]}"
            for url, contract in zip(run.rollout_urls, contracts, strict=True)
        )
        raise ServiceError(
            f"The rollout services serve different weights ({named}), and a number would belong "
            "to none of them. Fix: start all of them from the same model folder."
        )
    expected = LearnerExpectation(
        tokenizer_hash=tokenizer_hash(run.tokenizer),
        chat_template_hash=chat_template_hash(run.tokenizer),
    )
    try:
        check_contract(contracts[0], expected)
    except ContractMismatch as error:
        raise ContractMismatch(
            f"{run.tokenizer_flag} is not that of the services. {error}"
        ) from error
    return contracts[0]


def _prompts(run: Run, loaded: LoadedSuite, contract: Contract, progress: Progress) -> Prompts:
    prompts = Prompts(
        loaded,
        run.plan,
        run.tokenizer,
        named=run.tokenizer_flag,
        max_length=contract.max_model_len,
    )
    if prompts.num_cut:
        progress.say(
            "note",
            f"{prompts.num_cut} of {len(loaded.problems)} prompts of {loaded.title} leave less "
            f"than --max_new_tokens {run.plan.max_new_tokens} below the service's max_model_len "
            f"{contract.max_model_len}; their answers are cut earlier",
        )
    return prompts


def _identity(run: Run, contract: Contract) -> Identity:
    return Identity(
        model=run.model,
        weights_digest=contract.digest,
        weights_version=contract.version,
        contract_hash=contract.contract_hash,
        tokenizer_hash=contract.tokenizer_hash,
        plan=run.plan.to_json(),
        suites={loaded.name: loaded.digest for loaded in run.suites},
    )


def _session(
    folder: RunFolder,
    loaded: LoadedSuite,
    grader: Grader,
    progress: Progress,
    *,
    n: int,
    run: Run | None = None,
    prompts: Prompts | None = None,
) -> Session:
    store = folder.store(loaded.name)
    if store.num_broken:
        progress.say(
            "note",
            f"{store.num_broken} half-written answers in {store.path} are asked again; the broken "
            f"lines are in {store.path.name}.broken",
        )
    keys = _keys(loaded, n)
    done = sum(store.get(key) is not None for key in keys) if run else 0
    return Session(
        loaded=loaded,
        store=store,
        grader=grader,
        player=None,
        prompts=prompts,
        check_services=run.check_services if run else lambda: None,
        begin=lambda: progress.suite(loaded.title, done=done, total=len(keys)),
        counts_stored=run is None,
    )


async def _play(
    run: Run, folder: RunFolder, sessions: Sequence[Session], header: Results, run_id: str
) -> None:
    """Generates what is missing, suite by suite, and grades all of it."""
    model = get_model(
        f"{PROVIDER}/{Path(run.model).name}",
        memoize=False,  # a client of an earlier event loop cannot be used again
        urls=list(run.rollout_urls),
        tokenizer=run.tokenizer,
        request_timeout_s=run.request_timeout_s,
    )
    assert isinstance(model.api, RolloutModel)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(model.api.aclose)
        tools = None
        if run.plan.tool is not None:
            tools = tool_client(run.plan.tool, os.environ.get(TOOL_KEY_VARIABLE, ""))
            await stack.enter_async_context(tools)
        for session in sessions:
            session.player = Player(
                run_id=run_id,
                plan=run.plan,
                generate=model.api.complete,
                tokenizer=run.tokenizer,
                tool_client=tools,
            )
        await _log(folder, sessions, header, n=run.n, model=model, concurrency=run.concurrency)


async def _log(
    folder: RunFolder,
    sessions: Sequence[Session],
    header: Results,
    *,
    n: int,
    model: Model | None,
    concurrency: int,
) -> None:
    """Lets Inspect run every suite; it writes one log each."""
    # Inspect's own display would take the terminal. Asking for the type makes it read the variable.
    os.environ.setdefault("INSPECT_DISPLAY", "none")
    display_type()
    written: set[Path] = set()
    for session in sessions:
        # Names of two suites may be one in Inspect's file names.
        before = set(_logs_of(folder, session)) - written
        task = build_task(session, n=n, metadata={**header, "origin": session.loaded.origin})
        session.start()
        (log,) = await eval_async(
            task,
            model=model,
            log_dir=str(folder.logs),
            max_samples=concurrency,
            # Half of the time of a run of stored answers, for a view of samples while they run.
            log_realtime=False,
            score_display=False,
            ctl_server=False,
        )
        if session.failure is not None:
            raise session.failure
        if log.status != "success":
            error = log.error.message if log.error else log.status
            raise EvaluationFailed(
                f"{session.loaded.title} stopped: {error}. The {len(session.store)} answers so far "
                "are stored. Fix: remove the cause, then run the same command again; it continues "
                "there"
            )
        for path in before:
            # The log of an earlier start holds a part of the same answers, maybe half-written.
            path.unlink(missing_ok=True)
        written |= set(_logs_of(folder, session))


def _logs_of(folder: RunFolder, session: Session) -> list[Path]:
    # The name of a task in Inspect's file names has dashes for underscores.
    task = session.loaded.name.replace("_", "-")
    return list(folder.logs.glob(f"*_{task}_*.eval"))


def _finish(folder: RunFolder, sessions: Sequence[Session], header: Results, n: int) -> Results:
    lost = {key: why for session in sessions for key, why in session.lost.items()}
    if lost:
        (problem, sample), why = next(iter(lost.items()))
        raise EvaluationFailed(
            f"{len(lost)} answers were lost, for example answer {sample} of {problem}: {why}. All "
            "others are stored. Fix: run the same command again; it asks only for these"
        )
    suites = []
    for session in sessions:
        keys = _keys(session.loaded, n)
        session.store.check_coverage(keys)
        missing = set(keys) - session.grades.keys()
        if missing or len(session.grades) != len(keys):
            raise StoreError(f"{session.loaded.title}: {len(missing)} answers were not graded")
        answers = [answer for key in keys if (answer := session.store.get(key))]
        grades = {key: session.grades[key] for key in keys}
        suites.append(summarise(session.loaded, answers, grades, n=n))
        folder.write_grades(session.loaded.name, grades)
    results = {**header, "n": n, "suites": suites, "average": average_over_suites(suites)}
    write_lines(
        folder.path / "ungraded.jsonl",
        ({"suite": suite["suite"], **one} for suite in suites for one in suite["ungraded"]),
    )
    write_text(folder.path / "results.md", markdown(results))
    write_json(folder.path / RESULTS_FILE, results)
    return results


def _keys(loaded: LoadedSuite, n: int) -> list[tuple[str, int]]:
    return [(problem.id, sample) for problem in loaded.problems for sample in range(n)]

"""A tiny policy that half knows five sums, behind real services on the Hugging Face engine."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn

from benchmarks.policies.tiny_policy import save_tiny_policy
from openrlhf_alp.evaluate.player import Plan
from openrlhf_alp.evaluate.run import Run
from openrlhf_alp.evaluate.suites import Suite, load_suite
from services.common.serve import bind_socket, bound_url, server_config
from services.rollout.api.app import create_app
from services.rollout.engines.hf_engine import HfEngine
from services.rollout.model_folder import read_model_folder
from services.rollout.service import RolloutService, build_service
from services.rollout.settings import FaultPlan, RolloutSettings

torch.set_num_threads(1)

KEY = "key-of-a-test"
SAID = {"1 + 2": "3", "2 + 2": "5", "3 + 2": "5", "4 + 2": "6", "5 + 2": "9"}
"""What the policy says to "What is 1 + 2?", mostly."""

LABELS = ("3", "4", "5", "6", "7")


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Learnt until it is right most of the time, so that answers of one problem differ."""
    dialogues = [
        (f"user: What is {asked}?\nassistant: ", f"\\boxed{{{said}}}<eos>")
        for asked, said in SAID.items()
    ]
    return save_tiny_policy(tmp_path_factory.mktemp("policy"), dialogues, good_loss=0.15)


@pytest.fixture
def own_file(tmp_path: Path) -> Path:
    """Five problems in a user's own fields."""
    rows = [
        {"q": f"What is {asked}?", "a": label, "kind": "easy" if index < 3 else "hard"}
        for index, (asked, label) in enumerate(zip(SAID, LABELS, strict=True))
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Servers:
    """Rollout services in a thread of their own, each behind a real socket."""

    def __init__(self, policy: Path, weights: Path) -> None:
        self._policy, self._weights = policy, weights
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._running: list[tuple[uvicorn.Server, Any, RolloutService]] = []

    @property
    def num_jobs(self) -> int:
        """Answers that the engines have ever begun."""
        return sum(service.engine.num_jobs for _, _, service in self._running)

    def start(self, faults: FaultPlan | None = None, model: Path | None = None) -> str:
        """One more service; returns its URL."""
        if not self._thread.is_alive():
            self._thread.start()
        settings = RolloutSettings(model=model or self._policy, engine="hf", dtype="float32")
        folder = read_model_folder(settings)
        faulty = settings.model_copy(update={"faults": faults or FaultPlan()})
        weights = self._weights / str(len(self._running))
        weights.mkdir(parents=True)
        service = build_service(HfEngine.load(folder, faulty), folder, settings, weights)
        sock = bind_socket("127.0.0.1", 0)
        app = create_app(service, settings, api_key=KEY, admin_key=KEY)
        server = uvicorn.Server(server_config(app))
        server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        served = asyncio.run_coroutine_threadsafe(_serve(server, sock), self._loop)
        self._running.append((server, served, service))
        return bound_url(sock)

    def stop(self) -> None:
        for server, served, service in self._running:
            server.should_exit = True
            served.result(timeout=30)
            asyncio.run_coroutine_threadsafe(service.close(), self._loop).result(timeout=30)
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=30)
        self._loop.close()


async def _serve(server: uvicorn.Server, sock: Any) -> None:
    with contextlib.closing(sock):
        # Without uvicorn's signal handlers, which only a main thread may set.
        await server._serve(sockets=[sock])


@pytest.fixture
def servers(policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Servers]:
    monkeypatch.setenv("OPENRLHF_ALP_ROLLOUT_API_KEY", KEY)
    running = Servers(policy, tmp_path / "weights")
    yield running
    running.stop()
    # What Inspect leaves to the garbage collector warns here, where the test says to ignore it, and
    # not in a test that comes later.
    gc.collect()


class Heard:
    """Remembers what a run tells its reader."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.counts: list[tuple[str, int, int]] = []
        self.num_answers = 0
        self.after_answer: Callable[[int], None] = lambda num: None

    def suite(self, title: str, *, done: int, total: int) -> Callable[[], None]:
        self.counts.append((title, done, total))

        def on_answer() -> None:
            self.num_answers += 1
            self.after_answer(self.num_answers)

        return on_answer

    def say(self, stage: str, text: str) -> None:
        self.lines.append(f"{stage} {text}")


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def make_run(policy: Path, own_file: Path, tmp_path: Path) -> Callable[..., Run]:
    """A run of `n` answers to the five problems."""
    from transformers import AutoTokenizer

    suite = Suite(
        name="own",
        title="Own",
        source=str(own_file),
        problem=("q",),
        label=("a",),
        subject=("kind",),
    )

    def make(urls: list[str], *, n: int = 4, temperature: float = 1.0, **changes: Any) -> Run:
        plan = Plan(
            template="chat-bare",
            temperature=temperature,
            top_p=1.0,
            top_k=0,
            max_new_tokens=16,
            seed=0,
        )
        values: dict[str, Any] = {
            "output": tmp_path / "run",
            "suites": [load_suite(suite, data_dir=None)],
            "n": n,
            "plan": plan,
            "model": str(policy),
            "tokenizer": AutoTokenizer.from_pretrained(policy),
            "tokenizer_flag": f"--tokenizer {policy}",
            "rollout_urls": urls,
            "num_workers": 1,
            "concurrency": 8,
            "request_timeout_s": 60.0,
        }
        return Run(**{**values, **changes})

    return make

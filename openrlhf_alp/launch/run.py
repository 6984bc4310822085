"""The demo itself, stage by stage.

prepare --> [tool service, warm-up] --> rollout service --> accuracy before --> training
        --> accuracy after --> table, [transcripts], plots
"""

import json
import math
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from openrlhf_alp.cli.demo import DemoConfig
from openrlhf_alp.clients.errors import ServiceError
from openrlhf_alp.clients.keys import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE, TOOL_KEY_VARIABLE
from openrlhf_alp.data.smollm2 import ModelPackageMissingError
from openrlhf_alp.data.tasks import Question, repeat_rows, write_rows
from openrlhf_alp.launch.accuracy import Accuracy, Services, measure_accuracy
from openrlhf_alp.launch.folder import RunFolderError, find_model, open_run_folder
from openrlhf_alp.launch.processes import (
    Child,
    ProcessFailedError,
    ProcessGuard,
    StopRequested,
)
from openrlhf_alp.launch.recipe import (
    PROMPTS_PER_STEP,
    TOOL,
    WARM_UP_STEPS,
    Recipe,
    service_command,
    tool_command,
    train_command,
    warm_up_command,
)
from openrlhf_alp.launch.task import PRODUCTS, SUMS
from openrlhf_alp.launch.view import DemoView, reward_at_edges
from openrlhf_alp.report.metrics import MetricsFileError, MetricsFollower, StepMetrics
from openrlhf_alp.report.plots import write_plots

_SERVICE_READY_S = 600.0
_SERVICE_GRACE_S = 30.0
_TRAIN_GRACE_S = 15.0
_POLL_S = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoCommands:
    """How the processes are started; a test puts its own programs here."""

    service: Callable[..., list[str]] = service_command
    train: Callable[[Recipe], list[str]] = train_command
    tool: Callable[..., list[str]] = tool_command
    warm_up: Callable[..., list[str]] = warm_up_command


def run_demo(config: DemoConfig, view: DemoView, commands: DemoCommands | None = None) -> int:
    """Runs the demo; every process it started is gone when it returns.

    Returns:
        0, or 1 when something failed, 2 when a folder or package is not right, or 128 + the number
        of the signal that stopped it.
    """
    started_s = time.monotonic()
    try:
        with ProcessGuard() as guard:
            demo = _Demo(config, view, guard, commands or DemoCommands())
            demo.run()
    except (RunFolderError, ModelPackageMissingError) as error:
        view.error(str(error))
        return 2
    except (ProcessFailedError, ServiceError, MetricsFileError, OSError) as error:
        view.error(str(error))
        return 1
    except StopRequested as stop:
        view.say("stopped", f"by {stop}; every process of the demo has been ended")
        return stop.exit_status
    view.say("done", f"in {(time.monotonic() - started_s) / 60:.1f} minutes")
    return 0


class _Demo:
    """One run. `run` is the table of contents; each stage is a method."""

    def __init__(
        self, config: DemoConfig, view: DemoView, guard: ProcessGuard, commands: DemoCommands
    ) -> None:
        self._config = config
        self._view = view
        self._guard = guard
        self._commands = commands
        self._task = PRODUCTS if config.tir else SUMS
        variables = (API_KEY_VARIABLE, ADMIN_KEY_VARIABLE, TOOL_KEY_VARIABLE)
        self._keys = {name: secrets.token_urlsafe(32) for name in variables}
        self._services: list[Child] = []
        self._tool_url: str | None = None

    def run(self) -> None:
        self._model = find_model(self._config.model, say=lambda line: self._view.say("model", line))
        self._view.say("model", str(self._model))
        self._folder = open_run_folder(
            self._config.output,
            settings={**asdict(self._config), "output": str(self._config.output)},
            overwrite=self._config.overwrite,
            say=lambda line: self._view.say("folder", line),
        )
        test = self._write_task()
        if self._task.uses_tool:
            self._start_tool()
            self._warm_up()
        self._start_rollouts()
        before = self._measure("before", test)
        steps = self._train()
        after = self._measure("after", test)
        self._report(test, before, after, steps)

    def _write_task(self) -> Sequence[Question]:
        split = self._task.split(self._config.seed)
        task = self._folder / "task"
        task.mkdir()
        self._train_data = task / "train.jsonl"
        # As many rows as the steps read: the run then ends after exactly this many steps.
        num_rows = self._config.steps * PROMPTS_PER_STEP
        write_rows(
            self._train_data, repeat_rows(split.train, count=num_rows, seed=self._config.seed)
        )
        write_rows(task / "test.jsonl", split.test)
        self._view.say(
            "task",
            f'"{split.test[0].question}" and the like: {len(split.train)} questions to train on, '
            f"{len(split.test)} held out",
        )
        return split.test

    def _start_rollouts(self) -> None:
        url_file = self._folder / "rollout.url"
        command = self._commands.service(
            model=self._model, url_file=url_file, seed=self._config.seed
        )
        self._rollout_url = self._start_service("The rollout service", command, url_file)

    def _start_tool(self) -> None:
        url_file = self._folder / "tool.url"
        command = self._commands.tool(url_file=url_file)
        self._tool_url = self._start_service("The tool service", command, url_file)

    def _start_service(self, name: str, command: list[str], url_file: Path) -> str:
        started_s = time.monotonic()
        service = self._guard.start(
            name,
            command,
            log=url_file.with_suffix(".log"),
            environment=self._environment(),
            grace_s=_SERVICE_GRACE_S,
        )
        self._services.append(service)
        with self._view.waiting(f"Starting {name.lower()} (log: {service.log})"):
            url = self._wait_for_url(service, url_file)
        seconds = time.monotonic() - started_s
        self._view.say(
            "service",
            f"{name.lower()} is ready at {url} after {seconds:.0f} s (log: {service.log})",
        )
        return url

    def _wait_for_url(self, service: Child, url_file: Path) -> str:
        """A service writes its URL once it accepts connections, which is after loading."""
        give_up_s = time.monotonic() + _SERVICE_READY_S
        while not url_file.exists():
            self._check_services()
            if time.monotonic() > give_up_s:
                raise service.failure()
            time.sleep(_POLL_S)
        return url_file.read_text(encoding="utf-8").strip()

    def _check_services(self) -> None:
        for service in self._services:
            if not service.is_running:
                raise service.failure()

    def _warm_up(self) -> None:
        """Not reinforcement learning, and said so."""
        warm = self._folder / "warm-model"
        started_s = time.monotonic()
        child = self._guard.start(
            "The warm-up",
            self._commands.warm_up(model=self._model, output=warm, seed=self._config.seed),
            log=self._folder / "warmup.log",
            environment=self._environment(),
            grace_s=_TRAIN_GRACE_S,
        )
        with self._view.waiting(f"Supervised warm-up (log: {child.log})"):
            self._guard.wait(child)
        self._model = warm
        self._view.say(
            "warm-up",
            f"{WARM_UP_STEPS} supervised steps in {time.monotonic() - started_s:.0f} s show what a "
            "tool call looks like, and twice as often a wrong guess; what pays is yet to be learnt",
        )

    def _measure(self, name: str, test: Sequence[Question]) -> Accuracy:
        with self._view.waiting(f"Asking the {len(test)} held-out questions"):
            accuracy = measure_accuracy(
                test,
                model=self._model,
                services=Services(
                    rollout_url=self._rollout_url,
                    rollout_key=self._keys[API_KEY_VARIABLE],
                    tool=replace(TOOL, urls=(self._tool_url,) if self._tool_url else ()),
                    tool_key=self._keys[TOOL_KEY_VARIABLE],
                ),
                max_tokens=self._task.max_new_tokens,
                seed=self._config.seed,
                check_services=self._check_services,
            )
        self._view.say(
            name,
            f"held-out {self._task.noun} right: {accuracy.greedy:.0%} greedy, "
            f"{accuracy.sampled:.0%} at temperature 1",
        )
        return accuracy

    def _train(self) -> list[StepMetrics]:
        recipe = Recipe(
            model=self._model,
            train_data=self._train_data,
            run_folder=self._folder,
            service_url=self._rollout_url,
            method=self._config.method,
            seed=self._config.seed,
            max_new_tokens=self._task.max_new_tokens,
            tool_url=self._tool_url,
        )
        train = self._guard.start(
            "Training",
            self._commands.train(recipe),
            log=self._folder / "train.log",
            environment=self._environment(),
            grace_s=_TRAIN_GRACE_S,
        )
        self._view.say("training", f"starting Ray and DeepSpeed (log: {train.log})")
        steps = self._follow(train)
        self._guard.wait(train)
        if len(steps) != self._config.steps:
            self._view.say(
                "note",
                f"{len(steps)} of {self._config.steps} steps were made: groups of answers were "
                f"dropped or skipped, see {train.log}",
            )
        return steps

    def _follow(self, train: Child) -> list[StepMetrics]:
        """Shows each step as it is logged, until training ends or the service dies."""
        follower = MetricsFollower(self._folder / "metrics.jsonl")
        steps: list[StepMetrics] = []
        with self._view.training(self._config.steps) as on_step:
            while True:
                # Asked before reading: what is logged just before the end is then still read.
                is_running = train.is_running
                for step in follower.new_steps():
                    steps.append(step)
                    on_step(step)
                if not is_running:
                    return steps
                self._check_services()
                time.sleep(_POLL_S)

    def _report(
        self,
        test: Sequence[Question],
        before: Accuracy,
        after: Accuracy,
        steps: Sequence[StepMetrics],
    ) -> None:
        title = f"{self._config.method} on {self._task.noun}, seed {self._config.seed}"
        plots = write_plots(steps, self._folder, title=title)
        edges = reward_at_edges(steps)
        summary = {
            "steps": len(steps),
            "before": _numbers(before),
            "after": _numbers(after),
            "reward_first_steps": edges and edges[0],
            "reward_last_steps": edges and edges[1],
        }
        (self._folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        self._view.results(self._task.noun, test, before, after, steps)
        if self._task.uses_tool:
            self._view.transcript("one episode before", before.greedy_episodes[0])
            self._view.transcript("the same question after", after.greedy_episodes[0])
        self._view.say("plots", " and ".join(map(str, plots)))
        self._view.say("curves", f"tensorboard --logdir {self._folder / 'tensorboard'}")

    def _environment(self) -> dict[str, str]:
        """Keys reach the processes by environment: a command line is readable by every user."""
        return {
            **self._keys,
            "PYTHONUNBUFFERED": "1",
            # Everything is on this disk; without these a missing network costs minutes of retries.
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
        }


def _numbers(accuracy: Accuracy) -> dict[str, float | None]:
    shares = {"greedy": accuracy.greedy, "temperature_1": accuracy.sampled}
    return {name: None if math.isnan(share) else share for name, share in shares.items()}

"""The demo, stage by stage.

prepare --> [tool service, warm-up] --> rollout service --> accuracy before --> training
        --> accuracy after --> table, [transcripts], plots
"""

import json
import math
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from openrlhf_alp.clients.errors import ServiceError
from openrlhf_alp.data.smollm2 import ModelPackageMissingError
from openrlhf_alp.data.tasks import repeat_rows, write_rows
from openrlhf_alp.launch import recipe
from openrlhf_alp.launch.accuracy import Accuracy, measure_accuracy
from openrlhf_alp.launch.run_folder import RunFolderError, find_model, open_run_folder
from openrlhf_alp.launch.supervisor import Child, ProcessFailedError, StopRequested, Supervisor
from openrlhf_alp.launch.view import DemoView
from openrlhf_alp.report.metrics import (
    MetricsFileError,
    MetricsFollower,
    StepMetrics,
    reward_at_edges,
)
from openrlhf_alp.report.plots import write_plots
from services.common.wire import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE, TOOL_KEY_VARIABLE


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoCommands:
    """How the processes are started; a test puts its own programs here."""

    service: Callable[..., list[str]] = recipe.service_command
    train: Callable[..., list[str]] = recipe.train_command
    tool: Callable[..., list[str]] = recipe.tool_command
    warm_up: Callable[..., list[str]] = recipe.warm_up_command


_SERVICE_READY_S = 600.0
_SERVICE_GRACE_S = 30.0
_TRAIN_GRACE_S = 15.0
_POLL_S = 0.3


def run_demo(
    config: recipe.DemoConfig, view: DemoView, commands: DemoCommands | None = None
) -> int:
    """Runs the demo; every process it started has ended when it returns.

    Returns:
        0, or 1 when something failed, 2 when a folder or package is not right, or 128 + the number
        of the signal that stopped it.
    """
    started_s = time.monotonic()
    variables = (API_KEY_VARIABLE, ADMIN_KEY_VARIABLE, TOOL_KEY_VARIABLE)
    keys = {name: secrets.token_urlsafe(32) for name in variables}
    environment = {
        # By environment, not by flag: every user of the machine can read a command line.
        **keys,
        "PYTHONUNBUFFERED": "1",
        # Everything is on this disk; without these a missing network costs minutes of retries.
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }
    try:
        with Supervisor(environment) as supervisor:
            _Demo(config, view, supervisor, commands or DemoCommands(), keys).run()
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
        self,
        config: recipe.DemoConfig,
        view: DemoView,
        supervisor: Supervisor,
        commands: DemoCommands,
        keys: dict[str, str],
    ) -> None:
        self._config, self._view, self._supervisor = config, view, supervisor
        self._commands, self._keys = commands, keys
        self._task = config.task
        self._services: list[Child] = []
        self._tool_url: str | None = None

    def run(self) -> None:
        config, view = self._config, self._view
        # Before the folder is made: a wrong --model must not move an earlier run aside.
        self._model = find_model(config.model, say=partial(view.say, "model"))
        view.say("model", str(self._model))
        self._folder = open_run_folder(
            config.output,
            settings={**asdict(config), "output": str(config.output)},
            overwrite=config.overwrite,
            say=partial(view.say, "folder"),
        )
        self._write_task()
        if self._task.uses_tool:
            url_file = self._folder / "tool.url"
            command = self._commands.tool(url_file=url_file)
            self._tool_url = self._start_service("The tool service", command, url_file)
            # Its memory is free again before vLLM measures what there is.
            self._warm_up()
        url_file = self._folder / "rollout.url"
        command = self._commands.service(model=self._model, url_file=url_file, seed=config.seed)
        self._rollout_url = self._start_service("The rollout service", command, url_file)
        before = self._measure("before")
        steps = self._train()
        after = self._measure("after")
        self._report(before, after, steps)

    def _write_task(self) -> None:
        seed = self._config.seed
        split = self._task.split(seed=seed)
        self._test = split.test
        task = self._folder / "task"
        task.mkdir()
        self._train_data = task / "train.jsonl"
        # As many rows as the steps read: the run then ends after exactly this many steps.
        num_rows = self._config.steps * recipe.PROMPTS_PER_STEP
        write_rows(self._train_data, repeat_rows(split.train, count=num_rows, seed=seed))
        write_rows(task / "test.jsonl", split.test)
        self._view.say(
            "task",
            f'"{split.test[0].question}" and the like: {len(split.train)} questions to train on, '
            f"{len(split.test)} held out",
        )

    def _start_service(self, name: str, command: list[str], url_file: Path) -> str:
        """Starts a service and returns its URL, which it writes once it accepts connections."""
        started_s = time.monotonic()
        log = url_file.with_suffix(".log")
        service = self._supervisor.start(name, command, log=log, grace_s=_SERVICE_GRACE_S)
        self._services.append(service)
        with self._view.waiting(f"Starting {name.lower()} (log: {log})"):
            while not url_file.exists():
                self._check_services()
                if time.monotonic() - started_s > _SERVICE_READY_S:
                    raise service.failure()
                time.sleep(_POLL_S)
        url = url_file.read_text(encoding="utf-8").strip()
        seconds = time.monotonic() - started_s
        self._view.say(
            "service", f"{name.lower()} is ready at {url} after {seconds:.0f} s (log: {log})"
        )
        return url

    def _check_services(self) -> None:
        for service in self._services:
            if not service.is_running:
                raise service.failure()

    def _warm_up(self) -> None:
        """Shows the policy the form of a tool call, by supervised learning, and says so."""
        warm = self._folder / "warm-model"
        started_s = time.monotonic()
        command = self._commands.warm_up(model=self._model, output=warm, seed=self._config.seed)
        log = self._folder / "warmup.log"
        child = self._supervisor.start("The warm-up", command, log=log, grace_s=_TRAIN_GRACE_S)
        with self._view.waiting(f"Supervised warm-up (log: {log})"):
            self._supervisor.wait(child)
        self._model = warm
        self._view.say(
            "warm-up",
            f"{recipe.WARM_UP_STEPS} supervised steps in {time.monotonic() - started_s:.0f} s show "
            "what a tool call looks like, and twice as often a wrong guess; which of them pays is "
            "left to the reward",
        )

    def _measure(self, name: str) -> Accuracy:
        with self._view.waiting(f"Asking the {len(self._test)} held-out questions"):
            accuracy = measure_accuracy(
                self._test,
                model=self._model,
                rollout_url=self._rollout_url,
                tool_url=self._tool_url,
                keys=self._keys,
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
        command = self._commands.train(
            self._config,
            model=self._model,
            train_data=self._train_data,
            run_folder=self._folder,
            rollout_url=self._rollout_url,
            tool_url=self._tool_url,
        )
        log = self._folder / "train.log"
        train = self._supervisor.start("Training", command, log=log, grace_s=_TRAIN_GRACE_S)
        self._view.say("training", f"starting Ray and DeepSpeed (log: {log})")
        steps = self._follow(train)
        self._supervisor.wait(train)
        if len(steps) != self._config.steps:
            self._view.say(
                "note",
                f"{len(steps)} of {self._config.steps} steps were made: groups of answers were "
                f"dropped or skipped, see {log}",
            )
        return steps

    def _follow(self, train: Child) -> list[StepMetrics]:
        """Shows each step as it is logged, until training or a service ends."""
        follower = MetricsFollower(self._folder / "metrics.jsonl")
        steps: list[StepMetrics] = []
        with self._view.training(self._config.steps) as on_step:
            while True:
                # Asked before reading, so that what is logged just before the end is still read.
                is_running = train.is_running
                for step in follower.new_steps():
                    steps.append(step)
                    on_step(step)
                if not is_running:
                    return steps
                self._check_services()
                time.sleep(_POLL_S)

    def _report(self, before: Accuracy, after: Accuracy, steps: Sequence[StepMetrics]) -> None:
        title = f"{self._config.method} on {self._task.noun}, seed {self._config.seed}"
        plots = write_plots(steps, self._folder, title=title)
        first, last = reward_at_edges(steps) or (None, None)
        summary = {
            "steps": len(steps),
            "before": _numbers(before),
            "after": _numbers(after),
            "reward_first_steps": first,
            "reward_last_steps": last,
        }
        (self._folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        self._view.results(self._task.noun, self._test, before, after, steps)
        if self._task.uses_tool:
            self._view.transcript("one episode before", before.greedy_episodes[0])
            self._view.transcript("the same question after", after.greedy_episodes[0])
        self._view.say("plots", " and ".join(map(str, plots)))
        self._view.say("curves", f"tensorboard --logdir {self._folder / 'tensorboard'}")


def _numbers(accuracy: Accuracy) -> dict[str, float | None]:
    shares = {"greedy": accuracy.greedy, "temperature_1": accuracy.sampled}
    # JSON has no NaN; null says that nothing could be scored.
    return {name: None if math.isnan(share) else share for name, share in shares.items()}

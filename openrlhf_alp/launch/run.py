"""One run of a recipe, stage by stage.

check --> data --> tool services --> [warm-up] --> rollout services --> [accuracy before]
      --> training --> [accuracy after] --> plots, summary
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from openrlhf_alp.clients.errors import ServiceError
from openrlhf_alp.launch import machine, plan, run_folder, weights_folder
from openrlhf_alp.launch.commands import HOLD, ROLLOUT_KEYS, Commands
from openrlhf_alp.launch.processes.servers import Server, Services, fresh_keys
from openrlhf_alp.launch.processes.supervisor import ProcessFailedError, StopRequested, Supervisor
from openrlhf_alp.launch.recipe import SMOLLM2, Recipe, RecipeError, Source, to_settings
from openrlhf_alp.launch.stages.summary import write_summary
from openrlhf_alp.launch.stages.task import noun_of, write_task
from openrlhf_alp.launch.stages.training import count_steps, follow_training
from openrlhf_alp.launch.view import LaunchView
from openrlhf_alp.report.metrics import METRICS, SUMMARY, MetricsFileError, StepMetrics
from openrlhf_alp.report.tracking import tracking

if TYPE_CHECKING:
    from openrlhf_alp.launch.stages.accuracy import Accuracy

_WORK_GRACE_S = 4.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line adds to a recipe."""

    resume: Path | None = None
    overwrite: bool = False
    dry_run: bool = False
    pretend_gpus: str | None = None
    lent: Path | None = None
    """Folder with the addresses of rollout services that a sweep keeps running."""


def launch(
    recipe: Recipe,
    source: Source,
    view: LaunchView,
    options: Options,
    commands: Commands | None = None,
    check: Callable[..., plan.Plan] = plan.check_plan,
) -> int:
    """Runs `recipe`; every process it started has ended when it returns.

    Returns:
        0, or 1 when something failed, 2 when recipe, folder or machine are not right, or 128 + the
        number of the signal that stopped it.
    """
    started_s = time.monotonic()
    folder = options.resume or recipe.run.folder or Path("runs", source.path.stem)
    try:
        with ExitStack() as stack, Supervisor() as supervisor:
            run = _Run(recipe, source, folder, view, options, supervisor, commands or Commands())
            run.run(stack, check)
    except RecipeError as error:
        view.refusal(str(error))
        return 2
    except (ProcessFailedError, ServiceError, MetricsFileError, OSError) as error:
        view.error(str(error))
        if (folder / "checkpoints").is_dir():
            view.say(
                "continue", f"from the newest checkpoint: openrlhf-alp launch --resume {folder}"
            )
        return 1
    except StopRequested as stop:
        view.say("stopped", f"by {stop}; every process of the run has been ended")
        return stop.exit_status
    view.say("done", f"in {(time.monotonic() - started_s) / 60:.1f} minutes")
    return 0


class _Run:
    """One run. `run` is the table of contents; each stage is a method."""

    def __init__(
        self,
        recipe: Recipe,
        source: Source,
        folder: Path,
        view: LaunchView,
        options: Options,
        supervisor: Supervisor,
        commands: Commands,
    ) -> None:
        self._recipe, self._source, self._folder = recipe, source, folder
        self._view, self._options = view, options
        self._supervisor, self._commands = supervisor, commands
        self._services = Services(supervisor, view)

    def run(self, stack: ExitStack, check: Callable[..., plan.Plan]) -> None:
        self._say_cluster()
        step = self._check_folder(stack)
        self._plan = self._make_plan(stack, check)
        self._inputs = self._plan.inputs
        if self._options.dry_run:
            return
        self._open_folder(step)
        self._set_environment()
        self._write_data()
        tool_urls = self._start_servers("tool", self._plan.tools)
        # Before the engine: its memory is free again before vLLM measures what there is.
        self._warm_up()
        rollout_urls = self._start_rollouts(stack)
        self._inputs = replace(
            self._inputs,
            rollout_urls=rollout_urls or self._inputs.rollout_urls,
            tool_urls=tool_urls or self._inputs.tool_urls,
        )
        self._evaluate("before")
        before = self._measure("before")
        steps = self._train()
        after = self._measure("after")
        self._evaluate("after")
        self._report(before, after, steps)

    def _say_cluster(self) -> None:
        if (cluster := os.environ.get("RAY_ADDRESS")) and not self._recipe.train.ray_address:
            self._view.say(
                "ray",
                f"RAY_ADDRESS={cluster} is set, so the learner joins that cluster; unset it for a "
                "Ray of this run alone",
            )

    def _check_folder(self, stack: ExitStack) -> int:
        """The step to continue from, 0 for a new run; nobody else gets the folder meanwhile."""
        folder, step = self._folder, 0
        if self._options.resume:
            step = run_folder.newest_checkpoint(folder)
        else:
            run_folder.check_run_folder(
                folder, recipe=self._recipe, overwrite=self._options.overwrite
            )
        if not self._options.dry_run:
            stack.enter_context(run_folder.locked(folder))
        return step

    def _find_model(self) -> str:
        name = self._recipe.model.path
        is_id = name != SMOLLM2 and not Path(name).exists() and not Path(name).is_absolute()
        if self._options.dry_run and is_id:
            return name  # a dry run fetches nothing
        return str(run_folder.find_model(name, say=partial(self._view.say, "model")))

    def _make_plan(self, stack: ExitStack, check: Callable[..., plan.Plan]) -> plan.Plan:
        model, needed = self._find_model(), plan.gpus_needed(self._recipe)
        if text := self._options.pretend_gpus:
            here = machine.pretended_machine(text)
        else:
            here = machine.this_machine()
        gpus = here.free_gpus
        if len(gpus) < needed:
            raise RecipeError(machine.too_few_gpus(needed, len(gpus)))
        if not self._options.dry_run:
            gpus = stack.enter_context(machine.claimed(gpus, needed))
        # Where there is a GPU, whoever gets none must not find one by itself.
        self._has_gpus = bool(here.gpus)
        # The check reads it too: the trainer refuses a new run where an earlier one has recorded.
        resume = self._options.resume is not None
        made = plan.make_plan(
            self._recipe, self._folder, model, gpus, self._commands, resume=resume
        )
        with self._view.waiting("Checking flags, ports, memory and disk"):
            made = check(made, self._source, here, self._supervisor)
        for name, text in plan.describe(made, gpus) if self._options.dry_run else ():
            self._view.say(name, text)
        return made

    def _open_folder(self, step: int) -> None:
        say = partial(self._view.say, "folder")
        if self._inputs.resume:
            undone = run_folder.drop_undone_steps(self._inputs.folder, step)
            say(f"{self._folder}: continues after step {step}; {undone} later steps are repeated")
        else:
            run_folder.open_run_folder(
                self._folder, recipe=self._recipe, overwrite=self._options.overwrite, say=say
            )
            say(str(self._folder))
        self._folder = self._inputs.folder

    def _set_environment(self) -> None:
        """Keys and switches of the children, by environment: a command line is public."""
        self._keys = fresh_keys()
        self._environment = {**self._keys, "PYTHONUNBUFFERED": "1"}
        data = self._recipe.data
        if "HF_HUB_OFFLINE" not in os.environ and not (data.path and not Path(data.path).exists()):
            # Everything is on this disk; a missing network would cost minutes of retries.
            self._offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        else:
            self._offline = {}

    def _environment_of(self, name: str) -> dict[str, str]:
        gpus = ",".join(self._plan.process(name).gpus)
        # nvidia-smi numbers GPUs by their place on the bus, CUDA by itself by their speed.
        by_place = {"CUDA_VISIBLE_DEVICES": gpus, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        visible = by_place if self._has_gpus else {}
        return {**self._environment, **self._offline, **visible}

    def _write_data(self) -> None:
        data, seed = self._recipe.data, self._recipe.run.seed
        prompts = Path(self._inputs.prompts)
        if data.task:
            # As many rows as the steps read: the run then ends after exactly this many steps.
            count = (data.steps or 0) * self._plan.shape["batch_size"]
            questions = write_task(data.task, prompts, num_rows=count, seed=seed)
            self._noun, self._test = noun_of(data.task), questions.test
            self._view.say(
                "task",
                f'"{self._test[0].question}" and the like: {len(questions.train)} questions to '
                f"train on, {len(self._test)} held out",
            )
        elif data.sources and not prompts.exists():
            prompts.parent.mkdir(exist_ok=True)
            command = self._plan.process("data").command
            self._work("data", "Preparing the prompts", command, self._environment)

    def _start_servers(self, kind: str, servers: Sequence[Server]) -> tuple[str, ...]:
        """URLs of the services; none when the recipe has none, or those that run already."""
        if not servers:
            return ()
        for server in servers:
            server.environment = self._environment_of(server.name)
        return self._services.start(f"{len(servers)} {kind} service(s)", servers)

    def _start_rollouts(self, stack: ExitStack) -> tuple[str, ...]:
        servers = self._plan.rollouts
        if self._options.lent and servers:
            from openrlhf_alp.clients.weights.push import WeightPusher  # imports torch

            urls = self._services.borrow(servers, self._options.lent)
            api_key, admin_key = (self._keys[name] for name in ROLLOUT_KEYS)
            # Whatever an earlier run has pushed to them.
            WeightPusher(urls, api_key=api_key, admin_key=admin_key).push_folder(
                Path(self._inputs.model)
            )
            return urls
        stack.enter_context(weights_folder.held(self._plan.weights_dir))
        return self._start_servers("rollout", servers)

    def _work(
        self,
        name: str,
        what: str,
        command: list[str],
        environment: Mapping[str, str],
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        """Runs a process to its end, while the services run; `meanwhile` sees to that they do."""
        log = self._folder / "logs" / f"{name}.log"
        child = self._supervisor.start(
            what, command, log=log, grace_s=_WORK_GRACE_S, environment=environment
        )
        started_s = time.monotonic()
        with self._view.waiting(f"{what} (log: {log})"):
            try:
                self._supervisor.wait(child, meanwhile or self._services.check)
            except ProcessFailedError:
                self._supervisor.stop(child)
                raise
        self._view.say(name, f"{what}: {time.monotonic() - started_s:.0f} s (log: {log})")

    def _warm_up(self) -> None:
        """Shows the policy the form of a tool call, by supervised learning, and says so."""
        steps = self._recipe.model.warm_up_steps
        if not steps or (Path(self._inputs.model) / "config.json").exists():
            return
        command = self._plan.process("warm-up").command
        self._work("warm-up", "Supervised warm-up", command, self._environment_of("train"))
        self._view.say(
            "warm-up",
            f"{steps} supervised steps show what a tool call looks like, and twice as often a "
            "wrong guess; which of them pays is left to the reward",
        )

    def _measure(self, name: str) -> Accuracy | None:
        """Held-out questions of a made task."""
        if self._recipe.data.task is None:
            return None
        # Here and not above: it imports torch and transformers, which takes seconds.
        from openrlhf_alp.launch.stages.accuracy import measure_accuracy

        with self._view.waiting(f"Asking the {len(self._test)} held-out questions"):
            accuracy = measure_accuracy(
                self._test,
                model=Path(self._inputs.model),
                rollout_urls=self._inputs.rollout_urls,
                tool_urls=self._inputs.tool_urls,
                flags=self._recipe.train.flags,
                keys=self._keys,
                seed=self._recipe.run.seed,
                check_services=self._services.check,
            )
        self._view.say(
            name,
            f"held-out {self._noun} right: {accuracy.greedy:.0%} greedy, "
            f"{accuracy.sampled:.0%} at temperature 1",
        )
        return accuracy

    def _evaluate(self, name: str, meanwhile: Callable[[], None] | None = None) -> None:
        """Problem sets of the recipe; what an earlier attempt has answered is not asked again."""
        wanted = self._recipe.evaluate
        if wanted is None or getattr(wanted, name, True) is False:
            return
        output = self._folder / "evaluation" / name
        command = self._commands.evaluate(self._recipe, self._inputs, output)
        what = f"Evaluating {name.replace('-', ' ')}"
        self._work(f"evaluate-{name}", what, command, self._environment, meanwhile)
        self._view.say("results", str(output / "results.md"))

    def _evaluate_step(self, step: int, keep_running: Callable[[], None]) -> None:
        """As `_evaluate`; where it cannot be made, that is said, and training continues."""
        lives = [server.life for server in self._services.all]

        def keep_weights() -> None:
            keep_running()
            for server, before in zip(self._services.all, lives, strict=True):
                if server.life != before:
                    # It has the weights that training began with, until they are pushed again.
                    ending = f"{server.name} lost the weights of the step"
                    raise ProcessFailedError(ending, ending)

        try:
            self._evaluate(f"step-{step}", keep_weights)
        except ProcessFailedError as error:
            keep_running()  # raises where it was training, or a service for good
            self._view.say("note", f"step {step} is not evaluated: {error.ending}")

    def _train(self) -> list[StepMetrics]:
        log, metrics = self._folder / "logs" / "train.log", self._folder / METRICS
        hold = self._folder / HOLD
        hold.unlink(missing_ok=True)  # of an attempt that was killed while it evaluated
        train = self._supervisor.start(
            "Training",
            self._commands.train(self._recipe, self._inputs),
            log=log,
            grace_s=_WORK_GRACE_S,
            environment=self._environment_of("train"),
        )

        def keep_running() -> None:
            if not train.is_running:
                raise train.failure()
            self._services.keep_running()

        def evaluate() -> None:
            if hold.exists():
                step = int(hold.read_text())
                # A run that continues holds at the step of its checkpoint once more.
                if not (self._folder / "evaluation" / f"step-{step}" / "results.json").exists():
                    self._evaluate_step(step, keep_running)
                hold.unlink()

        self._view.say("training", f"starting Ray and DeepSpeed (log: {log})")
        wanted = count_steps(Path(self._inputs.prompts), self._plan.shape)
        with tracking(
            self._recipe.run.trackio,
            name=self._folder.name,
            settings=to_settings(self._recipe),
            continues=self._inputs.resume,
        ) as log_step:
            steps = follow_training(
                train, metrics, self._services, wanted, self._view, log_step, evaluate
            )
        self._supervisor.wait(train)
        if wanted is not None and len(steps) != wanted:
            self._view.say(
                "note",
                f"{len(steps)} of {wanted} steps were made: groups of answers were dropped or "
                f"skipped, see {log}",
            )
        return steps

    def _report(
        self, before: Accuracy | None, after: Accuracy | None, steps: Sequence[StepMetrics]
    ) -> None:
        from openrlhf_alp.report.plots import write_plots  # imports matplotlib

        recipe, folder = self._recipe, self._folder
        method = recipe.train.flags.get("alp.method", "OpenRLHF's own loss")
        title = f"{method}, {self._source.path.stem}, seed {recipe.run.seed}"
        (folder / "plots").mkdir(exist_ok=True)
        plots = write_plots(steps, folder / "plots", title=title)
        restarts = {server.name: server.restarts for server in self._services.all}
        write_summary(folder / SUMMARY, steps, restarts=restarts, before=before, after=after)
        if before and after:
            self._view.results(self._noun, self._test, before, after, steps)
            if recipe.tool:
                self._view.transcript("one episode before", before.greedy_episodes[0])
                self._view.transcript("the same question after", after.greedy_episodes[0])
        self._view.say("plots", " and ".join(map(str, plots)))
        self._view.say("curves", f"tensorboard --logdir {folder / 'tensorboard'}")

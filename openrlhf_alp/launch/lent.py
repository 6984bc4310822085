"""Rollout services that stay up between the runs of a sweep.

    sweep: starts them -> cell 1 -> cell 2 ... -> ends them, or starts what the next cell needs
    cell:  takes their URLs, and pushes its own model to them before it asks anything

An engine takes as long to start as several steps of a small model take to train.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from openrlhf_alp.launch import plan, weights_folder
from openrlhf_alp.launch.commands import Commands
from openrlhf_alp.launch.processes.servers import Services, ServiceView, fresh_keys
from openrlhf_alp.launch.processes.supervisor import ProcessFailedError, Supervisor
from openrlhf_alp.launch.recipe import Recipe
from openrlhf_alp.launch.run_folder import find_model

_ON_CPU = {"PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
"""Variables of services that find their model on this disk and no GPU."""


class Lender(AbstractContextManager["Lender"]):
    """The services of the cell that runs; those of the last one are kept while they fit.

    Args:
        folder: of the sweep; logs and the services' addresses are written below it.
    """

    def __init__(
        self, folder: Path, supervisor: Supervisor, view: ServiceView, commands: Commands
    ) -> None:
        self._folder, self._supervisor = folder.resolve(), supervisor
        self._view, self._commands = view, commands
        self.keys = fresh_keys()
        """Of the services, by the names of their variables; the cells need them too."""
        self._stack = ExitStack()
        self._services: Services | None = None
        self._key: list[list[str]] = []

    def __exit__(self, *_: object) -> None:
        self._stop()

    def lend(self, recipe: Recipe) -> Path | None:
        """The folder with the addresses of services for a cell.

        None when it has to start its own: it runs on GPUs, which a launch claims for itself, its
        services run already, or its model is made by the run.

        Raises:
            RecipeError: its model cannot be had.
            ProcessFailedError: a service does not start.
        """
        if plan.gpus_needed(recipe) or recipe.rollout.urls or recipe.model.warm_up_steps:
            self._stop()
            return None
        model = str(find_model(recipe.model.path, say=lambda text: self._view.say("model", text)))
        made = plan.make_plan(recipe, self._folder, model, (), self._commands)
        key = [server.command(server.port) for server in made.rollouts]
        try:
            if self._services is None or key != self._key:
                self._stop()
                self._key = key
                self._start(made)
            else:
                self._services.wait_ready()
        except ProcessFailedError:
            self._stop()  # the next cell gets new ones
            raise
        return made.rollouts[0].url_file.parent

    def keep_running(self) -> None:
        """Starts again a service that has ended. One that ends too often fails the cell alone: the
        next one gets new ones."""
        if self._services is None:
            return
        try:
            self._services.keep_running()
        except ProcessFailedError as error:
            self._view.say("note", error.ending)
            self._stop()

    def _start(self, made: plan.Plan) -> None:
        self._services = Services(self._supervisor, self._view)
        self._stack.enter_context(weights_folder.held(made.weights_dir))
        self._stack.callback(self._services.stop)
        for server in made.rollouts:
            server.environment = {**self.keys, **_ON_CPU}
        self._services.start(f"{len(made.rollouts)} rollout service(s)", made.rollouts)

    def _stop(self) -> None:
        self._stack.close()
        self._services = None

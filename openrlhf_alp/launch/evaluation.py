"""`openrlhf-alp evaluate` from its configuration to its files: services, the run, the figures."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jinja2

from openrlhf_alp.clients.errors import ContractMismatch, ServiceError, Unauthorized
from openrlhf_alp.data.sources import DataError
from openrlhf_alp.data.templates import TokenizerError
from openrlhf_alp.evaluate.player import Plan
from openrlhf_alp.evaluate.results import Results, markdown
from openrlhf_alp.evaluate.run import EvaluationFailed, Run, run_evaluation
from openrlhf_alp.evaluate.store import StoreError
from openrlhf_alp.evaluate.suites import LoadedSuite
from openrlhf_alp.launch.processes.servers import Services, fresh_keys, local_server
from openrlhf_alp.launch.processes.supervisor import ProcessFailedError, StopRequested, Supervisor
from openrlhf_alp.launch.recipe import SMOLLM2, RecipeError
from openrlhf_alp.launch.run_folder import find_model
from openrlhf_alp.launch.view import EvaluationView
from openrlhf_alp.report.pass_at_k import write_pass_at_k


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """What to ask whom, and what to start for that."""

    model: str | None
    """Folder or Hugging Face id; served here unless `rollout_urls` are given."""

    tokenizer: str | None
    rollout_urls: tuple[str, ...]
    suites: tuple[LoadedSuite, ...]
    n: int
    plan: Plan
    """Its tool settings need no URLs: a tool service is started here when there are none."""

    output: Path
    num_workers: int
    concurrency: int
    request_timeout_s: float
    service_flags: Mapping[str, Any]
    """Flags of the rollout services that are started here."""

    num_servers: int


def run(config: EvaluationConfig, view: EvaluationView) -> int:
    """Evaluates; every process that was started has ended when it returns.

    Returns:
        0, or 1 when the run could not be finished, 2 when an option, a suite or a folder is not
        right, or 128 + the number of the signal that stopped it.
    """
    # The client of this process reads them where the services do. Taken back afterwards: whoever
    # calls this may start services of their own.
    keys = fresh_keys() if not config.rollout_urls or config.plan.tool else {}
    try:
        with mock.patch.dict(os.environ, keys), Supervisor({"PYTHONUNBUFFERED": "1"}) as supervisor:
            services = Services(supervisor, view)
            results = _evaluate(config, services, view)
    except (EvaluationFailed, StoreError) as error:
        view.error(str(error))
        return 1
    except (RecipeError, DataError, ContractMismatch, Unauthorized) as error:
        view.error(str(error))
        return 2
    except (ProcessFailedError, ServiceError, OSError, jinja2.TemplateError) as error:
        view.error(f"{error}\nWhat was generated is stored; the same command continues there.")
        return 1
    except StopRequested as stop:
        view.say("stopped", f"by {stop}; the same command continues from {config.output}")
        return stop.exit_status
    show_results(config.output, results, view)
    return 0


def show_results(folder: Path, results: Results, view: EvaluationView) -> None:
    """Draws the curves and prints the tables and where everything is."""
    plot = write_pass_at_k(results, folder / "pass_at_k.png")
    view.tables(markdown(results))
    view.say("written", f"{folder / 'results.json'}, {folder / 'results.md'} and {plot}")
    view.say("logs", f"inspect view --log-dir {folder / 'logs'}")


def _evaluate(config: EvaluationConfig, services: Services, view: EvaluationView) -> Results:
    find = partial(find_model, say=partial(view.say, "model"))
    model = config.model
    if model and (not config.rollout_urls or model == SMOLLM2):
        model = str(find(model, named="--model"))
    named = config.tokenizer or model
    assert named, "the command asks for one of the two"
    run = Run(
        output=config.output,
        suites=config.suites,
        n=config.n,
        plan=config.plan,
        model=config.model or named,
        tokenizer=_tokenizer(named),
        tokenizer_flag=f"{'--tokenizer' if config.tokenizer else '--model'} {named}",
        rollout_urls=config.rollout_urls,
        num_workers=config.num_workers,
        concurrency=config.concurrency,
        request_timeout_s=config.request_timeout_s,
        check_services=services.check,
    )

    def start(run: Run) -> Run:
        if not run.rollout_urls:
            flags = {"model": model, **config.service_flags}
            urls = _start_rollouts(config.num_servers, flags, run.output / "services", services)
            run = replace(run, rollout_urls=urls)
        if run.plan.tool and not run.plan.tool.urls:
            server = local_server("tool-0", "services.tool", {}, run.output / "services")
            tool = replace(run.plan.tool, urls=services.start("the tool service", [server]))
            run = replace(run, plan=replace(run.plan, tool=tool))
        return run

    return run_evaluation(run, view, start=start)


def _start_rollouts(
    num: int, flags: Mapping[str, Any], folder: Path, services: Services
) -> tuple[str, ...]:
    servers = [
        local_server(f"rollout-{index}", "services.rollout", flags, folder) for index in range(num)
    ]
    return services.start(f"{num} rollout service(s)", servers)


def _tokenizer(name: str) -> Any:
    """The policy's tokenizer.

    Raises:
        TokenizerError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise TokenizerError(
            f"the tokenizer of {name} cannot be loaded ({type(error).__name__}: {error}). Fix: "
            "give --tokenizer DIR, the folder of the model that the services serve"
        ) from error

"""`openrlhf-alp evaluate`: its options. `launch/evaluation.py` and `evaluate/` do the work."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from openrlhf_alp.data.sources import DataError
from openrlhf_alp.data.templates import TEMPLATES
from openrlhf_alp.launch.view import EvaluationView
from services.common.wire import API_KEY_VARIABLE, TOOL_KEY_VARIABLE, require_keys

if TYPE_CHECKING:  # it imports torch-sized libraries
    from openrlhf_alp.launch.evaluation import EvaluationConfig

HELP = "avg@n and pass@k on problem sets, with intervals, resumable"

DESCRIPTION = """\
Asks a policy every problem of one or more sets n times, grades the answers with the reward that
training uses, and writes avg@n, pass@k and majority@n with 95 % intervals: RUN/results.json, tables
in RUN/results.md, RUN/pass_at_k.png, and logs that `inspect view` opens.

  openrlhf-alp evaluate --model /models/policy --suite paper --n 32 --data_dir data
  openrlhf-alp evaluate --rollout_urls http://127.0.0.1:8000 --tokenizer DIR --suite math500
  openrlhf-alp evaluate --model DIR --suite mine.jsonl --problem_field question --label_field answer
  openrlhf-alp evaluate --model DIR --suite paper --tir
  openrlhf-alp evaluate --compare runs/grpo runs/alp

With a folder alone it starts the services itself. A run that was stopped in whatever way continues
when the same command is given again: no answer is generated twice. Services of your own take their
keys from OPENRLHF_ALP_ROLLOUT_API_KEY and OPENRLHF_ALP_TOOL_API_KEY.
"""

_MAX_DEFAULT_WORKERS = 8

_OF_STARTED_SERVICES = {
    "engine": "vllm",
    "dtype": "bfloat16",
    "max_model_len": None,
    "num_servers": 1,
}
"""Options of rollout services that are started here, with their defaults."""

_NUM_ANSWERS = 32

_OF_QUESTIONS: dict[str, Any] = {"suite": [], "n": _NUM_ANSWERS, "model": None, "rollout_urls": []}
"""Options of a run that asks, with their defaults."""

_OF_TOOLS = {
    "max_tool_turns": 5,
    "max_tokens_per_turn": None,
    "tool_timeout_s": 5.0,
    "tool_session": False,
}
"""Options that need --tir, with their defaults."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `openrlhf-alp evaluate`."""
    _add_policy(parser.add_argument_group("the policy"))
    _add_suites(parser.add_argument_group("the problems"))
    _add_sampling(parser.add_argument_group("the answers"))
    _add_tools(parser.add_argument_group("tool-integrated reasoning"))
    _add_run(parser.add_argument_group("the run"))
    _add_stored(parser.add_argument_group("finished runs, without generating"))


def _add_policy(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model", metavar="DIR", help="model folder, Hugging Face id or smollm2; served here")
    add("--rollout_urls", nargs="+", default=[], metavar="URL", help="rollout services that run")
    add("--tokenizer", metavar="DIR", help="the policy's tokenizer (default: that of --model)")
    add(
        "--engine",
        choices=["vllm", "hf"],
        help="engine of a service started here; hf is deterministic and slow (default: vllm)",
    )
    add("--dtype", help="dtype of its weights (default: bfloat16)")
    add("--max_model_len", type=int, metavar="N", help="its limit of prompt and answer together")
    add("--num_servers", type=int, metavar="N", help="services to start (default: 1)")
    group.set_defaults(**_OF_STARTED_SERVICES)


def _add_suites(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--suite",
        nargs="+",
        default=[],
        metavar="NAME",
        help="paper (math500, minerva, olympiadbench, aime24, aime25), gsm8k, svamp, or files of "
        "your own",
    )
    add("--data_dir", type=Path, metavar="DIR", help="folder with the published files, see --list")
    add("--limit", type=int, metavar="N", help="ask only the first N problems of each set")
    for name, what in (
        ("problem", "the problem"),
        ("label", "the reference answer"),
        ("id", "an id (default: the row number)"),
        ("subject", "a subject, to report by"),
        ("level", "a level, to report by"),
    ):
        add(f"--{name}_field", metavar="FIELD", help=f"field of a file of your own: {what}")
    add("--list", action="store_true", help="list the known sets with source, size and licence")


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--n", type=int, default=_NUM_ANSWERS, help="answers per problem (default: 32)")
    add("--temperature", type=float, default=1.0, help="0 is greedy (default: 1)")
    add("--top_p", type=float, default=1.0, help="nucleus mass (default: 1)")
    add("--top_k", type=int, default=0, help="most likely tokens kept, 0 keeps all (default: 0)")
    add(
        "--max_new_tokens",
        type=int,
        default=4096,
        metavar="N",
        help="tokens of an answer, program output included (default: 4096)",
    )
    add("--seed", type=int, default=0, help="seed of all answers (default: 0)")
    add(
        "--template",
        choices=TEMPLATES,
        help="how a problem is asked (default: chat-math, with --tir chat-tir)",
    )


def _add_tools(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--tir", action="store_true", help="the policy may run Python")
    add("--tool_urls", nargs="+", default=[], metavar="URL", help="tool services that run")
    add("--max_tool_turns", type=int, metavar="N", help="programs per answer (5)")
    add("--max_tokens_per_turn", type=int, metavar="N", help="tokens of one turn (default: all)")
    add("--tool_timeout_s", type=float, metavar="S", help="limit of a program (5)")
    add("--tool_session", action="store_true", help="keep variables between programs")
    group.set_defaults(**_OF_TOOLS)


def _add_run(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--output",
        type=Path,
        default=Path("runs/evaluate"),
        metavar="RUN",
        help="run folder; an unfinished run there continues (default: runs/evaluate)",
    )
    add("--concurrency", type=int, default=64, metavar="N", help="answers at once (default: 64)")
    workers = min(_MAX_DEFAULT_WORKERS, os.cpu_count() or 1)
    add("--workers", type=int, default=workers, help=f"processes that grade (default: {workers})")
    add(
        "--request_timeout_s",
        type=float,
        default=600.0,
        metavar="S",
        help="longest work on one request, from its first token on (default: 600)",
    )


def _add_stored(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--regrade", type=Path, metavar="RUN", help="grade the stored answers again")
    add(
        "--compare",
        type=Path,
        nargs=2,
        metavar=("A", "B"),
        help="difference of two runs, by a paired bootstrap over problems",
    )
    add(
        "--compare_graders",
        type=Path,
        metavar="RUN",
        help="list the answers on which plain math-verify and our reward differ",
    )


def run(arguments: argparse.Namespace) -> int:
    """Evaluates; returns 0, 1 (not finished), 2 (wrong options or input) or 128 + a signal."""
    console = Console()
    # Not an import at the top, which `--help` would wait for.
    if importlib.util.find_spec("inspect_ai") is None:
        console.print(
            "evaluate needs inspect-ai: pip install 'openrlhf-alp[evaluate]'", markup=False
        )
        return 2
    view = EvaluationView(console)
    try:
        if arguments.list:
            # The check of a launch gives the options of its evaluation, too.
            _check_values(arguments)
            _template(arguments)
            return _list(view)
        if arguments.compare or arguments.compare_graders or arguments.regrade:
            _check_unused(arguments, _OF_QUESTIONS, "on stored answers: nothing is asked")
            return _stored(arguments, view)
        config = _config(arguments)
    except (DataError, ValueError, OSError) as error:
        view.error(str(error))
        return 2
    # Here and not above: it imports transformers and Inspect, and a wrong option should not wait.
    from openrlhf_alp.launch.evaluation import run as run_all

    return run_all(config, view)


def _config(options: argparse.Namespace) -> EvaluationConfig:
    """The configuration of a run.

    Raises:
        ValueError: options contradict each other or are out of range.
        DataError: a suite is not right.
    """
    _check(options)
    # The slower ones further down: what is wrong with the options or a file is said before.
    from openrlhf_alp.evaluate.suites import find_suites, load_suite
    from openrlhf_alp.rollouts.runners import ToolConfig

    template = _template(options)
    names = ("problem", "label", "id", "subject", "level")
    fields = {name: getattr(options, f"{name}_field") for name in names}
    suites = [
        load_suite(suite, data_dir=options.data_dir, limit=options.limit)
        for suite in find_suites(options.suite, fields=fields)
    ]
    tool = ToolConfig(
        urls=tuple(options.tool_urls),
        session=options.tool_session,
        timeout_s=options.tool_timeout_s,
        max_tool_turns=options.max_tool_turns,
        max_tokens_per_turn=options.max_tokens_per_turn,
        # The prompt's form decides how a program's output comes back, as in training.
        template="chat" if TEMPLATES[template].is_chat else "plain",
    )
    sampling = ("temperature", "top_p", "top_k", "max_new_tokens", "seed")
    flags = {"engine": options.engine, "dtype": options.dtype, "max_num_seqs": options.concurrency}
    if options.max_model_len is not None:
        flags["max_model_len"] = options.max_model_len
    from openrlhf_alp.evaluate.player import Plan
    from openrlhf_alp.launch.evaluation import EvaluationConfig

    return EvaluationConfig(
        model=options.model,
        tokenizer=options.tokenizer,
        rollout_urls=tuple(options.rollout_urls),
        suites=tuple(suites),
        n=options.n,
        plan=Plan(
            template=template,
            tool=tool if options.tir else None,
            **{name: getattr(options, name) for name in sampling},
        ),
        output=options.output,
        num_workers=options.workers,
        concurrency=options.concurrency,
        request_timeout_s=options.request_timeout_s,
        service_flags=flags,
        num_servers=options.num_servers,
    )


def _check(options: argparse.Namespace) -> None:
    if not options.suite:
        raise ValueError("--suite is missing: name what to evaluate on; --list shows what is known")
    if not (options.model or options.rollout_urls):
        raise ValueError("give --model DIR, which is then served here, or --rollout_urls URL ...")
    if options.tool_urls and not options.tir:
        raise ValueError("--tool_urls without --tir: no program would be run. Add --tir")
    if options.rollout_urls:
        if not (options.tokenizer or options.model):
            raise ValueError(
                "--rollout_urls needs --tokenizer DIR: the folder or Hugging Face id of the model "
                "that the services serve. They refuse another tokenizer"
            )
        require_keys(API_KEY_VARIABLE, service="rollout")
    if options.tool_urls:
        require_keys(TOOL_KEY_VARIABLE, service="tool")
    _check_values(options)


def _check_values(options: argparse.Namespace) -> None:
    """What is wrong with options whatever the suites and services are."""
    if options.rollout_urls:
        _check_unused(options, _OF_STARTED_SERVICES, "with --rollout_urls, which run already")
    if not options.tir:
        _check_unused(options, _OF_TOOLS, "without --tir: no program would be run")
    for name in ("n", "max_new_tokens", "concurrency", "workers", "num_servers", "limit"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}; it must be 1 or above")
    for name, value, least, most in (
        ("temperature", options.temperature, 0.0, 2.0),
        ("seed", options.seed, 0, 2**62),
        ("top_k", options.top_k, 0, 2**31),
    ):
        if not least <= value <= most:
            raise ValueError(f"--{name} is {value}; it must be in {least:g}..{most:g}")
    if not 0 < options.top_p <= 1:
        raise ValueError(f"--top_p is {options.top_p}; it must be above 0 and at most 1")
    if not options.request_timeout_s > 0:
        raise ValueError(f"--request_timeout_s is {options.request_timeout_s}; it must be above 0")


def _check_unused(options: argparse.Namespace, defaults: Mapping[str, Any], why: str) -> None:
    for name, default in defaults.items():
        if getattr(options, name) != default:
            raise ValueError(f"--{name} has no effect {why}. Drop it")


def _template(options: argparse.Namespace) -> str:
    template: str = options.template or ("chat-tir" if options.tir else "chat-math")
    if TEMPLATES[template].is_tool_integrated != options.tir:
        raise ValueError(
            f"--template {template} {'asks' if not options.tir else 'does not ask'} for Python and "
            f"--tir is {'not ' if not options.tir else ''}given. Fix: give both or neither"
        )
    return template


def _list(view: EvaluationView) -> int:
    from openrlhf_alp.evaluate.suites import registry

    suites, groups = registry()
    lines = ["| name | problems | files | Hugging Face id | answers | licence |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for suite in suites.values():
        cells = [suite.name, str(suite.size), ", ".join(suite.files), suite.source]
        lines.append("| " + " | ".join([*cells, suite.answer_form, suite.licence]) + " |")
    lines += ["", *(f"{name}: {', '.join(members)}" for name, members in groups.items())]
    view.tables("\n".join(lines))
    return 0


def _stored(options: argparse.Namespace, view: EvaluationView) -> int:
    """What is done with finished runs. Each imports what it needs: a comparison is quick."""
    if options.regrade:
        from openrlhf_alp.evaluate.run import regrade
        from openrlhf_alp.launch.evaluation import show_results

        results = regrade(options.regrade, num_workers=options.workers, progress=view)
        show_results(options.regrade, results, view)
    if options.compare:
        from openrlhf_alp.evaluate.comparison import compare_runs, comparison_markdown

        view.tables(comparison_markdown(compare_runs(*options.compare)))
    if options.compare_graders:
        from openrlhf_alp.evaluate.results import markdown_table
        from openrlhf_alp.evaluate.run import differences_of_graders

        found = differences_of_graders(options.compare_graders, num_workers=options.workers)
        rows = [
            [name, str(suite["num_answers"]), str(len(suite["differences"]))]
            for name, suite in found.items()
        ]
        view.tables(markdown_table(["suite", "answers", "graded differently"], rows))
        view.say("written", str(options.compare_graders / "grader_differences.json"))
    return 0

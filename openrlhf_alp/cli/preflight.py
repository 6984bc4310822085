"""`openrlhf-alp preflight`: its options and its report; `learner/mismatch/probe.py` measures.

Torch and OpenRLHF take seconds to import, so only `run` does it: `--help` and wrong options do not
wait for them.
"""

import argparse
import contextlib
import itertools
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from openrlhf_alp.cli.explain import explain_model, explanation_json, show
from openrlhf_alp.clients.errors import ServiceError
from openrlhf_alp.learner.mismatch.judge import LIMITS, Level
from services.common.wire import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE, require_keys

if TYPE_CHECKING:
    from openrlhf_alp.learner.mismatch.probe import ProbeConfig, ProbeReport

_LIMIT_LINES = "\n".join(
    f"  |{limit.figure}|".ljust(12) + f"{limit.suspicious:<14g}{limit.broken:g}" for limit in LIMITS
)

HELP = "compare the log-probs of a running rollout service with the learner's own"

DESCRIPTION = f"""\
Compare the log-probabilities of the learner and of a rollout service. The single ratio of ALP
divides the learner's probability of a token by the service's. If the two differ at equal weights,
every ratio is wrong by that much, and no training curve shows it.

This samples a few answers from the service, computes their log-probs with the learner's own forward
pass (model, dtype and attention as in training, without an update) and prints the distribution of

  log-ratio = log p(token) by the learner - log p(token) as served

figure      suspicious    broken      from these absolute values
{_LIMIT_LINES}

Two bfloat16 engines of one model differ by a k3 KL near 0.001, which is rounding. Suspicious is
worth a look and does not fail; broken means that the two sides do not compute the same thing. The
report names the usual causes and the tensors that differ from the model's: after a push of another
run the service serves other weights, and --push restores the model's.

exit status: 0 ok or suspicious, 1 broken, 2 nothing could be measured.

  export {API_KEY_VARIABLE}=...
  openrlhf-alp preflight --model /models/policy --url http://127.0.0.1:8000
  openrlhf-alp preflight --model /models/policy --url http://127.0.0.1:8000 \\
    --prompts math.jsonl --input-key input --max-tokens 1024 --json

In training, --rollout.preflight_every N repeats it on the run's own samples.
"""

Prompt = str | list[dict[str, str]]

PROMPTS = (
    "What is 17 * 24? Think step by step.",
    "Explain in two sentences why the sky is blue.",
    "Write a Python function that reverses the words of a sentence.",
    "A train leaves at 9:40 and arrives at 13:05. How long does it take?",
    "Name three rivers in Africa and one fact about each.",
    "Translate into French: The weather was better yesterday.",
    "Continue the story: The lighthouse keeper had not seen a ship for weeks.",
    "If 3x + 5 = 20, what is x?",
)
"""Used when no file is given: sums, prose, code and another language."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `openrlhf-alp preflight`."""
    add = parser.add_argument
    add("--model", required=True, help="folder or Hugging Face id that the learner trains")
    add("--url", required=True, nargs="+", help="base URL of the rollout service, or several")
    add("--prompts", type=Path, help="JSON lines with one prompt each (default: 8 built-in ones)")
    add("--input-key", default="input", help="field of the prompt there (default: input)")
    add("--num-prompts", type=int, default=32, help="read at most this many (default: 32)")
    add("--no-chat-template", action="store_true", help="send the prompts as they are")
    add("--samples", type=int, default=4, help="answers to each prompt (default: 4)")
    add("--max-tokens", type=int, default=128, help="longest answer (default: 128)")
    add("--temperature", type=float, default=1.0, help="--rollout.temperature (default: 1)")
    add(
        "--dtype",
        default="bf16",
        choices=("bf16", "fp16", "fp32"),
        help="--ds.param_dtype (default: bf16)",
    )
    add(
        "--attention",
        help="--ds.attn_implementation (default: flash_attention_2, without a GPU sdpa)",
    )
    add("--micro-batch", type=int, default=4, help="answers scored at once (default: 4)")
    add(
        "--push",
        action="store_true",
        help=f"first push the model's weights, as training does; needs ${ADMIN_KEY_VARIABLE}. The "
        "service keeps them, so do not use it while another run does",
    )
    add("--timeout-s", type=float, default=300.0, help="wait for service and answer (default: 300)")
    add(
        "--explain",
        action="store_true",
        help="also say where the two differ (position, probability, kind of token, layer) and test "
        "the usual causes one by one; loads the model in float32",
    )
    add("--json", action="store_true", help="print one JSON object and nothing else")


def run(arguments: argparse.Namespace) -> int:
    """Measures; returns 0 (ok, suspicious), 1 (broken) or 2 (wrong options, service not usable)."""
    view = PreflightView(Console(stderr=arguments.json))
    try:
        prompts = read_prompts(arguments)
        keys = _keys(arguments)
        view.say("loading", f"{arguments.model} as the learner does")
        # Upstream prints while it loads a model; --json promises nothing but JSON on stdout.
        with contextlib.redirect_stdout(sys.stderr):
            from openrlhf_alp.learner.launch import check_model
            from openrlhf_alp.learner.mismatch.probe import probe

            check_model(arguments.model)
            report = probe(_config(arguments, prompts, keys))
            found = explain_model(report.batch, arguments.model) if arguments.explain else None
    except (ValueError, OSError, ServiceError) as error:
        view.error(str(error))
        return 2
    if arguments.json:
        explained = {} if found is None else {"explanation": explanation_json(found)}
        print(json.dumps({**as_json(report), **explained}, indent=2))
    else:
        view.report(report)
        if found is not None:
            show(found, Console())
    return 1 if report.verdict.level is Level.BROKEN else 0


def read_prompts(arguments: argparse.Namespace) -> tuple[Prompt, ...]:
    """The prompts of the file, or the built-in ones: text, or a list of chat messages.

    Raises:
        ValueError: a line is no JSON object, or has no such field; names file and line.
        OSError: the file cannot be read.
    """
    if arguments.prompts is None:
        return PROMPTS[: arguments.num_prompts]
    prompts: list[Prompt] = []
    # Not str.splitlines, which also splits at characters that may stand inside a JSON string.
    with arguments.prompts.open(encoding="utf-8-sig") as file:
        lines = list(itertools.islice(file, arguments.num_prompts))
    for number, line in enumerate(lines, start=1):
        try:
            prompts.append(json.loads(line)[arguments.input_key])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{arguments.prompts}, line {number}: no JSON object with the field "
                f"{arguments.input_key!r} ({type(error).__name__}). Name it with --input-key."
            ) from error
    if not prompts:
        raise ValueError(f"{arguments.prompts} has no line; one prompt is needed at least")
    return tuple(prompts)


def _keys(arguments: argparse.Namespace) -> tuple[str, str | None]:
    needed = (API_KEY_VARIABLE, ADMIN_KEY_VARIABLE) if arguments.push else (API_KEY_VARIABLE,)
    require_keys(*needed, service="rollout")
    return os.environ[API_KEY_VARIABLE], os.environ.get(ADMIN_KEY_VARIABLE)


def _config(
    arguments: argparse.Namespace, prompts: tuple[Prompt, ...], keys: tuple[str, str | None]
) -> "ProbeConfig":
    import torch

    from openrlhf_alp.learner.mismatch.probe import ProbeConfig

    default_attention = "flash_attention_2" if torch.cuda.is_available() else "sdpa"
    api_key, admin_key = keys
    return ProbeConfig(
        model=arguments.model,
        urls=tuple(url.rstrip("/") for url in arguments.url),
        api_key=api_key,
        admin_key=admin_key,
        prompts=prompts,
        chat_template=not arguments.no_chat_template,
        samples_per_prompt=arguments.samples,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        dtype=arguments.dtype,
        attention=arguments.attention or default_attention,
        micro_batch_size=arguments.micro_batch,
        push=arguments.push,
        timeout_s=arguments.timeout_s,
    )


_COLORS = {Level.OK: "green", Level.SUSPICIOUS: "yellow", Level.BROKEN: "red"}
_MEANING = {
    Level.OK: "learner and service agree as far as their precision goes",
    Level.SUSPICIOUS: "they differ more than rounding explains",
    Level.BROKEN: "they do not compute the same thing: a run would train on wrong ratios",
}


class PreflightView:
    """Prints to `console`."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, stage: str, text: str) -> None:
        """One line: the stage's name, and what happens."""
        self._console.print(f"[bold cyan]{stage:<9}[/] {escape(text)}", soft_wrap=True)

    def error(self, text: str) -> None:
        self._console.print(f"[bold red]Nothing was measured.[/] {escape(text)}", soft_wrap=True)

    def report(self, report: "ProbeReport") -> None:
        """Table, weights and verdict."""
        self.say("measured", "log-ratio of the sampled tokens, learner over rollout")
        self._console.print(_table(report))
        self.say("versions", ", ".join(map(str, report.versions)))
        self.say("weights", _weights_line(report))
        if report.simulated:
            self.say("service", report.simulated)
        verdict = report.verdict
        color = _COLORS[verdict.level]
        self._console.print(
            f"[bold cyan]{'verdict':<9}[/] [bold {color}]{verdict.level}[/]: "
            f"{_MEANING[verdict.level]}",
            soft_wrap=True,
        )
        for finding in verdict.findings:
            self.say("", finding)
        for cause in verdict.causes:
            self.say("cause?", cause)


def as_json(report: "ProbeReport") -> dict[str, Any]:
    """The same for machines."""
    return {
        "verdict": str(report.verdict.level),
        "findings": list(report.verdict.findings),
        "causes": list(report.verdict.causes),
        "figures": report.mismatch.figures(),
        "limits": {
            limit.figure: {"suspicious": limit.suspicious, "broken": limit.broken}
            for limit in LIMITS
        },
        "num_samples": report.num_samples,
        "versions": list(report.versions),
        "simulated": report.simulated,
        "weights": {
            "num_tensors": report.weights.num_tensors,
            "different": list(report.weights.different),
        },
    }


def _table(report: "ProbeReport") -> Table:
    limits = {limit.figure: limit for limit in LIMITS}
    table = Table()
    for column in ("figure", "value", "suspicious", "broken"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    table.add_row("samples", str(report.num_samples), "", "")
    table.add_row("tokens", str(report.mismatch.num_tokens), "", "")
    for name, value in report.mismatch.figures().items():
        if name == "num_tokens":
            continue
        limit = limits.get(name)
        bounds = (f"{limit.suspicious:g}", f"{limit.broken:g}") if limit else ("", "")
        table.add_row(name, f"{value:+.5f}", *bounds)
    return table


def _weights_line(report: "ProbeReport") -> str:
    weights = report.weights
    if not weights.different:
        return f"all {weights.num_tensors} tensors are served as the model folder has them"
    return (
        f"{len(weights.different)} of {weights.num_tensors} tensors are not those of the model "
        f"folder, first {weights.different[0]}: another run has pushed, or it is another folder. "
        "--push makes them the folder's"
    )

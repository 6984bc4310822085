"""The `--tool.*` and `--tir.*` flags: episodes that call a Python interpreter."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from types import SimpleNamespace

from openrlhf_alp.clients.keys import TOOL_KEY_VARIABLE
from openrlhf_alp.rollouts.runners import ToolConfig


def add_tool_arguments(group: argparse._ArgumentGroup) -> None:
    """The flags of `ToolConfig`."""
    add = group.add_argument
    add(
        "--tool.service_urls",
        nargs="+",
        default=[],
        metavar="URL",
        help="tool services (python -m services.tool): episodes become tool-integrated, code that "
        f"the policy writes in ```python blocks is run there; key from ${TOOL_KEY_VARIABLE}",
    )
    add("--tool.session", action="store_true", help="one interpreter per episode, state is kept")
    add("--tool.timeout_s", type=float, default=5.0, help="wall time of one program")
    add(
        "--tool.request_timeout_s",
        type=float,
        default=120.0,
        help="longest wait for one result, queueing and retries included",
    )
    add("--tir.max_tool_turns", type=int, default=5, help="programs per episode at most")
    add(
        "--tir.max_tokens_per_turn",
        type=int,
        default=None,
        metavar="N",
        help="sampled tokens of one turn; default: what --rollout.max_new_tokens, the budget of "
        "the whole episode after its prompt, leaves",
    )
    add("--tir.max_output_chars", type=int, default=512, help="of each stream of a program")
    add(
        "--tir.void",
        choices=["trajectory", "turn", "off"],
        default="trajectory",
        help="a turn with neither code nor \\boxed{} answer leaves its whole episode, itself, or "
        "nothing out of the loss",
    )
    add(
        "--tir.void_baseline",
        choices=["keep", "drop"],
        default="keep",
        help="whether a void episode's reward counts in its group's baseline",
    )
    add(
        "--tir.template",
        choices=["auto", "chat", "plain"],
        default="auto",
        help="a program's output as a user message of the chat template, or as a plain fence; "
        "auto is chat with --data.apply_chat_template",
    )


def read_tool(args: SimpleNamespace) -> ToolConfig:
    """ToolConfig from the parsed `args`."""
    template = args.tir.template
    if template == "auto":
        template = "chat" if args.data.apply_chat_template else "plain"
    return ToolConfig(
        urls=tuple(url.rstrip("/") for url in args.tool.service_urls),
        session=args.tool.session,
        timeout_s=args.tool.timeout_s,
        request_timeout_s=args.tool.request_timeout_s,
        max_tool_turns=args.tir.max_tool_turns,
        max_tokens_per_turn=args.tir.max_tokens_per_turn,
        max_output_chars=args.tir.max_output_chars,
        void=args.tir.void,
        void_baseline=args.tir.void_baseline,
        template=template,
    )


def check_tool(args: SimpleNamespace) -> None:
    """Compare `args.tool_service` with the other flags.

    Raises:
        ValueError: flags that contradict each other; the message names them and the fix.
    """
    tool: ToolConfig = args.tool_service
    if not tool.urls:
        if replace(tool, template="plain") != ToolConfig(template="plain"):
            raise ValueError(
                "--tool.* and --tir.* flags are given, but no --tool.service_urls: episodes would "
                "have one turn and no tool. Add the URLs, or drop the flags."
            )
        return
    for url in tool.urls:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"--tool.service_urls {url}: must begin with http:// or https://")
    if not args.rollout_service.urls:
        raise ValueError(
            "--tool.service_urls needs --rollout.service_urls: the learner drives the episode over "
            "both services. On OpenRLHF's own engines drop it, export OPENRLHF_ALP_TOOL_URLS, and "
            "give --train.agent_func_path the path of openrlhf_alp/learner/agent.py."
        )
    if not os.environ.get(TOOL_KEY_VARIABLE):
        raise ValueError(
            f"{TOOL_KEY_VARIABLE} is not set: the tool service prints its key when it starts; "
            "export it, or start the service with a key of your own."
        )
    if tool.void_baseline == "drop" and args.algo.advantage.estimator not in _MEAN_BASELINES:
        raise ValueError(
            "--tir.void_baseline drop takes void episodes out of a group's mean, but "
            f"--algo.advantage.estimator {args.algo.advantage.estimator} has no such mean. Use one "
            f"of {', '.join(sorted(_MEAN_BASELINES))}, or --tir.void_baseline keep."
        )


_MEAN_BASELINES = frozenset({"group_norm", "reinforce_baseline", "dr_grpo"})

"""What OpenRLHF reads of an Episode: its response dictionary, and the metrics of tool use.

OpenRLHF averages the numbers of its episodes over a step. The average of a ratio would weigh every
episode alike, so an episode carries numerators and denominators, and `with_ratios` divides their
means.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from openrlhf_alp.episodes.observation import CodeStatus
from openrlhf_alp.episodes.records import Episode, TurnKind
from openrlhf_alp.rollouts.runners import ToolConfig

VOID = "tir/void"
"""1.0 for an episode with a void turn; its mean is the share of void episodes."""

_SHARE, _REWARD, _REWARD_AT = "tir/share_calls_", "tir/reward_calls_", "tir/reward_at_calls_"


def to_response(
    episode: Episode, *, tool: ToolConfig | None = None, whole: bool = False
) -> dict[str, Any]:
    """Return the dictionary that OpenRLHF's `_process_response_into_experience` reads.

    Args:
        tool: given for tool-integrated episodes; adds their metrics and removes void turns from the
            loss.
        whole: add the episode itself, for `--alp.record`.
    """
    return {
        **({"episode": episode} if whole else {}),
        "prompt": episode.prompt,
        "label": episode.label,
        "observation_tokens": list(episode.token_ids),
        "action_ranges": episode.trained_ranges(tool.void if tool else "off"),
        "rollout_log_probs": list(episode.logprobs),
        "reward": episode.reward,
        "scores": episode.reward,
        "truncated": episode.truncated,
        "token_versions": [(span.version, span.end - span.start) for span in episode.spans],
        "extra_logs": {
            "rollout/policy_version": float(episode.max_version),
            **{f"reward/{name}": value for name, value in episode.reward_detail.items()},
            **(tool_metrics(episode, tool) if tool else {}),
        },
    }


def tool_metrics(episode: Episode, tool: ToolConfig) -> dict[str, float]:
    """Return the numbers of one episode, in seconds where the name ends in `_s`.

    Every episode of a run has the same names in the same order, because OpenRLHF stacks them.
    """
    num_calls = len(episode.tool_calls)
    num_after_prompt = len(episode.token_ids) - episode.turns[0].end
    run_s = sum(call.run_s for call in episode.tool_calls)
    statuses = [call.status for call in episode.tool_calls]
    kinds = [turn.kind for turn in episode.turns]
    numbers = {
        "tir/turns": float(kinds.count(TurnKind.ACTION)),
        "tir/tool_calls": float(num_calls),
        VOID: float(episode.void),
        "tir/truncated": float(episode.truncated),
        "tir/action_share": episode.num_actions / num_after_prompt,
        "tir/generate_s": episode.timings.generate_s,
        "tir/tool_s": episode.timings.tool_s,
        "tir/tool_wait_s": episode.timings.tool_s - run_s,
        "tir/reward_s": episode.timings.reward_s,
        **{f"tir/status_{status}": float(statuses.count(status)) for status in CodeStatus},
    }
    # One pair for each possible number of calls, so that the names do not depend on the episode.
    for count in range(tool.max_tool_turns + 1):
        share = float(num_calls == count)
        numbers[f"{_SHARE}{count}"] = share
        numbers[f"{_REWARD}{count}"] = share * episode.reward
    return numbers


def with_ratios(means: Mapping[str, float]) -> dict[str, float]:
    """Return a step's metrics with quotients of means in place of their numerators.

    Adds `tir/tool_latency_s` (seconds per call) and `tir/reward_at_calls_K` (mean reward of the
    episodes with K calls); both are left out when nothing was counted.
    """
    metrics = {name: value for name, value in means.items() if not name.startswith(_REWARD)}
    if means.get("tir/tool_calls"):
        metrics["tir/tool_latency_s"] = means["tir/tool_s"] / means["tir/tool_calls"]
    for name, share in means.items():
        if name.startswith(_SHARE) and share:
            count = name.removeprefix(_SHARE)
            metrics[f"{_REWARD_AT}{count}"] = means[f"{_REWARD}{count}"] / share
    return metrics

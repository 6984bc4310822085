"""Metrics of tool-integrated episodes: per episode, and what follows from their means over a step.

OpenRLHF averages the numbers of its episodes and knows nothing of ratios; so an episode carries
numerators and denominators, and `with_ratios` divides their means.
"""

from __future__ import annotations

from collections.abc import Mapping

from openrlhf_alp.episodes.code_blocks import CodeStatus
from openrlhf_alp.episodes.records import Episode, TurnKind
from openrlhf_alp.learner.flags.tool import ToolConfig

VOID = "tir/void"
"""1.0 for an episode with a void turn; its mean is the void share."""

_SHARE, _REWARD, _REWARD_AT = "tir/share_calls_", "tir/reward_calls_", "tir/reward_at_calls_"


def tool_metrics(episode: Episode, tool: ToolConfig) -> dict[str, float]:
    """Numbers of one episode, seconds where the name ends in `_s`.

    The same names in the same order for every episode of a run: OpenRLHF stacks them.
    """
    num_calls = len(episode.tool_calls)
    num_after_prompt = len(episode.token_ids) - episode.turns[0].end
    run_s = sum(call.run_s for call in episode.tool_calls)
    statuses = [call.status for call in episode.tool_calls]
    kinds = [turn.kind for turn in episode.turns]
    return {
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
        **_by_calls(num_calls, episode.reward, tool.max_tool_turns),
    }


def _by_calls(num_calls: int, reward: float, max_tool_turns: int) -> dict[str, float]:
    numbers = {}
    for count in range(max_tool_turns + 1):
        share = float(num_calls == count)
        numbers[f"{_SHARE}{count}"] = share
        numbers[f"{_REWARD}{count}"] = share * reward
    return numbers


def with_ratios(means: Mapping[str, float]) -> dict[str, float]:
    """A step's metrics with the quotients of means in place of their numerators.

    Adds `tir/tool_latency_s` (seconds per call) and `tir/reward_at_calls_K` (mean reward of the
    episodes with K calls); both are left out where nothing was counted.
    """
    metrics = {name: value for name, value in means.items() if not name.startswith(_REWARD)}
    if means.get("tir/tool_calls"):
        metrics["tir/tool_latency_s"] = means["tir/tool_s"] / means["tir/tool_calls"]
    for name, share in means.items():
        if name.startswith(_SHARE) and share:
            count = name.removeprefix(_SHARE)
            metrics[f"{_REWARD_AT}{count}"] = means[f"{_REWARD}{count}"] / share
    return metrics

"""Which reward scores an episode: ours, a Python file, or an HTTP reward model."""

from __future__ import annotations

from collections.abc import Sequence

from openrlhf.utils.agent import SingleTurnAgentExecutor

from openrlhf_alp.rewards.math import MathReward
from openrlhf_alp.rewards.protocol import Reward, RewardResult, RewardUnavailable

MATH_VERIFY = "math-verify"


def build_reward(remote_urls: Sequence[str]) -> Reward:
    """The reward named by `--reward.remote_url`.

    Args:
        remote_urls: `["math-verify"]`, one `*.py` with OpenRLHF's `reward_func`, or reward servers.
    """
    if list(remote_urls) == [MATH_VERIFY]:
        return MathReward()
    return UpstreamReward(remote_urls)


class UpstreamReward:
    """OpenRLHF's own reward protocols, a `reward_func` file or an HTTP server, as our Protocol."""

    def __init__(self, remote_urls: Sequence[str]) -> None:
        self._executor = SingleTurnAgentExecutor(list(remote_urls))

    async def score(self, *, prompt: str, response: str, label: str) -> RewardResult:
        """Ask for `rewards` of prompt + response.

        Raises:
            RewardUnavailable: the function or server failed, or gave no reward.
        """
        call = (
            self._executor._fetch_rewards_via_func
            if self._executor.reward_func
            else self._executor._fetch_rewards_via_http
        )
        try:
            answers = await call([prompt + response], [prompt], [label])
            value = float(answers[0]["rewards"])
        except Exception as error:
            raise RewardUnavailable(
                reason=type(error).__name__, detail=f"{error} (--reward.remote_url)"
            ) from error
        return RewardResult(value=value)

from statistics import fmean

import pytest

from openrlhf_alp.episodes.records import (
    Episode,
    StopReason,
    Timings,
    ToolCall,
    Turn,
    TurnKind,
    VersionSpan,
)
from openrlhf_alp.rollouts.response import to_response, tool_metrics, with_ratios
from openrlhf_alp.rollouts.runners import ToolConfig

TOOL = ToolConfig(urls=("http://tool",), max_tool_turns=2)


def make_episode(*, calls: int, reward: float, void: bool = False) -> Episode:
    """A prompt of 2, then per call an action of 3 and an observation of 1, then an action of 2."""
    turns = [Turn(kind=TurnKind.PROMPT, start=0, end=2, text="q")]
    for _ in range(calls):
        start = turns[-1].end
        turns.append(Turn(kind=TurnKind.ACTION, start=start, end=start + 3, text="c"))
        turns.append(Turn(kind=TurnKind.OBSERVATION, start=start + 3, end=start + 4, text="o"))
    start = turns[-1].end
    turns.append(Turn(kind=TurnKind.ACTION, start=start, end=start + 2, text="a", void=void))
    acting = [turn.kind is TurnKind.ACTION for turn in turns for _ in range(turn.end - turn.start)]
    return Episode(
        request_id="r",
        prompt="q",
        label="l",
        token_ids=tuple(range(len(acting))),
        logprobs=tuple(-0.5 if action else 0.0 for action in acting),
        action_mask=tuple(acting),
        turns=tuple(turns),
        spans=tuple(
            VersionSpan(version=1, digest="d", start=turn.start, end=turn.end)
            for turn in turns
            if turn.kind is TurnKind.ACTION
        ),
        stop_reason=StopReason.EOS,
        reward=reward,
        tool_calls=(ToolCall(code="1", status="ok", total_s=0.5, run_s=0.25),) * calls,
        timings=Timings(generate_s=2.0, reward_s=0.125, tool_s=0.5 * calls),
    )


def test_an_episodes_numbers_are_counted_by_hand():
    numbers = tool_metrics(make_episode(calls=2, reward=1.0), TOOL)
    assert (numbers["tir/turns"], numbers["tir/tool_calls"]) == (3.0, 2.0)
    assert numbers["tir/action_share"] == pytest.approx(8 / 10)
    assert (numbers["tir/tool_s"], numbers["tir/tool_wait_s"]) == (1.0, 0.5)
    assert (numbers["tir/status_ok"], numbers["tir/status_timeout"]) == (2.0, 0.0)
    assert (numbers["tir/void"], numbers["tir/truncated"]) == (0.0, 0.0)


def test_every_episode_has_the_same_names_in_the_same_order():
    names = {
        tuple(tool_metrics(make_episode(calls=calls, reward=0.0, void=void), TOOL))
        for calls in range(3)
        for void in (True, False)
    }
    assert len(names) == 1


def test_a_steps_quotients_are_those_of_its_sums():
    """Latency 0.5 s a call; episodes without a call earn 0 and 1, those with two earn 1."""
    episodes = [
        make_episode(calls=0, reward=0.0),
        make_episode(calls=0, reward=1.0),
        make_episode(calls=2, reward=1.0),
    ]
    numbers = [tool_metrics(episode, TOOL) for episode in episodes]
    step = with_ratios({name: fmean(n[name] for n in numbers) for name in numbers[0]})
    assert step["tir/tool_latency_s"] == pytest.approx(0.5)
    assert step["tir/reward_at_calls_0"] == pytest.approx(0.5)
    assert step["tir/reward_at_calls_2"] == pytest.approx(1.0)
    assert "tir/reward_at_calls_1" not in step
    assert not any(name.startswith("tir/reward_calls_") for name in step)
    assert with_ratios({"loss": 1.0}) == {"loss": 1.0}


@pytest.mark.parametrize(
    ("void", "ranges"), [("off", [(2, 5), (6, 8)]), ("turn", [(2, 5)]), ("trajectory", [])]
)
def test_a_void_turn_is_left_out_of_what_is_trained_on(void, ranges):
    tool = ToolConfig(urls=TOOL.urls, void=void)
    response = to_response(make_episode(calls=1, reward=0.0, void=True), tool=tool)
    assert response["action_ranges"] == ranges
    assert response["extra_logs"]["tir/void"] == 1.0
    clean = to_response(make_episode(calls=1, reward=0.0), tool=tool)
    assert clean["action_ranges"] == [(2, 5), (6, 8)]

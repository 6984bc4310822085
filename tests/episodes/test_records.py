import dataclasses
import math

import pytest

from openrlhf_alp.episodes.records import (
    Episode,
    EpisodeError,
    SamplingConfig,
    StopReason,
    Timings,
    Turn,
    TurnKind,
    VersionSpan,
)

PROMPT = Turn(kind=TurnKind.PROMPT, start=0, end=2, text="2 + 2 =")
FIRST = Turn(kind=TurnKind.ACTION, start=2, end=4, text=" let me see")
OBSERVED = Turn(kind=TurnKind.OBSERVATION, start=4, end=5, text="4")
SECOND = Turn(kind=TurnKind.ACTION, start=5, end=7, text=" so 4")


def make_episode(**changes: object) -> Episode:
    """Seven tokens: a prompt of 2, an answer of 2, an observation of 1, an answer of 2."""
    fields: dict[str, object] = {
        "request_id": "r1",
        "prompt": "2 + 2 =",
        "label": "4",
        "token_ids": (10, 11, 12, 13, 14, 15, 2),
        "logprobs": (0.0, 0.0, -0.5, -0.25, 0.0, -1.0, -2.0),
        "action_mask": (False, False, True, True, False, True, True),
        "turns": (PROMPT, FIRST, OBSERVED, SECOND),
        "spans": (
            VersionSpan(version=3, digest="a", start=2, end=4),
            VersionSpan(version=5, digest="b", start=5, end=7),
        ),
        "stop_reason": StopReason.EOS,
        "reward": 1.0,
        "timings": Timings(generate_s=0.1, reward_s=0.2),
    }
    return Episode(**{**fields, **changes})  # type: ignore[arg-type]


def test_an_episode_reads_its_ranges_and_versions_from_turns_and_spans():
    episode = make_episode()
    assert episode.action_ranges == ((2, 4), (5, 7))
    assert episode.num_actions == 4
    assert (episode.min_version, episode.max_version) == (3, 5)
    assert not episode.truncated
    assert make_episode(stop_reason=StopReason.LENGTH).truncated


def test_an_episode_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_episode().reward = 0.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logprobs": (0.0,) * 6}, r"lengths \(7, 6, 7\)"),
        ({"logprobs": (0.0, 0.0, math.nan, -0.25, 0.0, -1.0, -2.0)}, "nan at sampled position 2"),
        ({"logprobs": (0.0, 0.0, -0.5, -math.inf, 0.0, -1.0, -2.0)}, "-inf at sampled position 3"),
        ({"logprobs": (0.0, 0.0, -0.5, -0.25, -1.0, -1.0, -2.0)}, "position 4 was not sampled"),
        ({"turns": (PROMPT, FIRST, SECOND)}, "does not follow position 4"),
        ({"turns": (PROMPT, FIRST, OBSERVED)}, "turns end at 5, tokens at 7"),
        (
            {"action_mask": (False, True, True, True, False, True, True)},
            "disagrees with action_mask",
        ),
        (
            {"spans": (VersionSpan(version=3, digest="a", start=2, end=4),)},
            "cover 2 positions, 4 tokens",
        ),
        ({"reward": math.nan}, "must raise RewardUnavailable"),
    ],
)
def test_an_episode_that_breaks_the_token_axis_is_refused_with_its_request_id(changes, message):
    with pytest.raises(EpisodeError, match=message) as caught:
        make_episode(**changes)
    assert "request r1" in str(caught.value)


def test_an_episode_without_a_sampled_token_is_refused():
    with pytest.raises(EpisodeError, match="nothing to train on"):
        make_episode(action_mask=(False,) * 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"top_p": 0.0}, r"top_p=0.0 is not possible: it must be in \(0, 1\]"),
        ({"top_p": math.nan}, "top_p=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"min_tokens": 9}, r"min_tokens=9 is not possible: it must be in \[0, 8\]"),
    ],
)
def test_a_sampling_value_out_of_range_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**{"max_tokens": 8, **changes})


def test_a_span_moves_to_another_axis_whole():
    span = VersionSpan(version=1, digest="d", start=0, end=3).shifted(10)
    assert (span.version, span.digest, span.start, span.end) == (1, "d", 10, 13)

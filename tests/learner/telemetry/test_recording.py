"""What a run trains on is what it records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from openrlhf.trainer.ppo_utils.experience import Experience

from openrlhf_alp.episodes.records import (
    Episode,
    StopReason,
    Timings,
    ToolCall,
    Turn,
    TurnKind,
    VersionSpan,
)
from openrlhf_alp.learner.experience import EPISODE, SAMPLE_ID
from openrlhf_alp.learner.telemetry.recording import StepRecorder
from openrlhf_alp.replay.files.read import read_batch
from openrlhf_alp.replay.files.write import step_file
from openrlhf_alp.rollouts.response import to_response
from openrlhf_alp.rollouts.runners import ToolConfig

Parse = Callable[..., SimpleNamespace]
SERVICE = ("--rollout.service_urls", "http://127.0.0.1:1")


def episode(name: str) -> Episode:
    """A program, its output, and an answer; the first turn is void."""
    return Episode(
        request_id=name,
        prompt="q",
        label="4",
        token_ids=(5, 6, 7, 8, 9, 10),
        logprobs=(0.0, 0.0, -0.5, -1.0, 0.0, -2.0),
        action_mask=(False, False, True, True, False, True),
        turns=(
            Turn(kind=TurnKind.PROMPT, start=0, end=2, text="q"),
            Turn(kind=TurnKind.ACTION, start=2, end=4, text="code", void=True),
            Turn(kind=TurnKind.OBSERVATION, start=4, end=5, text="4"),
            Turn(kind=TurnKind.ACTION, start=5, end=6, text="4"),
        ),
        spans=(
            VersionSpan(version=2, digest="d", start=2, end=4),
            VersionSpan(version=2, digest="d", start=5, end=6),
        ),
        stop_reason=StopReason.EOS,
        reward=1.0,
        reward_detail={"parsed": 1.0},
        tool_calls=(ToolCall(code="2+2", status="ok", total_s=1, run_s=0.5, output="4"),),
        timings=Timings(generate_s=1, reward_s=0),
    )


def test_a_step_is_recorded_with_episodes_advantages_and_what_was_trained(
    parse: Parse, tmp_path: Path, service_keys: None
) -> None:
    args = parse(*SERVICE, "--alp.record", str(tmp_path), "--alp.method", "seq-alp")
    recorder = StepRecorder(args)
    episodes = [episode("a"), episode("b")]
    samples = [
        Experience(info={SAMPLE_ID: torch.tensor([7 + i]), EPISODE: [e], "reward": torch.ones(1)})
        for i, e in enumerate(episodes)
    ]
    contract = {"version": 2, "digest": "d", "tokenizer_hash": "t"}
    recorder.begin(samples, step=3, contract=contract)
    # Upstream merges what is left of `info` as tensors.
    assert all(EPISODE not in sample.info for sample in samples)
    ranges = to_response(episodes[0], tool=ToolConfig(void="turn"))["action_ranges"]
    assert ranges == [(5, 6)]
    mask = torch.tensor([[0, 0, 0, 0, 1, 0]] * 2)  # of (B, T - 1), padded by one
    merged = Experience(
        action_mask=mask,
        advantages=torch.tensor([[9.0, 9, 9, 9, 0.5, 9], [9.0, 9, 9, 9, -0.5, 9]]),
        index=[1, 0],
        info={SAMPLE_ID: torch.tensor([8, 7])},
    )
    recorder.record([merged])
    recorder.close()
    batch = read_batch(step_file(tmp_path, 3))
    assert (batch.info.step, batch.info.policy_version, batch.info.method) == (3, 2, "seq-alp")
    assert batch.info.model_digest == "d" and batch.info.contract == contract
    assert [s.request_id for s in batch.samples] == ["b", "a"]
    assert [s.advantages.tolist() for s in batch.samples] == [[0] * 5 + [0.5], [0] * 5 + [-0.5]]
    first = batch.samples[0]
    assert first.action_ranges == ((5, 6),) and first.sample == 8
    assert first.turns == episodes[1].turns and first.tool_calls == episodes[1].tool_calls
    assert first.spans == episodes[1].spans


def test_a_response_holds_its_episode_only_when_it_is_recorded() -> None:
    assert "episode" not in to_response(episode("a"))
    assert to_response(episode("a"), whole=True)["episode"] == episode("a")


def test_a_run_does_not_replace_the_record_of_another(
    parse: Parse, tmp_path: Path, service_keys: None
) -> None:
    with pytest.raises(ValueError, match=r"--alp.record needs --rollout.service_urls"):
        parse("--alp.record", str(tmp_path))
    step_file(tmp_path, 1).touch()
    with pytest.raises(ValueError, match="holds the steps of another run"):
        parse(*SERVICE, "--alp.record", str(tmp_path))
    parse(*SERVICE, "--alp.record", str(tmp_path), "--ckpt.load_enable")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        parse(*SERVICE, "--alp.record", str(step_file(tmp_path, 1)))

"""Flags of tool-integrated episodes: what follows from them, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

Parse = Callable[..., SimpleNamespace]
ROLLOUT = ("--rollout.service_urls", "http://127.0.0.1:1")
TOOL = ("--tool.service_urls", "http://127.0.0.1:2/")


def test_episodes_have_one_turn_unless_a_tool_service_is_named(parse: Parse) -> None:
    assert parse().tool_service.urls == ()


def test_the_papers_setting_is_the_default(parse: Parse, service_keys: None) -> None:
    tool = parse(*ROLLOUT, *TOOL).tool_service
    assert tool.urls == ("http://127.0.0.1:2",)
    assert (tool.max_tool_turns, tool.void, tool.void_baseline) == (5, "trajectory", "keep")
    assert tool.limits.max_tool_turns == 5


@pytest.mark.parametrize(
    ("flags", "template"),
    [
        ((), "plain"),
        (("--data.apply_chat_template",), "chat"),
        (("--data.apply_chat_template", "--tir.template", "plain"), "plain"),
    ],
)
def test_observations_are_messages_when_prompts_are(
    parse: Parse, service_keys: None, flags: tuple[str, ...], template: str
) -> None:
    assert parse(*ROLLOUT, *TOOL, *flags).tool_service.template == template


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (TOOL, "--tool.service_urls needs --rollout.service_urls"),
        ((*ROLLOUT, "--tool.session"), "but no --tool.service_urls"),
        ((*ROLLOUT, "--tir.max_tool_turns", "3"), "but no --tool.service_urls"),
        ((*ROLLOUT, "--tool.service_urls", "127.0.0.1:2"), "must begin with http://"),
        ((*ROLLOUT, *TOOL, "--tir.max_tool_turns", "-1"), "max_tool_turns=-1"),
        ((*ROLLOUT, *TOOL, "--tir.max_output_chars", "1"), "max_output_chars=1"),
        ((*ROLLOUT, *TOOL, "--tool.timeout_s", "0"), "--tool.timeout_s is 0"),
        (
            (*ROLLOUT, *TOOL, "--tir.void_baseline", "drop", "--algo.advantage.estimator", "rloo"),
            "--algo.advantage.estimator rloo has no such mean",
        ),
    ],
)
def test_flags_that_contradict_each_other_are_refused_with_the_fix(
    parse: Parse, service_keys: None, flags: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        parse(*flags)


def test_a_missing_key_names_its_variable(
    parse: Parse, service_keys: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENRLHF_ALP_TOOL_API_KEY")
    with pytest.raises(ValueError, match="OPENRLHF_ALP_TOOL_API_KEY is not set"):
        parse(*ROLLOUT, *TOOL)

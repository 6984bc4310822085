import pytest

from services.tool.sandbox.plan import Level
from services.tool.settings import ToolSettings


def test_every_setting_is_an_environment_variable_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENRLHF_ALP_TOOL_SLOTS", "3")
    monkeypatch.setenv("OPENRLHF_ALP_TOOL_PRESETS", "numpy,sympy")
    monkeypatch.setenv("OPENRLHF_ALP_TOOL_URLS", "is read by learners, not by the service")
    sandbox = ToolSettings().sandbox
    assert sandbox.launchers == 3
    assert sandbox.presets == ("numpy", "sympy")
    assert ToolSettings(slots=5).slots == 5


def test_the_level_is_none_until_one_is_asked_for() -> None:
    assert (ToolSettings().level, ToolSettings().min_level) == (None, Level.BASIC)
    asked = ToolSettings(isolation="uid", min_isolation="full")
    assert (asked.level, asked.min_level) == (Level.UID, Level.FULL)
    insecure = ToolSettings(isolation="uid", allow_insecure=True)
    assert (insecure.level, insecure.min_level) == (Level.NONE, Level.NONE)


def test_a_log_level_may_be_written_small() -> None:
    assert ToolSettings(log_level="warning").log_level == "WARNING"

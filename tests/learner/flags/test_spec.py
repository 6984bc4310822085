"""A field with a docstring is a flag with name, type, default and help, and it is read back."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, fields
from typing import Literal

import pytest
from openrlhf.utils.config import hierarchize

from openrlhf_alp.learner.flags.settle import add_arguments
from openrlhf_alp.learner.flags.spec import add_flags, read_flags
from openrlhf_alp.rollouts.runners import ToolConfig
from services.common.wire import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE, TOOL_KEY_VARIABLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    width: float | None = field(default=None, metadata={"none": "auto"})
    """How wide, in 10 % of the whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    on: bool = False
    """Switch it on."""
    names: tuple[str, ...] = field(default=(), metadata={"name": "all_names", "metavar": "NAME"})
    """Names."""
    pair: tuple[int, int] | None = None
    """Two numbers."""
    kind: Literal["a", "b"] = field(default="a", metadata={"prefix": "other"})
    """Which kind."""
    inner: Inner = field(default_factory=Inner)


def parser() -> argparse.ArgumentParser:
    built = argparse.ArgumentParser(prog="test")
    add_flags(built.add_argument_group("ours"), Outer, "box")
    return built


def read(*flags: str) -> Outer:
    return read_flags(hierarchize(parser().parse_args(flags)), Outer, "box")


def test_without_flags_every_field_has_its_default() -> None:
    assert read() == Outer()


def test_every_kind_of_field_is_read_back() -> None:
    given = read(
        *("--box.on", "--box.all_names", "x", "y", "--box.pair", "1", "2"),
        *("--other.kind", "b", "--box.width", "2.5"),
    )
    expected = Outer(on=True, names=("x", "y"), pair=(1, 2), kind="b", inner=Inner(width=2.5))
    assert given == expected


def test_the_word_for_none_is_the_default_and_can_be_given() -> None:
    assert read("--box.width", "auto").inner.width is None


def test_help_is_the_docstring_and_the_default() -> None:
    shown = " ".join(parser().format_help().split())
    assert "--box.width BOX.WIDTH How wide, in 10 % of the whole. (default: auto)" in shown
    assert "--other.kind {a,b} Which kind. (default: a)" in shown
    assert "--box.on Switch it on. --box.all_names NAME [NAME ...] Names. --box.pair" in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--other.kind", "c"), "invalid choice: 'c'"),
        (("--box.width", "wide"), "invalid float or 'auto' value: 'wide'"),
        (("--box.pair", "1"), "expected 2 arguments"),
    ],
)
def test_a_wrong_value_is_refused_by_the_parser(
    capsys: pytest.CaptureFixture, flags: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(flags)
    assert message in capsys.readouterr().err


def test_a_field_without_docstring_is_refused() -> None:
    @dataclass(frozen=True)
    class Mute:
        silent: int = 1

    with pytest.raises(KeyError, match="silent"):
        add_flags(argparse.ArgumentParser().add_argument_group("ours"), Mute, "box")


def test_the_help_of_ours_names_the_variables_of_the_keys() -> None:
    ours = argparse.ArgumentParser()
    add_arguments(ours)
    shown = ours.format_help()
    for variable in (API_KEY_VARIABLE, ADMIN_KEY_VARIABLE, TOOL_KEY_VARIABLE):
        assert f"${variable}" in shown


def test_every_field_of_tool_episodes_is_one_flag() -> None:
    ours = argparse.ArgumentParser()
    add_flags(ours.add_argument_group("tools"), ToolConfig, "tool")
    assert len(ours._actions) == 1 + len(fields(ToolConfig))

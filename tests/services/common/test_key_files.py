"""Keys come from files when `<variable>_FILE` names one: secrets of Docker and Kubernetes."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from services.common.settings import EXIT_CONFIG, ServiceSettings, start
from services.common.wire import (
    ADMIN_KEY_VARIABLE,
    API_KEY_VARIABLE,
    FILE_SUFFIX,
    TOOL_KEY_VARIABLE,
    read_key_files,
)

KEYS = (API_KEY_VARIABLE, ADMIN_KEY_VARIABLE, TOOL_KEY_VARIABLE)
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a key to a file that the variable names; restores the environment afterwards."""
    for name in KEYS:
        for variable in (name, name + FILE_SUFFIX):
            # Set first, so that what the code under test sets is removed afterwards.
            monkeypatch.setenv(variable, "")
            monkeypatch.delenv(variable)

    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text)
        monkeypatch.setenv(name + FILE_SUFFIX, str(path))
        return path

    return write


@pytest.mark.parametrize("name", KEYS)
def test_a_key_is_read_from_the_file_without_the_space_around_it(write: Write, name: str) -> None:
    write(name, "correct horse\n")
    read_key_files()
    assert os.environ[name] == "correct horse"
    read_key_files()  # as a child process would, which inherits the environment
    assert os.environ[name] == "correct horse"


def test_without_a_file_nothing_changes(write: Write) -> None:
    read_key_files()
    assert not any(name in os.environ for name in KEYS)


def test_two_sources_of_one_key_are_refused(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write(API_KEY_VARIABLE, "one")
    monkeypatch.setenv(API_KEY_VARIABLE, "other")
    with pytest.raises(ValueError, match=f"Both {API_KEY_VARIABLE} and {API_KEY_VARIABLE}_FILE"):
        read_key_files()


def test_a_file_that_is_missing_or_empty_is_named(write: Write) -> None:
    path = write(TOOL_KEY_VARIABLE, " \n")
    with pytest.raises(ValueError, match="which is empty"):
        read_key_files()
    path.unlink()
    with pytest.raises(ValueError, match=f"{TOOL_KEY_VARIABLE}_FILE names a file .*{path.name}"):
        read_key_files()


def test_a_service_with_a_bad_key_file_ends_with_the_exit_code_of_configuration(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    write(API_KEY_VARIABLE, "")

    async def never(_: ServiceSettings) -> None:
        raise AssertionError("served all the same")

    assert start(ServiceSettings, never) == EXIT_CONFIG
    assert API_KEY_VARIABLE in capsys.readouterr().err

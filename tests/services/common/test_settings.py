import pytest
from pydantic import SecretStr
from pydantic_settings import SettingsConfigDict

from services.common.errors import ConfigError
from services.common.settings import ServiceSettings, is_loopback


class SomeSettings(ServiceSettings):
    """Settings of a service for tests."""

    model_config = SettingsConfigDict(env_prefix="SERVICE_")


def resolve(key: str | None, host: str) -> str:
    settings = SomeSettings(host=host, api_key=None if key is None else SecretStr(key))
    return settings.resolve_key(settings.api_key, "api_key")


def test_a_key_is_generated_on_loopback_and_differs_each_time() -> None:
    first, second = resolve(None, "127.0.0.1"), resolve(None, "::1")
    assert first != second
    assert len(first) >= 32


def test_a_key_never_shows_in_the_repr_of_the_settings() -> None:
    assert resolve("correct-horse", "0.0.0.0") == "correct-horse"
    assert "horse" not in repr(SomeSettings(api_key=SecretStr("correct-horse")))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_an_open_bind_without_a_key_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match=r"--api-key or \$SERVICE_API_KEY"):
        resolve(None, host)


@pytest.mark.parametrize("key", ["", "short", "has\nnewline-in-it", "schl\u00fcssel-lang"])
def test_a_weak_or_unsendable_key_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=r"--api-key or \$SERVICE_API_KEY"):
        resolve(key, "127.0.0.1")


def test_loopback_is_told_from_the_rest() -> None:
    assert all(map(is_loopback, ["127.0.0.1", "127.8.8.8", "::1", "localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "192.168.0.1", "localhost.example"]))

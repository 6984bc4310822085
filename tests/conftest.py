"""What holds for every test: an environment of its own, and in CI the same examples each time."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# Time says nothing on a shared machine. CI tries the same examples of the same commit each time;
# everywhere else every run searches new ones.
settings.register_profile(
    "tests",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize="CI" in os.environ,
)
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def unchanged_settings() -> Iterator[None]:
    """A key or setting that one test leaves behind would reach the services of all later ones."""
    before = _settings()
    yield
    left = {name for name in {*before, *_settings()} if before.get(name) != _settings().get(name)}
    for name in left:
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]
    assert not left, f"the test changed {', '.join(sorted(left))} and did not take it back"


def _settings() -> dict[str, str]:
    return {name: os.environ[name] for name in os.environ if name.startswith("OPENRLHF_ALP_")}

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def actors() -> Any:
    """The helpers of test_actor.py: a real actor and samples of a known mismatch."""
    spec = importlib.util.spec_from_file_location(
        "actors", Path(__file__).parents[1] / "test_actor.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

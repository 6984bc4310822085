"""The step boundary of the trainer."""

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from openrlhf_alp.learner.trainer import _ServiceTraining


@pytest.mark.timeout(60)
def test_a_step_that_is_to_be_evaluated_waits_until_its_file_is_removed(tmp_path: Path) -> None:
    file = tmp_path / "hold"
    training = _ServiceTraining()
    service = SimpleNamespace(hold_steps=2, hold_file=str(file))
    training.args = SimpleNamespace(rollout_service=service)
    training._hold(1)
    assert not file.exists()
    waiting = threading.Thread(target=training._hold, args=(4,), daemon=True)
    waiting.start()
    while not file.exists():
        assert waiting.is_alive()
    assert file.read_text() == "4"
    file.unlink()
    waiting.join(timeout=30)
    assert not waiting.is_alive()

"""Working folders: removed at the end, and by the next service when their owner was killed."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from services.tool.sandbox.host.work_root import WorkRoot


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_folder_is_removed_with_everything_in_it(temporary: Path) -> None:
    root = WorkRoot()
    (root.path / "slot").mkdir()
    (root.path / "slot" / "file").write_text("x")
    root.empty()
    assert list(root.path.iterdir()) == []
    root.remove()
    assert list(temporary.iterdir()) == []


def test_what_a_killed_service_left_is_removed_and_what_is_in_use_stays(temporary: Path) -> None:
    code = (
        f"import os, tempfile; tempfile.tempdir = {str(temporary)!r}\n"
        "from services.tool.sandbox.host.work_root import WorkRoot\n"
        "WorkRoot()\nos.kill(os.getpid(), 9)"
    )
    repository = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", code], cwd=repository, timeout=60)
    (abandoned,) = temporary.iterdir()
    first = WorkRoot()
    assert not abandoned.exists()
    second = WorkRoot()
    assert first.path.exists()
    first.remove()
    second.remove()

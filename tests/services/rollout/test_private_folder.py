import subprocess
import sys
from pathlib import Path

from services.rollout.private_folder import PrivateFolder

OWNER = """
import os, signal, sys
from pathlib import Path
from services.rollout.private_folder import PrivateFolder
print(PrivateFolder(Path(sys.argv[1]), "mine-").path, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_owner_left_is_removed_by_the_next(tmp_path: Path) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True, check=False
    )
    left = Path(killed.stdout.strip())
    assert left.is_dir()
    folder = PrivateFolder(tmp_path, "mine-")
    assert not left.exists() and folder.path.is_dir()
    folder.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_whose_owner_lives_and_a_stranger_stay(tmp_path: Path) -> None:
    stranger = tmp_path / "mine-without-a-lock"
    stranger.mkdir()
    first = PrivateFolder(tmp_path, "mine-")
    second = PrivateFolder(tmp_path, "mine-")
    assert first.path.is_dir() and second.path.is_dir() and stranger.is_dir()
    first.close()
    assert second.path.is_dir()
    second.close()

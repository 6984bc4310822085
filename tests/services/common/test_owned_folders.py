"""Owned folders: removed at the end, and by the next process when their owner was killed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.common import owned_folders
from services.common.owned_folders import LOCK_NAME, OwnedFolder, remove_abandoned_folders

REPOSITORY = Path(__file__).parents[3]
KILLED_OWNER = """
import os, signal, sys
from pathlib import Path
from services.common.owned_folders import OwnedFolder
folder = OwnedFolder.create(Path(sys.argv[1]), "mine-")
(folder.path / "file").write_text("x")
os.kill(os.getpid(), signal.SIGKILL)
"""


def leave_abandoned(parent: Path) -> Path:
    """Have a process make a folder and kill itself."""
    argv = [sys.executable, "-c", KILLED_OWNER, str(parent)]
    subprocess.run(argv, cwd=REPOSITORY, timeout=60)
    (abandoned,) = parent.iterdir()
    return abandoned


def test_a_folder_is_removed_with_everything_in_it(tmp_path: Path) -> None:
    folder = OwnedFolder.create(tmp_path, "mine-")
    (folder.path / "slot").mkdir()
    (folder.path / "slot" / "file").write_text("x")
    folder.remove()
    folder.remove()
    assert list(tmp_path.iterdir()) == []


def test_left_overs_that_cannot_be_removed_stay_locked_and_do_not_stop_the_next_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    abandoned = leave_abandoned(tmp_path)
    (abandoned / "folder" / "below").mkdir(parents=True)
    monkeypatch.setattr(owned_folders, "_REMOVAL_S", -1.0)  # no time for anything
    OwnedFolder.create(tmp_path, "mine-").remove()
    assert (abandoned / LOCK_NAME).exists() and (abandoned / "folder").exists()
    monkeypatch.undo()
    OwnedFolder.create(tmp_path, "mine-").remove()
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_a_removal_does_not_stop_the_next_owner(tmp_path: Path) -> None:
    leave_abandoned(tmp_path)

    def fail(folder: Path) -> None:
        raise PermissionError(f"{folder} is not for us")

    folder = OwnedFolder.create(tmp_path, "mine-", remove=fail)
    assert folder.path.exists()


def test_a_tree_deeper_than_the_recursion_limit_does_not_stop_the_next_owner(
    tmp_path: Path,
) -> None:
    abandoned = leave_abandoned(tmp_path)
    here = os.open(abandoned, os.O_RDONLY)
    for _ in range(1100):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    OwnedFolder.create(tmp_path, "mine-").remove()
    assert list(tmp_path.iterdir()) == []


def test_only_its_owner_may_look_into_a_folder(tmp_path: Path) -> None:
    assert OwnedFolder.create(tmp_path, "mine-").path.stat().st_mode & 0o777 == 0o700


def test_what_a_killed_process_left_is_removed_and_what_is_in_use_stays(tmp_path: Path) -> None:
    abandoned = leave_abandoned(tmp_path)
    first = OwnedFolder.create(tmp_path, "mine-")
    assert not abandoned.exists()
    second = OwnedFolder.create(tmp_path, "mine-")
    assert first.path.exists()
    remove_abandoned_folders(tmp_path, "mine-")
    assert first.path.exists() and second.path.exists()
    first.remove()
    second.remove()


def test_a_folder_without_a_lock_and_one_of_another_prefix_stay(tmp_path: Path) -> None:
    abandoned = leave_abandoned(tmp_path)
    for name in ("mine-without-a-lock", "other-12345678"):
        (tmp_path / name).mkdir()
    remove_abandoned_folders(tmp_path, "other-")
    assert abandoned.exists()
    remove_abandoned_folders(tmp_path, "mine-")
    assert {each.name for each in tmp_path.iterdir()} == {"mine-without-a-lock", "other-12345678"}


def test_a_folder_that_another_process_removes_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, removed = owned_folders._lock, []

    def lock_of_a_removed_folder(file: Path, flags: int = 0) -> int:
        descriptor = lock(file, flags)
        if not removed:
            removed.append(file.parent)
            owned_folders.remove_tree(file.parent)
        return descriptor

    monkeypatch.setattr(owned_folders, "_lock", lock_of_a_removed_folder)
    folder = OwnedFolder.create(tmp_path, "mine-")
    assert list(tmp_path.iterdir()) == [folder.path] != removed
    os.stat(folder.path / LOCK_NAME)

"""Trees that somebody hostile made are removed without recursion and within their time."""

import os
import time
from pathlib import Path

import pytest

from services.common.trees import remove_tree


def dig(folder: Path, depth: int, mode: int = 0o700) -> None:
    """Make `depth` folders in each other, with a file beside each."""
    folder.mkdir()
    here = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=here)
        os.close(os.open("f", os.O_CREAT, dir_fd=here))
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.fchmod(here, mode)
        os.close(here)
        here = below
    os.close(here)


@pytest.mark.parametrize(("depth", "mode"), [(1500, 0o700), (3000, 0o000), (20_000, 0o500)])
def test_a_tree_deeper_than_the_recursion_limit_is_removed(depth: int, mode: int) -> None:
    # Not below tmp_path: pytest's own removal is recursive, should this fail.
    folder = Path("/dev/shm") / f"tree-{os.getpid()}-{depth}"
    dig(folder, depth, mode)
    assert remove_tree(folder, 60.0)
    assert not folder.exists()


def test_special_files_odd_names_and_links_are_removed_and_their_targets_stay(
    tmp_path: Path,
) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("x")
    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    os.mkfifo(folder / "pipe")
    (folder / "below" / "link").symlink_to(kept)
    (folder / "loop").symlink_to("loop")
    for name in (b"\xff\xfe", b"a\nb", b"-rf", b"x" * 255):
        os.mkdir(os.fsencode(folder) + b"/" + name, 0)
    (folder / "below").chmod(0)
    assert remove_tree(folder, 60.0)
    assert [each.name for each in tmp_path.iterdir()] == ["kept"]
    assert (kept / "file").read_text() == "x"


def test_a_removal_that_takes_too_long_stops_and_goes_on_at_the_next_call(tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(20_000):
        os.close(os.open(folder / str(number), os.O_CREAT))
    began = time.monotonic()
    assert not remove_tree(folder, 0.001)
    assert time.monotonic() - began < 5.0
    assert remove_tree(folder, 60.0) and not folder.exists()


def test_what_is_not_there_is_gone_and_a_file_is_removed(tmp_path: Path) -> None:
    assert remove_tree(tmp_path / "missing", 1.0)
    assert remove_tree(tmp_path / "missing" / "below", 1.0)
    (tmp_path / "file").write_text("x")
    assert remove_tree(tmp_path / "file", 1.0) and not (tmp_path / "file").exists()

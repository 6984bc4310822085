"""Cgroups: which one is ours to divide, and, where one is, that the kernel holds slots to it."""

import errno
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from services.tool.sandbox.host import cgroups
from services.tool.sandbox.host.cgroups import Cgroups, CgroupUnavailableError, own_cgroup
from services.tool.sandbox.host.execution import Job, Limits
from services.tool.sandbox.host.pool import Sandbox, SandboxConfig
from services.tool.sandbox.host.session import SandboxSession

REPOSITORY = Path(__file__).parents[4]
LIMITS = Limits(
    wall_s=30, cpu_s=30, memory_bytes=128 << 20, output_bytes=1 << 16, fetch_bytes=1 << 16
)
SLACK = SandboxConfig().scratch_bytes
FORKS_HOLD_480_MB = """
import os, time
for _ in range(8):
    if os.fork() == 0:
        kept = bytearray(60 << 20)
        time.sleep(30)
time.sleep(30)
"""
V1 = "5:memory:/jobs\n"
UNIFIED = "30 24 0:26 {root} {point} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
HYBRID = "29 24 0:25 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"


@pytest.mark.parametrize(
    ("cgroup", "mounts", "expected"),
    [
        ("0::/\n", UNIFIED.format(root="/", point="/sys/fs/cgroup"), "/sys/fs/cgroup"),
        (
            "0::/user.slice/u.scope\n",
            UNIFIED.format(root="/", point="/sys/fs/cgroup"),
            "/sys/fs/cgroup/user.slice/u.scope",
        ),
        (
            "0::/docker/abc/part\n",
            UNIFIED.format(root="/docker/abc", point="/sys/fs/cgroup"),
            "/sys/fs/cgroup/part",
        ),
        (
            V1 + "0::/\n",
            HYBRID + UNIFIED.format(root="/", point="/sys/fs/cgroup/unified"),
            "/sys/fs/cgroup/unified",
        ),
    ],
    ids=["container", "systemd", "bind mount", "hybrid"],
)
def test_the_own_cgroup_is_found(tmp_path: Path, cgroup: str, mounts: str, expected: str) -> None:
    (tmp_path / "cgroup").write_text(cgroup)
    (tmp_path / "mountinfo").write_text(mounts)
    assert own_cgroup(tmp_path)[0] == Path(expected)


@pytest.mark.parametrize(
    ("cgroup", "mounts", "cause"),
    [
        (V1, HYBRID, "without cgroup v2"),
        ("0::/jobs\n", HYBRID, "mounted"),
        ("0::/other\n", UNIFIED.format(root="/docker/abc", point="/sys/fs/cgroup"), "mounted"),
    ],
    ids=["v1 only", "not mounted", "out of sight"],
)
def test_an_own_cgroup_that_cannot_be_had_is_explained(
    tmp_path: Path, cgroup: str, mounts: str, cause: str
) -> None:
    (tmp_path / "cgroup").write_text(cgroup)
    (tmp_path / "mountinfo").write_text(mounts)
    with pytest.raises(CgroupUnavailableError, match=cause):
        own_cgroup(tmp_path)


@pytest.mark.parametrize(
    ("controllers", "processes", "cause"),
    [
        ("cpu pids", "", "no controller memory"),
        ("", "", "no controller memory and pids"),
        ("cpu memory pids", "{own}\n1\n", r"holds other processes \(1\)"),
    ],
)
def test_a_cgroup_that_is_not_ours_is_left_as_it_is(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    controllers: str,
    processes: str,
    cause: str,
) -> None:
    """Ordinary files in place of the kernel's: everything is refused before the first write."""
    before = {
        "cgroup.controllers": controllers,
        "cgroup.procs": processes.format(own=os.getpid()),
        "cgroup.subtree_control": "",
        "cgroup.type": "domain",
    }
    for name, text in before.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(cgroups, "own_cgroup", lambda: (tmp_path, tmp_path.parent))
    with pytest.raises(CgroupUnavailableError, match=cause):
        Cgroups(max_processes=8, slack_bytes=0)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user can write in delegated ones only")
def test_a_cgroup_of_systemds_own_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpu memory pids")
    (tmp_path / "cgroup.subtree_control").write_text("")
    monkeypatch.setattr(cgroups, "own_cgroup", lambda: (tmp_path, tmp_path.parent))
    monkeypatch.setattr(cgroups, "_SYSTEMD", tmp_path)
    with pytest.raises(CgroupUnavailableError, match="Delegate=yes"):
        Cgroups(max_processes=8, slack_bytes=0)
    assert (tmp_path / "cgroup.subtree_control").read_text() == ""


@pytest_asyncio.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    started = Sandbox(SandboxConfig(presets=("numpy",)))
    await started.start()
    try:
        if started.cgroups is None:
            pytest.skip(f"no delegated cgroup: {started.no_cgroups}")
        yield started
    finally:
        await started.stop()


async def test_the_kernel_ends_a_program_whose_processes_hold_too_much(sandbox: Sandbox) -> None:
    outcome = await sandbox.run(Job(code=FORKS_HOLD_480_MB), LIMITS)
    assert (outcome.status, outcome.signal) == ("memory_limit", "SIGKILL")
    # What dies may be charged a little beyond the limit.
    assert 0 <= outcome.peak_bytes - LIMITS.memory_bytes - SLACK < 1 << 20


async def test_files_have_room_besides_the_memory(sandbox: Sandbox) -> None:
    code = (
        "for name in 'ab': open(name, 'wb').write(bytes(30 << 20))\n"
        "kept = bytearray(100 << 20)\nprint(len(kept))"
    )
    outcome = await sandbox.run(Job(code=code), LIMITS)
    assert (outcome.status, outcome.stdout) == ("ok", f"{100 << 20}\n")


async def test_a_slot_has_its_own_count_of_processes(sandbox: Sandbox) -> None:
    code = (
        "import os, time\ncount = 1\ntry:\n    while True:\n"
        "        if os.fork() == 0: time.sleep(20)\n        count += 1\n"
        "except BlockingIOError: print(count)"
    )
    outcome = await sandbox.run(Job(code=code), LIMITS)
    assert outcome.status == "ok" and int(outcome.stdout) <= sandbox.config.max_processes


async def test_a_session_that_holds_too_much_ends_and_says_why(sandbox: Sandbox) -> None:
    slot = await sandbox.take("", LIMITS.memory_bytes)
    session = await SandboxSession.open(slot, LIMITS, seed=None)
    assert (await session.run_cell("x = 1\nx", 0, LIMITS)).result == "1"
    ended = await session.run_cell(FORKS_HOLD_480_MB, 1, LIMITS)
    assert (ended.outcome.status, ended.state_lost) == ("memory_limit", True)


async def test_cgroups_go_with_their_slots(sandbox: Sandbox) -> None:
    assert sandbox.cgroups is not None
    folder = sandbox.cgroups.folder
    for _ in range(5):
        await sandbox.run(Job(code="import os\nos.fork()\nprint(1)"), LIMITS)
    await sandbox.stop()
    assert not folder.exists()


async def test_a_cgroup_that_cannot_be_used_fails_what_needs_it_and_nothing_else(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_descriptors(_: cgroups.SlotCgroup) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(cgroups.SlotCgroup, "peak_bytes", out_of_descriptors)
        assert (await sandbox.run(Job(code="print(1)"), LIMITS)).status == "ok"
    with monkeypatch.context() as patch:
        patch.setattr(cgroups.SlotCgroup, "open", out_of_descriptors)
        outcomes = [await sandbox.run(Job(code="print(1)"), LIMITS) for _ in range(4)]
    assert "sandbox_error" in {outcome.status for outcome in outcomes}
    assert (await sandbox.run(Job(code="print(1)"), LIMITS)).status == "ok"


async def test_what_a_killed_service_left_is_removed(sandbox: Sandbox) -> None:
    assert sandbox.cgroups is not None
    base = sandbox.cgroups.folder.parent
    code = (
        "import os\nfrom services.tool.sandbox.host.cgroups import Cgroups\n"
        "print(Cgroups(max_processes=8, slack_bytes=0).folder, flush=True)\nos.kill(os.getpid(), 9)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    abandoned = Path(done.stdout.strip())
    assert abandoned.parent == base and abandoned.exists()
    other = Cgroups(max_processes=8, slack_bytes=0)
    other.close()
    assert not abandoned.exists() and sandbox.cgroups.folder.exists()

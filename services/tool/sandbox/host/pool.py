"""The slot pool, which the rest of the service knows as the sandbox: start, run, take a slot, stop.

It keeps `launchers` launchers alive, chooses the zygote by what the code imports and hands out
waiting slots. A launcher that dies is replaced at once; code that had not been handed to a slot yet
goes to another one.
"""

import asyncio
import contextlib
import logging
import os
import re
import site
import sys
import sysconfig
import tempfile
import time
from collections import deque
from dataclasses import asdict
from pathlib import Path

from services.common.owned_folders import OwnedFolder
from services.common.trees import remove_tree
from services.tool.sandbox.host import execution
from services.tool.sandbox.host.cgroups import Cgroups, CgroupUnavailableError
from services.tool.sandbox.host.execution import Job, Limits
from services.tool.sandbox.host.landlock import find_rights
from services.tool.sandbox.host.launcher_handle import LauncherHandle
from services.tool.sandbox.host.slots import (
    SlotFailedError,
    SlotHandle,
    ZygoteHandle,
    ZygoteLostError,
)
from services.tool.sandbox.host.verdict import Outcome, Status
from services.tool.sandbox.inside.filters import compile_filter
from services.tool.sandbox.plan import FIGURES_PRESET, Level, Plan, SandboxConfig

logger = logging.getLogger(__name__)

_LIBRARY_FOLDERS = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")
_LIBRARY_FILES = ("/etc/ld.so.cache", "/usr/share/zoneinfo")
_FOLDER_PREFIX = "tool-service-"
_UID_RANGE_START = 0x4000_0000  # far above the ids that systems and containers hand out
_UIDS_PER_LAUNCHER = 1024
_MAX_LAUNCHERS = 256
_SIGNS = {
    "sympy": re.compile(r"\bsympy\b"),
    "scipy": re.compile(r"\b(scipy|lambdify)\b"),  # sympy.lambdify imports scipy
    "pandas": re.compile(r"\bpandas\b"),
    "matplotlib": re.compile(r"\b(matplotlib|pylab|seaborn)\b|\.(plot|hist|boxplot)\b"),
}
_READY_S = 120.0
_RETRIES = 3
_MAX_DEATHS = 16
_LATELY_S = 60.0
_MAX_DELAY_S = 5.0
"""Between two starts of a launcher that does not come up."""
_CLEARING_S = 300.0


class Sandbox:
    """Owner of the launchers. Create and use it on one event loop."""

    def __init__(self, config: SandboxConfig) -> None:
        self.config = config
        self._launchers: list[LauncherHandle] = []
        self._restarting: dict[int, asyncio.Task[None]] = {}
        """Replacements on their way, by the launcher's index."""
        self._clearing: set[asyncio.Task[None]] = set()
        """Removals of the folders of dead launchers."""
        self._changed = asyncio.Event()
        """Set, and replaced by another, whenever a launcher has started or failed to."""
        self._deaths: deque[float] = deque(maxlen=_MAX_DEATHS)
        """When the last launchers died, or failed to start, on the monotonic clock."""
        self._folder: OwnedFolder | None = None
        """Holds a folder for each launcher at the levels whose slots have theirs on the disk."""
        self._num_launched = 0
        self._stopping = False
        self.cgroups: Cgroups | None = None
        self.no_cgroups = "not asked for"
        """Why there are no cgroups; empty if there are."""
        self.restarts = 0
        self.failure = ""
        """Why the last start of a launcher failed; empty once one has started."""

    async def start(self) -> None:
        """Start every launcher and wait until its zygotes have loaded and filled their queues.

        Raises:
            RuntimeError: a launcher did not come up; its standard error says why.
        """
        try:
            if self.config.level is not Level.FULL:
                self._folder = await asyncio.to_thread(
                    OwnedFolder.create, Path(tempfile.gettempdir()), _FOLDER_PREFIX
                )
            if self.config.cgroup and self.config.level is not Level.NONE:
                self._divide_cgroup()
            self._launchers = [self._launch(index) for index in range(self.config.launchers)]
            await asyncio.gather(*(self._warm(launcher) for launcher in self._launchers))
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Kill everything and remove the working folder."""
        self._stopping = True
        for task in self._restarting.values():
            task.cancel()
        for launcher in self._launchers:
            launcher.stop()
        if self._folder is not None:
            await asyncio.to_thread(self._folder.remove)
            self._folder = None
        if self.cgroups is not None:
            await asyncio.to_thread(self.cgroups.close)
            self.cgroups = None

    async def run(self, job: Job, limits: Limits) -> Outcome:
        """Run one job on a fresh slot. Never raises for what the code does."""
        try:
            needs = f"{job.code}\n{FIGURES_PRESET}" if job.figures else job.code
            slot = await self.take(needs, limits.memory_bytes)
        except (SlotFailedError, ZygoteLostError) as error:
            return Outcome(status=Status.SANDBOX_ERROR, message=f"{error}; the code never ran")
        return await execution.run(slot, job, limits)

    async def take(self, code: str, memory_bytes: int) -> SlotHandle:
        """Take a waiting slot of the smallest zygote that has what `code` imports.

        Args:
            memory_bytes: limit on all processes together, which a cgroup applies if there is one.

        Raises:
            SlotFailedError: a fence or the limit could not be set.
            ZygoteLostError: zygotes died several times in a row.
        """
        preset = preset_for(code, self.config.presets)
        for _ in range(_RETRIES):
            zygote = await self._choose(preset)
            try:
                slot = await zygote.take()
            except ZygoteLostError:
                continue  # nothing ran yet, so that another zygote may take the code
            try:
                slot.limit_memory(memory_bytes)
            except OSError as error:
                slot.kill()
                slot.close()
                raise SlotFailedError(f"the memory limit could not be set: {error}") from error
            return slot
        raise ZygoteLostError(f"zygote {preset} died {_RETRIES} times in a row")

    def processes(self) -> list[int]:
        """Pids of the launchers."""
        return [launcher.process.pid for launcher in self._launchers if launcher.alive]

    def waiting(self) -> int:
        """Slots that are fenced and waiting, over all zygotes."""
        return sum(len(zygote.queue.slots) for zygote in self._zygotes())

    def busy(self) -> int:
        """Slots that run code or hold a session, over all zygotes."""
        return sum(len(zygote.slots) for zygote in self._zygotes()) - self.waiting()

    @property
    def healthy(self) -> bool:
        """Whether every launcher is alive and has its zygotes."""
        return bool(self._launchers) and not self._restarting

    @property
    def down(self) -> bool:
        """Whether no program can run, because no launcher is up and the last start failed."""
        return bool(self.failure) and len(self._restarting) == len(self._launchers)

    def _zygotes(self) -> list[ZygoteHandle]:
        return [each for launcher in self._launchers for each in launcher.zygotes.values()]

    async def _choose(self, preset: str) -> ZygoteHandle:
        """The zygote of this preset that has a slot soonest. Raises ZygoteLostError."""
        deadline = time.monotonic() + _READY_S
        while time.monotonic() < deadline:
            alive = [launcher for launcher in self._launchers if launcher.alive]
            if alive:
                zygotes = [launcher.zygotes[preset] for launcher in alive]
                return min(zygotes, key=lambda zygote: zygote.load)
            if self.failure or self._stopping:
                break  # it is tried again, but nobody can say whether that will help
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), deadline - time.monotonic())
        raise ZygoteLostError(f"no launcher is alive: {self.failure or 'none has come up'}")

    def _launch(self, index: int) -> LauncherHandle:
        """Start a launcher. Raises OSError, RuntimeError."""
        return LauncherHandle.start(
            self._plan(index), self.config.warm_slots, self.cgroups, lambda: self._on_lost(index)
        )

    def _divide_cgroup(self) -> None:
        # A tmpfs is memory, so that a slot's files count as well. One process more is the idle one
        # that shares the slot's memory (inside/slot.py).
        try:
            self.cgroups = Cgroups(
                max_processes=self.config.max_processes + 1, slack_bytes=self.config.scratch_bytes
            )
            self.no_cgroups = ""
        except CgroupUnavailableError as error:
            self.no_cgroups = str(error)

    async def _warm(self, launcher: LauncherHandle) -> None:
        """Wait for a launcher's zygotes and fill their queues."""
        try:
            async with asyncio.timeout(_READY_S):
                for zygote in launcher.zygotes.values():
                    await zygote.ready
                    zygote.refill()
        except (ZygoteLostError, TimeoutError) as error:
            raise RuntimeError(
                "a sandbox launcher did not come up; its own message is on standard error"
            ) from error

    def _on_lost(self, index: int) -> None:
        """Replace a launcher as a whole, because the channel of one of its zygotes broke."""
        launcher = self._launchers[index] if index < len(self._launchers) else None
        if launcher is None or not launcher.alive:
            return  # each of its zygotes reports the loss
        launcher.stop()
        if self._stopping or index in self._restarting:
            return  # one that is coming up is waited for by `_restart`, which tries again
        self.restarts += 1
        self._deaths.append(time.monotonic())
        logger.error("launcher %d (pid %d) died, starting another", index, launcher.process.pid)
        self._clear(launcher)
        task = asyncio.get_running_loop().create_task(self._restart(index))
        self._restarting[index] = task

    async def _restart(self, index: int) -> None:
        """Start a launcher again and again, more and more slowly, until one is up."""
        while True:
            await asyncio.sleep(self._delay_s())
            launcher = None
            try:
                launcher = self._launchers[index] = self._launch(index)
                await self._warm(launcher)
            except Exception as error:  # whatever it is: without this loop nothing would run again
                self._deaths.append(time.monotonic())
                self.failure = f"{type(error).__name__}: {error}"
                logger.error("launcher %d cannot be started, trying again: %s", index, self.failure)
                if launcher is not None:
                    launcher.stop()
                    self._clear(launcher)
                self._announce()
                continue
            self.failure = ""
            del self._restarting[index]
            self._announce()
            return

    def _delay_s(self) -> float:
        """Seconds to wait before the next start: none at first, more the more launchers died
        lately."""
        lately = sum(time.monotonic() - death < _LATELY_S for death in self._deaths)
        return min(0.1 * 2.0 ** (lately - 4), _MAX_DELAY_S) if lately > 3 else 0.0

    def _announce(self) -> None:
        """Wake up the callers that wait for a launcher."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _clear(self, launcher: LauncherHandle) -> None:
        """Remove, in a thread, what the slots of a dead launcher left on the disk."""
        if launcher.folder is None:
            return
        task = asyncio.get_running_loop().create_task(
            asyncio.to_thread(_remove_slots, launcher.folder)
        )
        self._clearing.add(task)
        task.add_done_callback(self._clearing.discard)

    def _make_work_root(self) -> str:
        """A new folder for the slots of one launcher; empty where none is needed. Raises OSError.

        A launcher that comes after a dead one has another, which nobody is removing.
        """
        if self._folder is None:
            return ""
        self._num_launched += 1
        folder = self._folder.path / str(self._num_launched)
        # Slots of level uid pass through as other users; nobody may list what is in it.
        mode = 0o711 if os.geteuid() == 0 else 0o700
        self._folder.path.chmod(mode)
        folder.mkdir(mode)
        folder.chmod(mode)  # whatever the umask is
        return str(folder)

    def _plan(self, index: int) -> Plan:
        level = self.config.level
        fenced = level is not Level.NONE
        max_processes = self.config.max_processes + process_headroom(level)
        changes = {"max_processes": max_processes, "cgroup": self.cgroups is not None}
        return Plan(
            **asdict(self.config) | changes,
            channels=[],
            code_root=str(Path(__file__).resolve().parents[4]),
            package_paths=package_paths(),
            read_paths=read_paths(),
            uid_base=uid_base(index) if os.geteuid() == 0 and fenced else None,
            uid_count=_UIDS_PER_LAUNCHER,
            work_root=self._make_work_root(),
            seccomp=compile_filter(allow_fork=True) if fenced else "",
            no_fork_filter=compile_filter(allow_fork=False) if level is Level.BASIC else "",
            landlock=find_rights() if fenced else None,
        )


def _remove_slots(folder: Path) -> None:
    if not remove_tree(folder, _CLEARING_S):
        logger.warning("%s, which a dead launcher left, could not be removed as a whole", folder)


def preset_for(code: str, presets: tuple[str, ...]) -> str:
    """The largest preset whose name the code contains. A wrong guess costs one import."""
    for preset in reversed(presets[1:]):
        if _SIGNS[preset].search(code):
            return preset
    return presets[0]


def process_headroom(level: Level) -> int:
    """Processes that RLIMIT_NPROC counts besides the snippet's own."""
    # Root gives every slot an id of its own; at level full an idle process has the same one.
    if os.geteuid() == 0:
        return 1 if level is Level.FULL else 0
    # Otherwise all slots and sessions share the count, and at level basic everything else that the
    # user runs as well; there seccomp refuses new processes.
    return 1024 if level is Level.FULL else 4096


def uid_base(index: int) -> int:
    """First user id of a launcher's range. The pid keeps the ranges of several services apart."""
    block = (os.getpid() % 4096) * _MAX_LAUNCHERS + index
    return _UID_RANGE_START + block * _UIDS_PER_LAUNCHER


def package_paths() -> list[str]:
    """The site-packages folders of the running interpreter."""
    paths = sysconfig.get_paths()
    folders = [paths["purelib"], paths["platlib"], *site.getsitepackages()]
    return sorted({os.path.realpath(folder) for folder in folders if os.path.isdir(folder)})


def read_paths() -> list[str]:
    """What a snippet may read: standard library, site-packages, shared libraries; each by the path
    in use and by its real path."""
    paths = sysconfig.get_paths()
    base_lib = str(Path(sys.base_prefix) / "lib")
    wanted = [paths["stdlib"], paths["platstdlib"], base_lib, *package_paths()]
    wanted += [*_LIBRARY_FOLDERS, *_LIBRARY_FILES]
    found = {
        form for path in wanted if os.path.exists(path) for form in (path, os.path.realpath(path))
    }
    return sorted(found)

"""The API process's end of a launcher: starts it with its channels, and kills it."""

import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from services.tool.sandbox.host.cgroups import Cgroups
from services.tool.sandbox.host.slots import ZygoteHandle
from services.tool.sandbox.inside.snippet.figures import BACKEND
from services.tool.sandbox.plan import Plan

ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "LC_ALL": "C.UTF-8",
    "TZ": "UTC",
    "PYTHONHASHSEED": "0",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",
    "LD_BIND_NOW": "1",
    "MPLBACKEND": BACKEND,
}
"""Everything a snippet finds in os.environ, besides HOME, TMPDIR and what
inside/slot.py and inside/snippet/program.py add."""


@dataclass(slots=True, kw_only=True)
class LauncherHandle:
    """One launcher process with its zygotes."""

    process: subprocess.Popen[bytes]
    zygotes: dict[str, ZygoteHandle]
    folder: Path | None
    """Holds its slots' folders at the levels that cannot mount private ones."""
    alive: bool = True

    @classmethod
    def start(
        cls, plan: Plan, warm_slots: int, cgroups: Cgroups | None, on_lost: Callable[[], None]
    ) -> "LauncherHandle":
        """Start the process and its channels; returns before the zygotes are ready.

        Raises:
            OSError: it cannot be started, or ended at once.
        """
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in plan.presets]
        plan.channels[:] = [theirs.fileno() for _, theirs in pairs]
        code = (
            f"import sys; sys.path[:0] = {[plan.code_root, *plan.package_paths]!r}; "
            "from services.tool.sandbox.inside.launcher import main; main()"
        )
        # Without the site module and the current folder, `code` alone adds to sys.path.
        process = subprocess.Popen(
            [sys.executable, "-P", "-s", "-S", "-B", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=ENVIRONMENT,
            cwd="/",
            pass_fds=plan.channels,
            start_new_session=True,  # a Ctrl-C at the service's terminal is not for the slots
        )
        assert process.stdin is not None
        try:
            with process.stdin:
                process.stdin.write(plan.to_json().encode())
        except OSError:
            process.kill()
            process.wait()
            for pair in pairs:
                for each in pair:
                    each.close()
            raise
        zygotes = {}
        for preset, (ours, theirs) in zip(plan.presets, pairs, strict=True):
            theirs.close()  # or the channel would stay open after the zygote's death
            zygotes[preset] = ZygoteHandle(
                preset=preset, link=ours, target=warm_slots, cgroups=cgroups, on_lost=on_lost
            )
        folder = Path(plan.work_root) if plan.work_root else None
        return cls(process=process, zygotes=zygotes, folder=folder)

    def stop(self) -> None:
        """Kill the launcher, and its children with it. Waits for the process, which is instant."""
        if not self.alive:
            return
        self.alive = False
        for zygote in self.zygotes.values():
            zygote.close()
        self.process.kill()
        self.process.wait()

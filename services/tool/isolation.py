"""Find out at start what the sandbox really stops: try every forbidden thing and report the result.

A layer is active only if each of its canaries was blocked in this very run; canaries are small
programs that run like any other. Nothing is concluded from configuration. The strongest level whose
layers are all active is used; below `--min-isolation` the service does not start.
"""

import datetime
import logging
import os
import platform
from dataclasses import replace
from pathlib import Path

from services.tool.canaries import canaries
from services.tool.sandbox.host.execution import Job, Limits
from services.tool.sandbox.host.pool import Sandbox, read_paths
from services.tool.sandbox.plan import STRENGTH, Level, SandboxConfig
from services.tool.settings import ToolSettings
from services.tool.wire.schemas import IsolationReport, LayerReport

logger = logging.getLogger(__name__)

REQUIRED = {
    Level.FULL: ("process", "rlimits", "seccomp", "landlock", "namespaces", "private_files"),
    Level.UID: ("process", "rlimits", "seccomp", "landlock", "user"),
    Level.BASIC: ("process", "rlimits", "seccomp", "landlock", "no_fork", "same_user"),
    Level.NONE: (),
}
"""Layers without which a level does not count as reached."""

FIXES = {
    "process": "report this: it needs nothing from the system",
    "rlimits": "raise the hard limits of the service (ulimit -H) or lower what is configured",
    "seccomp": "a kernel with CONFIG_SECCOMP_FILTER; apt-get install libseccomp2",
    "landlock": "Linux 6.12 or later with landlock in the lsm= list (signal scopes)",
    "namespaces": "allow user namespaces: sysctl user.max_user_namespaces, "
    "kernel.apparmor_restrict_unprivileged_userns=0; in Docker a seccomp profile with clone, "
    "unshare, setns, mount, umount2, pivot_root and chroot",
    "private_files": "as for namespaces",
    "user": "run the service as root with CAP_SETUID, CAP_SETGID and CAP_KILL",
    "no_fork": "as for seccomp",
    "same_user": "as for seccomp",
    "memory_watchdog": "a mountable /proc in the sandbox's pid namespace (Docker masks it)",
    "cgroup": "start the service alone in a delegated cgroup v2: systemd-run --user --scope "
    "-p Delegate=yes, a unit with Delegate=yes, or a container that may write /sys/fs/cgroup; on a "
    "host with cgroup v1 beside it boot with systemd.unified_cgroup_hierarchy=1; until then the "
    "watchdog and RLIMIT_DATA are used instead",
}
_LIMITS = Limits(
    wall_s=5.0, cpu_s=5, memory_bytes=128 << 20, output_bytes=1 << 16, fetch_bytes=1 << 16
)


class IsolationError(RuntimeError):
    """The required level is not reached. The message is a table of what is missing and how to get
    it.
    """


async def establish(settings: ToolSettings) -> tuple[Sandbox, IsolationReport]:
    """Start the sandbox at the strongest level that its canaries confirm.

    Raises:
        IsolationError: no level at or above `--min-isolation` (or the one asked for) is reached.
    """
    wanted = [Level.FULL, Level.UID, Level.BASIC] if settings.level is None else [settings.level]
    tried: dict[Level, str] = {}
    confirmed: set[str] = set()
    for level in wanted:
        reason = _not_applicable(level, settings.min_level)
        if reason is not None:
            tried[level] = reason
            continue
        try:
            sandbox, report = await _start(replace(settings.sandbox, level=level), settings)
        except RuntimeError as error:
            tried[level] = str(error)
            continue
        missing = [name for name in REQUIRED[level] if not report.layers[name].active]
        if not missing:
            return sandbox, report
        await sandbox.stop()
        confirmed |= {name for name, layer in report.layers.items() if layer.active}
        tried[level] = _why_not(level, missing, report)
    raise IsolationError(_table(settings, tried, confirmed))


def _not_applicable(level: Level, least: Level) -> str | None:
    """Why a level is not even tried, or None."""
    if STRENGTH[level] < STRENGTH[least]:
        return f"below --min-isolation {least}"
    if level is Level.UID and os.geteuid() != 0:
        return "not root"
    # Landlock and seccomp would hold root too, but uid adds a user id per program for free.
    if level is Level.BASIC and os.geteuid() == 0:
        return "root uses uid instead"
    return None


def _why_not(level: Level, missing: list[str], report: IsolationReport) -> str:
    closed = _out_of_reach(read_paths()) if level is Level.UID else None
    if closed is not None:
        return (
            f"other users cannot enter {closed}, where the interpreter or its packages are: "
            f"chmod o+x {closed}, or install them elsewhere"
        )
    return "; ".join(f"{name}: {report.layers[name].detail}" for name in missing)


async def _start(config: SandboxConfig, settings: ToolSettings) -> tuple[Sandbox, IsolationReport]:
    """Start a sandbox and run its canaries; if its cgroups fail, start over without them."""
    sandbox = Sandbox(config)
    await sandbox.start()
    report = await report_on(sandbox, settings)
    if sandbox.cgroups is None or report.layers["cgroup"].active:
        return sandbox, report
    failed = report.layers["cgroup"]
    logger.warning("cgroup: %s; the watchdog sums memory instead", failed.detail)
    await sandbox.stop()
    sandbox, report = await _start(replace(config, cgroup=False), settings)
    report.layers["cgroup"] = failed
    return sandbox, report


async def report_on(sandbox: Sandbox, settings: ToolSettings) -> IsolationReport:
    """Run the canaries against a started sandbox and describe each layer."""
    level = sandbox.config.level
    failed, total = await _run_canaries(sandbox)
    layers = {name: _layer_report(name, sandbox, failed.get(name)) for name in FIXES}
    num_failed = sum(map(len, failed.values()))
    return IsolationReport(
        level=level.value,
        requested="strongest" if settings.level is None else settings.level.value,
        layers=layers,
        canaries_passed=total - num_failed,
        canaries=total,
        kernel=platform.release(),
        checked_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


async def _run_canaries(sandbox: Sandbox) -> tuple[dict[str, list[str]], int]:
    """Run every canary. Returns, per layer, those that were NOT blocked, and how many were run."""
    failed: dict[str, list[str]] = {}
    memory_layer = "memory_watchdog" if sandbox.cgroups is None else "cgroup"
    one_user = sandbox.config.level is Level.BASIC
    async with canaries(memory_layer, one_user=one_user) as programs:
        for canary in programs:
            failed_here = failed.setdefault(canary.layer, [])
            # The second run finds what the first one left behind.
            for _ in range(2 if canary.name == "leftovers" else 1):
                outcome = await sandbox.run(Job(code=canary.code), _LIMITS)
            if not canary.blocked(outcome):
                failed_here.append(f"{canary.name} ({outcome.status.value})")
    return failed, len(programs)


def _layer_report(name: str, sandbox: Sandbox, failed: list[str] | None) -> LayerReport:
    """Describe a layer by the canaries that it did not block; None when it had none."""
    level = sandbox.config.level
    required = name in REQUIRED[level]
    detail, fix = "every canary was blocked", FIXES[name]
    if failed is None:
        detail = "not tried at this level"
    elif failed:
        detail = "not blocked: " + ", ".join(failed)
    if name == "cgroup" and sandbox.cgroups is not None:
        detail += f"; holds {', '.join(sandbox.cgroups.controllers)}"
    elif name == "cgroup":
        detail = sandbox.no_cgroups
    elif name == "memory_watchdog" and failed is None:
        detail, fix = "not needed: the kernel counts (cgroup)", ""
    elif not required and name != "memory_watchdog":
        fix = f"none needed: level {level.value} does without"
    # None would mean that nothing was tried, and what was not tried counts as missing.
    active = failed == []
    return LayerReport(active=active, required=required, detail=detail, fix="" if active else fix)


def _table(settings: ToolSettings, tried: dict[Level, str], confirmed: set[str]) -> str:
    """Why each level was not reached, and how to get what the one asked for still needs."""
    wanted = settings.level or settings.min_level
    needed = {*REQUIRED[wanted], *REQUIRED[settings.min_level]} - confirmed
    return "\n".join(
        [
            f"The sandbox does not reach the level required ({settings.min_level}).",
            "",
            f"{'level':<8} why not",
            *(f"{level.value:<8} {reason}" for level, reason in tried.items()),
            "",
            f"{'missing':<16} how to get it",
            *(f"{name:<16} {fix}" for name, fix in FIXES.items() if name in needed),
        ]
    )


def _out_of_reach(paths: list[str]) -> str | None:
    """The first folder that other users cannot enter on the way to what programs have to read."""
    for path in map(Path, paths):
        for folder in [*reversed(path.parents), path]:
            if folder.is_dir() and not folder.stat().st_mode & 0o001:
                return str(folder)
    return None

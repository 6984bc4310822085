"""A slot: a forked child of a zygote that puts up every fence of its level, then waits for one job.

Order matters: mounts need the capabilities, the user id change needs them too, Landlock and seccomp
come last because they would refuse the steps before. A fence that cannot be put up ends the slot
before any job reaches it.
"""

import base64
import os
import resource
import shutil
import signal
import socket
from dataclasses import dataclass
from typing import NoReturn

from services.tool.sandbox import filesystem, harness, jobs, kernel, wire
from services.tool.sandbox.plan import BOX, WORK, Level, Plan

SETUP_FAILED = 70
"""Exit code of a slot that could not put up a fence (EX_SOFTWARE)."""

_STANDARD_DESCRIPTORS = 3
_JOB_FD = 3
_MAX_FD = 2**31 - 1  # one close_range call, however many sessions the zygote holds
_STACK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Fences:
    """What a zygote prepares once, so that each slot only has to apply it."""

    plan: Plan
    seccomp: bytes
    no_fork_filter: bytes
    ruleset_fd: int
    """Landlock ruleset of level full; -1 where each slot needs its own or none is applied."""
    baseline_bytes: int
    """What RLIMIT_DATA counts before the snippet allocates anything."""


def load_landlock() -> int:
    """Load py_landlock while the root directory is still the machine's. Returns the ABI, 0 when the
    kernel has none."""
    from py_landlock import landlock_sys
    from py_landlock.errors import LandlockError

    try:
        return int(landlock_sys.get_abi_version())
    except LandlockError:
        return 0


def prepare_fences(plan: Plan, baseline_bytes: int) -> Fences:
    """Decode the filter and, at level full, build the one ruleset that all slots share."""
    ruleset = -1
    if plan.level is Level.FULL:
        ruleset = _build_ruleset(["/"], filesystem.writable_paths(plan))
    return Fences(
        plan=plan,
        seccomp=base64.b64decode(plan.seccomp),
        no_fork_filter=base64.b64decode(plan.no_fork_filter),
        ruleset_fd=ruleset,
        baseline_bytes=baseline_bytes,
    )


def make_folder(plan: Plan, name: str) -> str | None:
    """The working folder of a slot at the levels that cannot mount one."""
    if plan.level is Level.FULL:
        return None
    folder = f"{plan.work_root}/{name}"
    os.mkdir(folder, 0o755)
    filesystem.make_box_folders(folder)
    return folder


def remove_folder(folder: str | None) -> None:
    """Remove what a dead slot left. rmtree does not follow links and the slot's processes are
    dead."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def sweep(uid: int) -> None:
    """Kill every process of a slot's user id (level uid), by becoming that user for a moment."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            if 0 not in os.getresuid():  # as root this call would empty the machine
                os.kill(-1, signal.SIGKILL)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


def enter(
    fences: Fences, descriptors: tuple[int, ...], uid: int | None, folder: str | None
) -> NoReturn:
    """Become a slot: fence this process, say so on the job socket, run what arrives there. Never
    returns.

    Args:
        descriptors: stdin, stdout, stderr and the job socket; every other descriptor is closed.
    """
    job = socket.socket(fileno=descriptors[3])
    try:
        kernel.die_with_parent(signal.SIGKILL)
        home = f"{BOX}/{WORK}" if folder is None else f"{folder}/{WORK}"
        _fence(fences, uid, folder)
        job = _take_descriptors(descriptors)
        os.chdir(home)
        os.environ.update(HOME=home, TMPDIR=os.path.dirname(home) + "/tmp")
    except BaseException as error:
        wire.send(job, {"failed": f"{type(error).__name__}: {error}"})
        os._exit(SETUP_FAILED)
    place = harness.Place(
        home=home,
        baseline_bytes=fences.baseline_bytes,
        alone=fences.plan.level is Level.FULL or uid is not None,
        can_fork=fences.plan.level is not Level.BASIC,
        no_fork_filter=fences.no_fork_filter,
    )
    jobs.serve(job, place)


def _fence(fences: Fences, uid: int | None, folder: str | None) -> None:
    plan = fences.plan
    if plan.level is Level.FULL:
        kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWIPC)
        filesystem.mount_box(plan)
    ruleset = fences.ruleset_fd
    if plan.level is Level.FULL and filesystem.occupied(plan):
        # Landlock looks past a mount point at what is mounted, which exists only now.
        ruleset = _build_ruleset(["/"], filesystem.writable_paths(plan))
    if folder is not None and plan.level is not Level.NONE:
        ruleset = _build_ruleset(plan.read_paths, [folder])
    _limit(plan)
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        kernel.allow_inspection()
    if plan.level is Level.NONE:
        return
    kernel.drop_capabilities()
    kernel.forbid_new_privileges()
    kernel.die_with_parent(signal.SIGKILL)
    _restrict(ruleset)
    kernel.load_seccomp(fences.seccomp)


def _limit(plan: Plan) -> None:
    limits = {
        resource.RLIMIT_NPROC: plan.max_processes,
        resource.RLIMIT_NOFILE: plan.max_open_files,
        resource.RLIMIT_FSIZE: plan.file_bytes,
        resource.RLIMIT_STACK: _STACK_BYTES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_RTPRIO: 0,
        resource.RLIMIT_NICE: 0,
    }
    for name, value in limits.items():
        resource.setrlimit(name, (value, value))


def _build_ruleset(read: list[str], write: list[str]) -> int:
    """Landlock: nothing but reading below `read` and full use of files below `write`; no TCP, no
    outside signals."""
    from py_landlock import AccessFs, landlock_sys
    from py_landlock.abi import get_supported_fs, get_supported_net, get_supported_scope

    abi = landlock_sys.get_abi_version()
    handled = get_supported_fs(abi)
    attributes = landlock_sys.RulesetAttr(
        int(handled), int(get_supported_net(abi)), int(get_supported_scope(abi))
    )
    ruleset = landlock_sys.create_ruleset(attributes)
    reading = AccessFs.READ_FILE | AccessFs.READ_DIR
    refused = (
        AccessFs.EXECUTE | AccessFs.MAKE_CHAR | AccessFs.MAKE_BLOCK | AccessFs.MAKE_SOCK
    ) | AccessFs.IOCTL_DEV
    devices = [f"/dev/{name}" for name in filesystem.DEVICES]
    rules = [(path, reading) for path in read]
    rules += [(path, handled & ~refused) for path in write]
    rules += [(path, AccessFs.READ_FILE | AccessFs.WRITE_FILE) for path in devices]
    for path, access in rules:
        _add_rule(ruleset, path, access & handled)
    return int(ruleset)


def _add_rule(ruleset: int, path: str, access: int) -> None:
    from py_landlock import AccessFs, landlock_sys

    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError):
        return  # not there or not reachable: less access, never more
    try:
        if not os.path.isdir(path):
            access &= AccessFs.READ_FILE | AccessFs.WRITE_FILE | AccessFs.TRUNCATE
        if access:
            rule = landlock_sys.PathBeneathAttr(int(access), descriptor)
            landlock_sys.add_rule(landlock_sys.RulesetFd(ruleset), rule)
    finally:
        os.close(descriptor)


def _restrict(ruleset: int) -> None:
    from py_landlock import landlock_sys

    landlock_sys.restrict_self(landlock_sys.RulesetFd(ruleset), None)


def _take_descriptors(descriptors: tuple[int, ...]) -> socket.socket:
    """Move the four descriptors to 0..3 and close all others."""
    # High copies first: a target number may still be in use by another of the four.
    copies = [os.dup(descriptor) for descriptor in descriptors]
    for target, copy in enumerate(copies):
        os.dup2(copy, target, inheritable=target < _STANDARD_DESCRIPTORS)
    os.closerange(_JOB_FD + 1, _MAX_FD)
    return socket.socket(fileno=_JOB_FD)

"""A slot: a forked child of a zygote that puts up every fence of its level, then takes one job.

The order of the fences matters: the change of user id needs the capabilities, and Landlock and
seccomp come last because they would refuse the steps before. A fence that cannot be put up ends the
slot before any job reaches it.
"""

import base64
import gc
import os
import resource
import signal
import sys
from dataclasses import dataclass, replace
from typing import NoReturn

from services.tool.sandbox import wire
from services.tool.sandbox.inside import files, filesystem, kernel, supervisor
from services.tool.sandbox.inside.snippet import program
from services.tool.sandbox.plan import BOX, WORK, LandlockRights, Level, Plan

_SETUP_FAILED = 70
"""Exit code of a slot that could not put up a fence (EX_SOFTWARE)."""

JOB_FD = 3
"""Descriptor on which a slot gets its job, after the three standard streams."""

_MAX_FD = 2**31 - 1  # one close_range call, however many sessions the zygote holds
_STACK_BYTES = 8 << 20
_HELPER_STACK = kernel.new_stack()  # each fork has its own copy
# Encoded in the zygote: a slot touches as little memory as it can.
_READY = wire.encode({"ready": True})
_STARTED = wire.encode({"started": True})


@dataclass(frozen=True, slots=True, kw_only=True)
class Fences:
    """What a zygote prepares once, so that each slot only has to apply it."""

    plan: Plan
    limits: list[tuple[int, tuple[int, int]]]
    """Resource limits: number, soft and hard value."""
    before: list[kernel.Step]
    """Calls between the change of user id and Landlock."""
    landlock: list[kernel.Step]
    """Empty where each slot needs a ruleset of its own, or none."""
    after: list[kernel.Step]
    """The system call filter, which would refuse the calls before it."""
    place: program.Place
    """The same for every slot at level full; elsewhere each slot puts its own home in."""


def prepare_fences(plan: Plan, baseline_bytes: int) -> Fences:
    """Prepare what the slots of a zygote have in common.

    Args:
        baseline_bytes: what RLIMIT_DATA counts before a snippet allocates anything.
    """
    full, fenced = plan.level is Level.FULL, plan.level is not Level.NONE
    shared = full and not filesystem.occupied(plan)
    before = [kernel.dying_with_parent(signal.SIGKILL)]
    if plan.uid_base is not None:
        # The change of user id hides this process in /proc from the watchdog.
        before.insert(0, kernel.allowing_inspection())
    if fenced:
        before += [kernel.dropping_capabilities(), kernel.forbidding_new_privileges()]
    home = f"{BOX}/{WORK}"
    if full:
        _set_home(home)
    return Fences(
        plan=plan,
        limits=_limits(plan),
        before=before,
        landlock=_own_landlock(plan, None) if shared else [],
        after=[kernel.loading_seccomp(base64.b64decode(plan.seccomp))] if fenced else [],
        place=program.Place(
            home=home,
            baseline_bytes=baseline_bytes,
            alone=full or plan.uid_base is not None,
            can_fork=plan.level is not Level.BASIC,
            no_fork_filter=base64.b64decode(plan.no_fork_filter),
        ),
    )


def folder_of(plan: Plan, name: str) -> str | None:
    """Path of a slot's folder at the levels that cannot mount one. The slot makes it itself: if
    the disk is full, that costs one slot and not the zygote."""
    return None if plan.level is Level.FULL else f"{plan.work_root}/{name}"


def sweep(uid: int) -> None:
    """Kill every process of a slot's user id (level uid), by becoming that user for a moment."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            if 0 not in os.getresuid():  # as root this call would kill the whole machine
                os.kill(-1, signal.SIGKILL)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


def enter(
    fences: Fences,
    descriptors: tuple[int, ...],
    uid: int | None,
    folder: str | None,
    cgroup: list[int],
) -> NoReturn:
    """Become a slot: fence this process, say so on the job socket, run the job that arrives there.
    Never returns.

    Args:
        descriptors: stdin, stdout, stderr and the job socket, none of them 0 to 2 and the last
            above 3; every other one is closed.
        cgroup: the way into the slot's cgroup, or nothing.
    """
    place, job_fd = fences.place, descriptors[JOB_FD]
    try:
        if fences.plan.cgroup:
            os.write(cgroup[0], b"0")  # first: only memory touched from here on counts there
        if folder is not None:
            os.mkdir(folder, 0o755)
            filesystem.make_box_folders(folder)
            place = replace(place, home=f"{folder}/{WORK}")
            _set_home(place.home)
        _fence(fences, uid, folder)
        os.chdir(place.home)
        # The descriptors are all above their targets, so none is overwritten before it is moved.
        for target, descriptor in enumerate(descriptors):
            os.dup2(descriptor, target, target != JOB_FD)
        # Everything else that the zygote had open, such as other slots' pipes and ways into rooms.
        os.closerange(JOB_FD + 1, _MAX_FD)
        job_fd = JOB_FD
        if fences.plan.level is Level.FULL:
            _start_memory_helper()
        # Last, after the helper: the slots of an ordinary user share the count.
        limit = fences.plan.max_processes
        resource.setrlimit(resource.RLIMIT_NPROC, (limit, limit))
    except BaseException as error:
        wire.send(job_fd, {"failed": f"{type(error).__name__}: {error}"})
        os._exit(_SETUP_FAILED)
    _take_job(place)


def _take_job(place: program.Place) -> NoReturn:
    """Say that the slot is ready, wait for a job and run it. Never returns.

    A job has: mode (run or session), code, files {path: base64}, fetch [path], fetch_bytes,
    figures (whether they are asked for), memory_bytes, cpu_s, seed.
    """
    program.reseed(None)
    program.rehearse()
    os.write(JOB_FD, _READY)
    try:
        job = wire.receive(JOB_FD)
    except EOFError:
        os._exit(0)  # the slot was not needed
    gc.enable()  # off in the zygote, where a collection would touch every page
    # Here and not with the other fences: the limit comes with the job.
    data = place.baseline_bytes + job["memory_bytes"]
    resource.setrlimit(resource.RLIMIT_DATA, (data, data))
    if job["seed"] is not None:
        program.reseed(job["seed"])
    sys.path.insert(0, place.home)
    try:
        files.write_files(place.home, job["files"])
    except OSError as error:
        wire.send(JOB_FD, {"refused": f"files: {error.strerror or error}"})
        os._exit(1)
    if job["mode"] == "session":
        supervisor.serve_session(JOB_FD, place)
    # From here on untrusted code may write on this socket as well: a refusal no longer counts.
    os.write(JOB_FD, _STARTED)
    if job["fetch"] or job["figures"]:
        supervisor.run_and_fetch(JOB_FD, job, place)
    program.run_program(job, place, lambda report: wire.send(JOB_FD, report))


def _start_memory_helper() -> None:
    """Start an idle process that shares this one's memory, so that this one ends at once, however
    much it holds.

    Memory is freed by the last process that uses it. That is the helper, which is killed with the
    room after the result is sent. A program that takes it over gains no more than a thread, and one
    that cannot fork.
    """
    resource.prlimit(kernel.clone_idle(0, _HELPER_STACK), resource.RLIMIT_NPROC, (0, 0))


def _fence(fences: Fences, uid: int | None, folder: str | None) -> None:
    # Built before the user id changes, while all of its paths can be opened.
    landlock = fences.landlock or _own_landlock(fences.plan, folder)
    for name, value in fences.limits:
        resource.setrlimit(name, value)
    if uid is not None:
        os.setresgid(uid, uid, uid)  # before the user id, which gives up the right to do this
        os.setresuid(uid, uid, uid)
    kernel.run(fences.before)
    kernel.run(landlock)
    kernel.run(fences.after)


def _own_landlock(plan: Plan, folder: str | None) -> list[kernel.Step]:
    if plan.landlock is None:
        return []
    read, write = ["/"], filesystem.writable_paths(plan)  # at level full the mounts limit reading
    if folder is not None:
        read, write = plan.read_paths, [folder]
    return [kernel.restricting_by_landlock(_build_ruleset(plan.landlock, read, write))]


def _set_home(home: str) -> None:
    temporary = os.path.dirname(home) + "/tmp"
    # Otherwise matplotlib would put its files into the working folder.
    os.environ.update(HOME=home, TMPDIR=temporary, MPLCONFIGDIR=temporary)


def _limits(plan: Plan) -> list[tuple[int, tuple[int, int]]]:
    limits = {
        resource.RLIMIT_NOFILE: plan.max_open_files,
        resource.RLIMIT_FSIZE: plan.file_bytes,
        resource.RLIMIT_STACK: _STACK_BYTES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_RTPRIO: 0,
        resource.RLIMIT_NICE: 0,
    }
    return [(name, (value, value)) for name, value in limits.items()]


def _build_ruleset(rights: LandlockRights, read: list[str], write: list[str]) -> int:
    """Landlock: reading below `read`, full use of files below `write`, no TCP, no signals to the
    outside. Returns the descriptor of the ruleset."""
    ruleset = kernel.create_landlock_ruleset(rights.files, rights.network, rights.scopes)
    rules = [(path, rights.reading) for path in read]
    rules += [(path, rights.writing) for path in write]
    rules += [(f"/dev/{name}", rights.devices) for name in filesystem.DEVICES]
    for path, access in rules:
        _add_rule(ruleset, path, access, rights.of_single_files)
    return ruleset


def _add_rule(ruleset: int, path: str, access: int, of_single_files: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError):
        return  # without a rule the path is refused: less access, never more
    try:
        if not os.path.isdir(path):
            access &= of_single_files
        if access:
            kernel.add_landlock_rule(ruleset, access, descriptor)
    finally:
        os.close(descriptor)

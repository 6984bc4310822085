"""Every raw system call of the sandbox, in one file that can be audited in one sitting.

Python 3.11 wraps none of these calls and no maintained package wraps all of them. libseccomp
compiles the seccomp filters (filters.py) and py_landlock knows the rights of Landlock
(host/landlock.py); this file only makes the calls. If the kernel refuses one, the function raises
OSError with its name.
"""

import ctypes
import os
import resource
import signal
import struct
from collections.abc import Sequence
from typing import Any

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000

MADV_COLLAPSE = 25

_SIGNAL_SET_BYTES = 128
_ALL_SIGNALS = ctypes.create_string_buffer(b"\xff" * _SIGNAL_SET_BYTES, _SIGNAL_SET_BYTES)
_MASK_BEFORE = ctypes.create_string_buffer(_SIGNAL_SET_BYTES)
_CLONE_VM = 0x100
CLONE_FILES = 0x400
_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_SECCOMP = 22
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_MODE_FILTER = 2
_CAPABILITY_VERSION_3 = 0x20080522
_MNT_DETACH = 2
_AT_FDCWD = -100
_AT_RECURSIVE = 0x8000
_MOUNT_ATTR_RDONLY = 0x1
_MOUNT_ATTR_NOSUID = 0x2
# These numbers are the same on x86_64 and aarch64, like every call since 424.
_SYS_MOUNT_SETATTR = 442
_SYS_LANDLOCK_CREATE_RULESET = 444
_SYS_LANDLOCK_ADD_RULE = 445
_SYS_LANDLOCK_RESTRICT_SELF = 446
_LANDLOCK_RULE_PATH_BENEATH = 1
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

_libc = ctypes.CDLL(None, use_errno=True)


class _SockFilterProgram(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


def _check(result: int, call: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    """Move this process into new namespaces; CLONE_NEWPID moves its next children instead."""
    _check(_libc.unshare(flags), "unshare")


def setns(fd: int, flags: int) -> None:
    """Enter the namespaces behind a namespace or pid descriptor."""
    _check(_libc.setns(fd, flags), "setns")


Stack = ctypes.Array[ctypes.c_char]
"""Memory for a process of `clone_idle`, which needs next to none."""


def new_stack() -> Stack:
    return ctypes.create_string_buffer(1024)


def clone_idle(flags: int, stack: Stack) -> int:
    """Start a process that only waits until it is killed; returns its pid.

    It shares this process's memory, so starting it copies nothing. It runs one function of the C
    library, pause, on `stack`, which must outlive it and is too small for a signal handler: only
    SIGKILL and SIGSTOP reach it.

    Args:
        flags: what else it shares (CLONE_FILES), namespaces that it is the first of (CLONE_NEW*),
            and the signal that its death sends; with none, no plain wait of this process sees it.
    """
    top = ctypes.addressof(stack) + len(stack)  # stacks grow downwards
    # It inherits the blocked signals. The module signal would make an object of each of them.
    _libc.pthread_sigmask(signal.SIG_BLOCK, _ALL_SIGNALS, _MASK_BEFORE)
    pid = _libc.clone(_libc.pause, ctypes.c_void_p(top), _CLONE_VM | flags, None)
    _libc.pthread_sigmask(signal.SIG_SETMASK, _MASK_BEFORE, None)
    _check(pid, "clone")
    return int(pid)


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    result = _libc.mount(
        source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode()
    )
    _check(result, f"mount {target}")


def make_read_only(target: str) -> None:
    """Make a mount and every mount below it read-only and without setuid (Linux 5.12)."""
    # struct mount_attr: attributes to set, to clear, propagation, user namespace.
    attributes = struct.pack("4Q", _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID, 0, 0, 0)
    where, size = (_AT_FDCWD, target.encode(), _AT_RECURSIVE), ctypes.c_size_t(len(attributes))
    _check(_libc.syscall(_SYS_MOUNT_SETATTR, *where, attributes, size), f"mount_setattr {target}")


def pivot_root(new_root: str) -> None:
    """Make `new_root`, a mount point, the root directory and detach the old root."""
    os.chdir(new_root)
    number = _SYS_PIVOT_ROOT[os.uname().machine]
    # The old root ends up on top of the new one, from where it is unmounted.
    _check(_libc.syscall(number, b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", _MNT_DETACH), "umount2 .")
    os.chdir("/")


def adopt_orphans() -> None:
    """Become the process that orphaned descendants are re-parented to."""
    run([prctl("PR_SET_CHILD_SUBREAPER", _PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1))])


Step = tuple[str, Any, tuple[Any, ...]]
"""A prepared system call: name, C function, arguments. A fork pays a page fault for each object
that it touches first, so calls that all forks make alike are prepared once, before the fork."""


def run(steps: Sequence[Step]) -> None:
    """Make prepared calls, in order. The first refusal raises OSError."""
    for name, function, arguments in steps:
        if function(*arguments) < 0:
            _check(-1, name)


def soft_cpu_limit_s(pid: int) -> int:
    """The soft limit of CPU time of a child that may be dead, but is not reaped yet.

    With every SIGXCPU that the kernel sends, it raises this limit by a second: so it tells the
    kernel's signals from those that a program sends itself. 0 when there is no such process.
    """
    try:
        return resource.prlimit(pid, resource.RLIMIT_CPU)[0]
    except OSError:
        return 0


def wait_for_end(pid: int) -> None:
    """Wait until a child is dead, without reaping it."""
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def prctl(name: str, option: int, argument: Any) -> Step:
    zero = ctypes.c_ulong(0)
    return f"prctl({name})", _libc.prctl, (ctypes.c_ulong(option), argument, zero, zero, zero)


def dying_with_parent(signal_number: int) -> Step:
    """Ask the kernel for `signal_number` when the parent dies. A change of user id clears it."""
    return prctl("PR_SET_PDEATHSIG", _PR_SET_PDEATHSIG, ctypes.c_ulong(signal_number))


def die_with_parent(signal_number: int) -> None:
    """Make that call now."""
    run([dying_with_parent(signal_number)])


def allowing_inspection() -> Step:
    """Undo what a change of user id does to /proc/self and to pid descriptors of this process."""
    return prctl("PR_SET_DUMPABLE", _PR_SET_DUMPABLE, ctypes.c_ulong(1))


def forbidding_new_privileges() -> Step:
    return prctl("PR_SET_NO_NEW_PRIVS", _PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1))


def dropping_capabilities() -> Step:
    """Give up every effective, permitted and inheritable capability."""
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)  # 0: this process
    return "capset", _libc.capset, (header, bytes(24))  # three sets of 64 bits, all empty


def create_landlock_ruleset(files: int, network: int, scopes: int) -> int:
    """A new Landlock ruleset that governs these rights; returns its descriptor."""
    attributes = struct.pack("3Q", files, network, scopes)
    size, flags = ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0)
    ruleset = _libc.syscall(_SYS_LANDLOCK_CREATE_RULESET, attributes, size, flags)
    _check(ruleset, "landlock_create_ruleset")
    return int(ruleset)


def add_landlock_rule(ruleset: int, access: int, path: int) -> None:
    """Grant rights for the file or folder behind descriptor `path` and what is below it."""
    attributes = struct.pack("=Qi", access, path)
    where = ctypes.c_int(ruleset), ctypes.c_int(_LANDLOCK_RULE_PATH_BENEATH)
    result = _libc.syscall(_SYS_LANDLOCK_ADD_RULE, *where, attributes, ctypes.c_uint32(0))
    _check(result, "landlock_add_rule")


def restricting_by_landlock(ruleset: int) -> Step:
    """Enforce a Landlock ruleset; needs no_new_privs."""
    call = (_SYS_LANDLOCK_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    return "landlock_restrict_self", _libc.syscall, call


def loading_seccomp(program: bytes) -> Step:
    """Load a compiled BPF program, 8 bytes per instruction; needs no_new_privs."""
    buffer = ctypes.create_string_buffer(program, len(program))
    descriptor = _SockFilterProgram(len(program) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    # byref keeps the descriptor alive, and the descriptor the buffer.
    arguments = (_PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_MODE_FILTER), ctypes.byref(descriptor))
    return "prctl(PR_SET_SECCOMP)", _libc.prctl, (*arguments, ctypes.c_ulong(0), ctypes.c_ulong(0))


def fill_with_random_bytes(address: int, length: int) -> None:
    """Fill memory of this process with random bytes."""
    count = _libc.getrandom(ctypes.c_void_p(address), ctypes.c_size_t(length), ctypes.c_uint(0))
    _check(min(count, count - length), "getrandom")


def collapse(address: int, length: int) -> bool:
    """Turn a range of memory into huge pages, of which a fork copies fewer page-table entries."""
    result = _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), MADV_COLLAPSE)
    return bool(result == 0)

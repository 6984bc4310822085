"""The seccomp deny list: libseccomp compiles it once, in the API process, and every slot loads it.

A deny list and not an allow list: namespaces, Landlock and the user id are the boundary. The filter
takes away system calls with a history of kernel bugs and those that no snippet needs. Refused calls
fail with EPERM, clone3 with ENOSYS, so that the C library falls back to clone. Calls of a foreign
architecture kill the process with SIGSYS.

Every Debian and Ubuntu image has libseccomp.so.2: apt depends on its package, libseccomp2.
"""

import base64
import errno
import struct
import tempfile
from typing import Any

_DENIED = """
    _sysctl acct add_key adjtimex afs_syscall bpf capset chroot clock_adjtime clock_settime connect
    create_module delete_module execve execveat fanotify_init finit_module fsconfig fsmount fsopen
    fspick get_kernel_syms init_module inotify_init inotify_init1 io_uring_enter io_uring_register
    io_uring_setup ioperm iopl kcmp kexec_file_load kexec_load keyctl listmount lookup_dcookie
    lsm_set_self_attr map_shadow_stack mbind memfd_create memfd_secret migrate_pages modify_ldt
    mount mount_setattr move_mount move_pages mq_getsetattr mq_notify mq_open mq_timedreceive
    mq_timedsend mq_unlink msgctl msgget msgrcv msgsnd name_to_handle_at nfsservctl
    open_by_handle_at open_tree open_tree_attr perf_event_open personality pidfd_getfd pivot_root
    process_madvise process_mrelease process_vm_readv process_vm_writev ptrace query_module quotactl
    quotactl_fd reboot remap_file_pages request_key seccomp security semctl semget semop semtimedop
    set_mempolicy setdomainname sethostname setns settimeofday shmat shmctl shmdt shmget socket
    statmount stime swapoff swapon sysfs syslog tuxcall umount umount2 unshare uselib userfaultfd
    ustat vhangup vm86 vm86old vmsplice vserver
"""

# What reaches files of the same user and what Landlock does not govern; `basic` has no user id of
# its own that would stop it. Calls that name a file by descriptor are no better: one that is open
# for reading will do.
_DENIED_OF_ONE_USER = """
    chmod chown fchmod fchmodat fchown fchownat fremovexattr fsetxattr futimesat lchown
    lremovexattr lsetxattr removexattr setxattr utime utimensat utimes
"""
_OWN_PROCESS_ONLY = """
    prlimit64 sched_setaffinity sched_setattr sched_setparam sched_setscheduler
"""
"""Calls whose first argument is a pid; 0 is the caller itself."""
_PRIO_PROCESS, _IOPRIO_WHO_PROCESS = 0, 1
_FILE_ATTRIBUTES = (
    0x40086602,
    0x401C5820,
    0x40087602,
    0x40806685,
    0x800C6613,
    0x40046602,
    0x40047602,
)
"""FS_IOC_SETFLAGS, FSSETXATTR, SETVERSION, ENABLE_VERITY, SET_ENCRYPTION_POLICY, and the 32-bit
forms of two. They change a file that is open for reading only."""

_FIRST_UNKNOWN, _FIRST_X32 = 450, 0x4000_0000
"""System calls from here on, such as fchmodat2 and setxattrat, are newer than C libraries need;
libseccomp may not know their names, and more of them come with every kernel."""
_BPF_LOAD_NUMBER = (0x20, 0, 0, 0)
_BPF_IF_AT_LEAST, _BPF_RETURN = 0x35, 0x06
_SECCOMP_RET_ERRNO = 0x0005_0000

_CLONE_THREAD = 0x00010000
_CLONE_NAMESPACES = (
    0x00000080,  # time
    0x00020000,  # mount
    0x02000000,  # cgroup
    0x04000000,  # uts
    0x08000000,  # ipc
    0x10000000,  # user
    0x20000000,  # pid
    0x40000000,  # network
)
_WATCHING_FILES = (1024, 1026)
"""F_SETLEASE, with which a program that may read a file of its user has everybody else wait for 45
seconds who opens it, and F_NOTIFY."""
_TERMINAL_INJECTION = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX
_AF_UNIX = 1
_NOT_A_STREAM = (0x2, 0x4, 0x8)
"""Bits of a socket type of which SOCK_STREAM, 1, has none."""
_PR_SET_DUMPABLE = 4
_MASK_32 = 0xFFFFFFFF


def compile_filter(*, allow_fork: bool) -> str:
    """Compile the deny list to BPF, as base64 for a Plan.

    Args:
        allow_fork: False adds the rules of the `basic` level: threads yes, processes no, and
            nothing that reaches other processes or files of the same user.

    Raises:
        RuntimeError: libseccomp is not installed; the message says how to get it.
    """
    try:
        import pyseccomp
    except (ImportError, RuntimeError) as error:
        raise RuntimeError(
            "the sandbox needs libseccomp.so.2 and the package pyseccomp: "
            "apt-get install libseccomp2 && pip install pyseccomp"
        ) from error
    program = pyseccomp.SyscallFilter(defaction=pyseccomp.ALLOW)
    program.set_attr(pyseccomp.Attr.ACT_BADARCH, pyseccomp.KILL_PROCESS)
    # As a binary tree: when a slot loads a filter, the kernel tries it on every call number.
    program.set_attr(pyseccomp.Attr.CTL_OPTIMIZE, 2)
    deny = pyseccomp.ERRNO(errno.EPERM)
    for name in _DENIED.split():
        _add(program, deny, name)
    _add(program, pyseccomp.ERRNO(errno.ENOSYS), "clone3")
    for flag in _CLONE_NAMESPACES:
        _add(program, deny, "clone", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, flag, flag))
    _add(program, deny, "socketpair", pyseccomp.Arg(0, pyseccomp.NE, _AF_UNIX))
    # Other pairs can send to any address, and services of the host listen on Unix sockets.
    for bit in _NOT_A_STREAM:
        _add(program, deny, "socketpair", pyseccomp.Arg(1, pyseccomp.MASKED_EQ, bit, bit))
    _add(program, deny, "sendto", pyseccomp.Arg(4, pyseccomp.NE, 0))
    # It would hide the process from the watchdog.
    hide = pyseccomp.Arg(0, pyseccomp.MASKED_EQ, _MASK_32, _PR_SET_DUMPABLE)
    _add(program, deny, "prctl", hide, pyseccomp.Arg(1, pyseccomp.NE, 1))
    for request in _WATCHING_FILES:
        _add(program, deny, "fcntl", pyseccomp.Arg(1, pyseccomp.MASKED_EQ, _MASK_32, request))
    for request in _TERMINAL_INJECTION:
        _add(program, deny, "ioctl", pyseccomp.Arg(1, pyseccomp.MASKED_EQ, _MASK_32, request))
    if not allow_fork:
        _add(program, deny, "fork")
        _add(program, deny, "vfork")
        _add(program, deny, "clone", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, _CLONE_THREAD, 0))
        _keep_off_the_user(program, deny)
    return _export(program)


def _keep_off_the_user(program, deny: int) -> None:  # type: ignore[no-untyped-def]
    """Add the rules against other processes and files of the user who runs the program."""
    import pyseccomp

    def other_than(index: int, value: int) -> Any:
        return pyseccomp.Arg(index, pyseccomp.NE, value)

    for name in _DENIED_OF_ONE_USER.split():
        _add(program, deny, name)
    for name in _OWN_PROCESS_ONLY.split():
        _add(program, deny, name, other_than(0, 0))
    for name, itself in (("setpriority", _PRIO_PROCESS), ("ioprio_set", _IOPRIO_WHO_PROCESS)):
        _add(program, deny, name, other_than(0, itself))
        _add(program, deny, name, other_than(1, 0))
    for request in _FILE_ATTRIBUTES:
        _add(program, deny, "ioctl", pyseccomp.Arg(1, pyseccomp.MASKED_EQ, _MASK_32, request))


def _add(program, action: int, name: str, *arguments) -> None:  # type: ignore[no-untyped-def]
    """Add one rule. A name that is unknown to this libseccomp or architecture gets none."""
    import pyseccomp

    try:
        number = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name)
    except (ValueError, OSError):
        return
    if number >= 0:
        program.add_rule(action, name, *arguments)


def _export(program) -> str:  # type: ignore[no-untyped-def]
    with tempfile.TemporaryFile() as file:
        program.export_bpf(file)
        file.seek(0)
        return base64.b64encode(_refusing_unknown_calls() + file.read()).decode()


def _refusing_unknown_calls() -> bytes:
    """BPF that goes before a filter: ENOSYS from _FIRST_UNKNOWN on, except for x32 calls, at which
    the filter itself kills."""
    steps = [
        _BPF_LOAD_NUMBER,
        (_BPF_IF_AT_LEAST, 0, 2, _FIRST_UNKNOWN),  # two steps on if not
        (_BPF_IF_AT_LEAST, 1, 0, _FIRST_X32),  # one step on if so
        (_BPF_RETURN, 0, 0, _SECCOMP_RET_ERRNO | errno.ENOSYS),
    ]
    return b"".join(struct.pack("HBBI", *step) for step in steps)

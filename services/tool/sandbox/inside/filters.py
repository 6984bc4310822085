"""The seccomp deny list, compiled once in the API process by libseccomp and loaded by every slot.

A deny list, not an allow list: the boundary is made of namespaces, Landlock and the user id; the
filter takes away system calls with a history of kernel bugs and those that no snippet needs.
Refused calls fail with EPERM (clone3 with ENOSYS, so that the C library falls back to clone); calls
of a foreign architecture kill the process with SIGSYS.

libseccomp.so.2 comes with the package libseccomp2, which apt itself depends on: every Debian and
Ubuntu image has it.
"""

import errno
import os
import tempfile

_DENIED = """
    _sysctl acct add_key adjtimex afs_syscall bpf capset chroot clock_adjtime clock_settime
    create_module delete_module execve execveat fanotify_init finit_module fsconfig fsmount
    fsopen fspick get_kernel_syms init_module io_uring_enter io_uring_register io_uring_setup
    ioperm iopl kcmp kexec_file_load kexec_load keyctl listmount lookup_dcookie
    lsm_set_self_attr map_shadow_stack mbind memfd_create memfd_secret migrate_pages modify_ldt
    mount mount_setattr move_mount move_pages mq_getsetattr mq_notify mq_open mq_timedreceive
    mq_timedsend mq_unlink msgctl msgget msgrcv msgsnd name_to_handle_at nfsservctl
    open_by_handle_at open_tree open_tree_attr perf_event_open personality pidfd_getfd
    pivot_root process_madvise process_mrelease process_vm_readv process_vm_writev ptrace
    query_module quotactl quotactl_fd reboot remap_file_pages request_key seccomp security
    semctl semget semop semtimedop set_mempolicy sethostname setdomainname setns settimeofday
    shmat shmctl shmdt shmget socket statmount stime swapoff swapon sysfs syslog tuxcall umount
    umount2 unshare uselib userfaultfd ustat vhangup vm86 vm86old vmsplice vserver
"""

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
_TERMINAL_INJECTION = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX
_AF_UNIX = 1
_MASK_32 = 0xFFFFFFFF


def compile_filter(*, allow_fork: bool) -> bytes:
    """Compile the deny list to BPF.

    Args:
        allow_fork: False adds the rule of the `basic` level: threads yes, processes no.

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
    # A binary tree: the kernel tries a filter on every call number when a slot loads it.
    program.set_attr(pyseccomp.Attr.CTL_OPTIMIZE, 2)
    deny = pyseccomp.ERRNO(errno.EPERM)
    for name in _DENIED.split():
        _add(program, deny, name)
    _add(program, pyseccomp.ERRNO(errno.ENOSYS), "clone3")
    for flag in _CLONE_NAMESPACES:
        _add(program, deny, "clone", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, flag, flag))
    _add(program, deny, "socketpair", pyseccomp.Arg(0, pyseccomp.NE, _AF_UNIX))
    for request in _TERMINAL_INJECTION:
        _add(program, deny, "ioctl", pyseccomp.Arg(1, pyseccomp.MASKED_EQ, _MASK_32, request))
    if not allow_fork:
        _add(program, deny, "fork")
        _add(program, deny, "vfork")
        _add(program, deny, "clone", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, _CLONE_THREAD, 0))
    return _export(program)


def _add(program, action: int, name: str, *arguments) -> None:  # type: ignore[no-untyped-def]
    """Add one rule; names this libseccomp or this architecture does not know cannot be called by
    number we know of."""
    import pyseccomp

    try:
        number = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name)
    except (ValueError, OSError):
        return
    if number >= 0:
        program.add_rule(action, name, *arguments)


def _export(program) -> bytes:  # type: ignore[no-untyped-def]
    with tempfile.TemporaryFile() as file:
        program.export_bpf(file)
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        return file.read()

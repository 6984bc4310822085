"""The seccomp deny list: libseccomp compiles it once, in the API process, and every slot loads it.

A deny list and not an allow list: namespaces, Landlock and the user id are the boundary. The filter
takes away system calls with a history of kernel bugs and those that no snippet needs. Refused calls
fail with EPERM, clone3 with ENOSYS, so that the C library falls back to clone. Calls of a foreign
architecture kill the process with SIGSYS.

Every Debian and Ubuntu image has libseccomp.so.2: apt depends on its package, libseccomp2.
"""

import base64
import errno
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


def compile_filter(*, allow_fork: bool) -> str:
    """Compile the deny list to BPF, as base64 for a Plan.

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
    # As a binary tree: when a slot loads a filter, the kernel tries it on every call number.
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
        return base64.b64encode(file.read()).decode()

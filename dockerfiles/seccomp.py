"""Make seccomp-tool.json, the system calls that the tool container may make.

    python dockerfiles/seccomp.py > dockerfiles/seccomp-tool.json

Docker's own profile refuses what level `full` of the sandbox is made of: new namespaces and mounts.
This one allows them and refuses what neither the service nor Python needs. The sandbox puts a much
shorter list around each program; this is the outer wall, around the service itself.

The table of calls is libseccomp's. Calls that are newer than it answer EPERM or ENOSYS.
"""

import json
import sys
from typing import Any

import pyseccomp

ARCHITECTURES = {
    "SCMP_ARCH_X86_64": pyseccomp.Arch.X86_64,
    "SCMP_ARCH_AARCH64": pyseccomp.Arch.AARCH64,
}
NEWEST = 450
"""Number of the newest call that is judged here (set_mempolicy_home_node, Linux 5.17)."""

FULL = {
    "unshare": "new user, mount, pid, network, ipc and uts namespaces of a launcher and its slots",
    "setns": "a zygote steps into the namespaces of a room, forks, and steps out again",
    "mount": "the root directory of programs: read-only binds and one tmpfs per slot",
    "umount2": "the old root is detached, so that no path leads out of the new one",
    "pivot_root": "the new root takes the place of the container's",
    "mount_setattr": "everything below the new root becomes read-only in one step",
    "chroot": "zygotes and slots enter the folder that programs see as /",
}
"""What level `full` needs beyond Docker's profile, and why; `clone` with new namespaces is the
eighth call, and stands among the ordinary ones because threads and forks are made by it, too."""

REFUSED = {
    "the kernel itself: its modules, its replacement, its log, its counters": (
        "acct bpf create_module delete_module finit_module get_kernel_syms init_module "
        "kexec_file_load kexec_load lookup_dcookie perf_event_open query_module reboot syslog"
    ),
    "the machine's clock, name, swap, quotas and ports": (
        "adjtimex clock_adjtime clock_adjtime64 clock_settime clock_settime64 ioperm iopl "
        "quotactl quotactl_fd setdomainname sethostname settimeofday stime swapoff swapon vhangup"
    ),
    "key rings, which no namespace separates": "add_key keyctl request_key",
    "other processes' memory and descriptors": (
        "kcmp pidfd_getfd process_madvise process_mrelease process_vm_readv process_vm_writev "
        "ptrace"
    ),
    "files by handle, past every mount": "name_to_handle_at open_by_handle_at",
    "a second way to mount, which the sandbox does not take": (
        "fsconfig fsmount fsopen fspick move_mount open_tree umount"
    ),
    "placement of memory": ("mbind migrate_pages move_pages set_mempolicy set_mempolicy_home_node"),
    "large parts of the kernel with a history of errors, which nothing here uses": (
        "fanotify_init fanotify_mark io_uring_enter io_uring_register io_uring_setup "
        "memfd_secret personality remap_file_pages userfaultfd vmsplice"
    ),
    "obsolete": (
        "_sysctl afs_syscall getpmsg modify_ldt nfsservctl putpmsg security sysfs tuxcall uselib "
        "ustat vserver"
    ),
}
_AF_VSOCK = 40


def profile() -> dict[str, Any]:
    """The profile as Docker, Podman and Kubernetes read it."""
    refused = {name for names in REFUSED.values() for name in names.split()}
    apart = {*FULL, "clone3", "socket"}
    ordinary = sorted(known_calls() - refused - apart)
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": list(ARCHITECTURES),
        "syscalls": [
            _rule(ordinary, "SCMP_ACT_ALLOW", "what is left of Linux after REFUSED of seccomp.py"),
            *(_rule([name], "SCMP_ACT_ALLOW", f"level full: {why}") for name, why in FULL.items()),
            _rule(
                ["socket"],
                "SCMP_ACT_ALLOW",
                "any family but AF_VSOCK, which reaches a virtual machine's host",
                args=[{"index": 0, "value": _AF_VSOCK, "op": "SCMP_CMP_NE"}],
            ),
            _rule(
                ["clone3"],
                "SCMP_ACT_ERRNO",
                "its flags cannot be seen by a filter; the C library falls back to clone on ENOSYS",
                errnoRet=38,
            ),
        ],
    }


def known_calls() -> set[str]:
    """Names of all calls up to NEWEST on every architecture."""
    names = set()
    for architecture in ARCHITECTURES.values():
        for number in range(NEWEST + 1):
            try:
                name = pyseccomp.resolve_syscall(architecture, number)
            except (OSError, ValueError):
                continue  # a gap in the table
            names.add(name.decode() if isinstance(name, bytes) else name)
    return names


def _rule(names: list[str], action: str, comment: str, **fields: Any) -> dict[str, Any]:
    return {"names": names, "action": action, "comment": comment, **fields}


if __name__ == "__main__":
    json.dump(profile(), sys.stdout, indent=2)
    print()

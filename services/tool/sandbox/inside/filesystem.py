"""The directory tree that snippets see at level `full`: the interpreter, the C library, a few
devices, nothing else.

new root (tmpfs)          seen by zygotes
  proc/                   for the memory watchdog
  jail/                   seen by snippets as /
    <interpreter, site-packages, libraries: bound read-only>
    dev/null zero full random urandom
    scratch/box           private tmpfs of each slot
    tmp, var/tmp, dev/shm, mnt -> scratch/box/...
"""

import os

from services.tool.sandbox.inside import kernel
from services.tool.sandbox.plan import BOX, JAIL, SCRATCH, Plan

DEVICES = ("null", "zero", "full", "random", "urandom")

ROOM_NAMESPACES = kernel.CLONE_NEWNS | kernel.CLONE_NEWIPC
"""What a room has of its own besides its pid namespace."""

_BOX_FOLDERS = ("work", "tmp", "shm", "mnt", "figures")
_LINKS = {"tmp": "tmp", "var/tmp": "tmp", "dev/shm": "shm", "mnt": "mnt"}
_ROOT_BYTES = 1 << 20
_STAGE = "/sys"  # exists everywhere, and no interpreter or library lives below it


def build_root(plan: Plan) -> None:
    """Build the new root in a fresh mount namespace and make it `/`. Needs CAP_SYS_ADMIN there."""
    # Private first: nothing that is mounted from here on may show on the machine.
    kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    root = _STAGE
    options = f"mode=0755,size={_ROOT_BYTES}"
    kernel.mount("tmpfs", root, "tmpfs", kernel.MS_NOSUID, options)
    jail = root + JAIL
    for folder in ("/proc", f"{JAIL}/dev", f"{JAIL}{BOX}", f"{JAIL}/var", f"{JAIL}/etc"):
        os.makedirs(root + folder)
    for path in outermost(plan.read_paths):
        _bind(path, jail + path)
    for name in DEVICES:
        _bind(f"/dev/{name}", f"{jail}/dev/{name}")
    for link, folder in _LINKS.items():
        if not os.path.lexists(f"{jail}/{link}"):
            os.symlink(f"{BOX}/{folder}", f"{jail}/{link}")
    _write_accounts(jail, {*range(plan.uid_count), os.getuid()})
    kernel.make_read_only(root)
    # Writable, because the id maps of level full are written through it; the jail does not hold it.
    kernel.mount("/proc", root + "/proc", "", kernel.MS_BIND | kernel.MS_REC)
    kernel.pivot_root(root)


def enter_jail() -> None:
    """Make the jail the root directory of this process."""
    os.chroot(JAIL)
    os.chdir("/")


def enter_room(room: int) -> None:
    """Move this process into the room behind a pid descriptor, its children also into the room's
    pid namespace."""
    kernel.setns(room, ROOM_NAMESPACES | kernel.CLONE_NEWPID)
    enter_jail()  # a change of mount namespace resets the root directory


def outermost(paths: list[str]) -> list[str]:
    """Drop paths that lie below another one, keeping the order: '/a', '/a/b' -> '/a'."""
    kept: list[str] = []
    for path in sorted(set(paths)):
        if not kept or not path.startswith(kept[-1].rstrip("/") + "/"):
            kept.append(path)
    return kept


def mount_box(plan: Plan) -> None:
    """Mount an empty private tmpfs in this process's own mount namespace inside the jail."""
    options = f"mode=1777,size={plan.scratch_bytes},nr_inodes={plan.scratch_files}"
    kernel.mount("tmpfs", BOX, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, options)
    make_box_folders(BOX)
    for top, folder in occupied(plan):
        for path in outermost(plan.read_paths):
            if path.startswith(f"{top}/"):
                _bind(path, f"{BOX}/{folder}{path.removeprefix(top)}")
        kernel.mount(f"{BOX}/{folder}", top, "", kernel.MS_BIND | kernel.MS_REC)


def make_box_folders(box: str) -> None:
    """Create work, tmp, shm, mnt and figures below `box`, writable for whoever owns the slot."""
    for name in _BOX_FOLDERS:
        path = f"{box}/{name}"
        os.mkdir(path)
        os.chmod(path, 0o777)


def writable_paths(plan: Plan) -> list[str]:
    """Paths, as seen inside the jail, below which a snippet may write."""
    return [SCRATCH, *(f"{BOX}/{folder}" for _, folder in occupied(plan))]


def occupied(plan: Plan) -> list[tuple[str, str]]:
    """Temporary folders that cannot be links into the box, because the interpreter is installed
    below them. Each slot mounts its box's folder there, with the interpreter inside."""
    tops = [(f"/{link}", folder) for link, folder in _LINKS.items()]
    return [(t, f) for t, f in tops if any(p.startswith(f"{t}/") for p in plan.read_paths)]


def _bind(source: str, target: str) -> None:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "x"):
            pass
    kernel.mount(source, target, "", kernel.MS_BIND | kernel.MS_REC)


def _write_accounts(jail: str, uids: set[int]) -> None:
    """Write /etc/passwd, in which libraries look up the home directory and may fail without it."""
    line = "sandbox:x:{uid}:{uid}::/scratch/box/work:/nonexistent\n"
    with open(f"{jail}/etc/passwd", "w") as file:
        file.writelines(line.format(uid=uid) for uid in sorted(uids))

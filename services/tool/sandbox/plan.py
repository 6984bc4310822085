"""What the API process decides once and every process of the sandbox reads: level, limits, places.

A plan is built in host/pool.py, goes to the launcher as JSON on its standard input and is inherited
by fork below it. It holds no secret, since a snippet can read all of it.
"""

import json
from dataclasses import asdict, dataclass
from enum import StrEnum

PRESETS = ("numpy", "sympy", "scipy", "pandas", "matplotlib")
"""Libraries that zygotes load, in order of size; each zygote is forked from the one before."""
USUAL_PRESETS = PRESETS[:3]
"""What is loaded unless more is asked for: the others take seconds and memory at every start."""
FIGURES_PRESET = "matplotlib"
"""What draws the figures that a request asks for."""
JAIL = "/jail"
"""Directory below the launcher's new root that snippets see as `/`; /proc stays outside of it."""
SCRATCH = "/scratch"
"""Parent of a slot's private tmpfs inside the jail. Landlock grants writing here."""
BOX = "/scratch/box"
"""Mount point of a slot's private tmpfs inside the jail."""
WORK = "work"
"""Folder below the box in which a snippet starts."""

CPU_GRACE_S = 2
"""Seconds of CPU time between SIGXCPU, which a program may handle, and SIGKILL."""


class Level(StrEnum):
    """How much isolates a snippet from the machine, strongest first."""

    FULL = "full"
    """Own user, pid, mount, network, ipc and uts namespaces, private tmpfs; and all below."""
    UID = "uid"
    """Own user id per slot, swept after each run; needs root. And all below."""
    BASIC = "basic"
    """Own process, rlimits, seccomp without fork, Landlock. Needs no privilege at all."""
    NONE = "none"
    """A process with rlimits. For debugging only."""


STRENGTH = {Level.NONE: 0, Level.BASIC: 1, Level.UID: 2, Level.FULL: 3}


@dataclass(frozen=True, slots=True, kw_only=True)
class LandlockRights:
    """Bits of the kernel's Landlock (host/landlock.py)."""

    files: int
    """What a ruleset governs of files; what no rule grants is refused."""
    network: int
    """What it refuses of the network."""
    scopes: int
    """What it refuses of signals and sockets to the outside."""
    reading: int
    """Granted below folders that may be read."""
    writing: int
    """Granted below folders that may be written."""
    devices: int
    """Granted for devices."""
    of_single_files: int
    """What a rule for a path that is no folder can grant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxConfig:
    """How the sandbox is built. The defaults suit one machine."""

    level: Level = Level.FULL
    launchers: int = 1
    """Fork servers; throughput scales up to one per core."""
    presets: tuple[str, ...] = USUAL_PRESETS
    """Zygotes per launcher, a prefix of PRESETS."""
    warm_slots: int = 2
    """Fenced slots kept waiting per zygote."""
    scratch_bytes: int = 64 << 20
    """Size of a slot's tmpfs."""
    scratch_files: int = 4096
    """Inodes of a slot's tmpfs."""
    file_bytes: int = 32 << 20
    """RLIMIT_FSIZE: the largest file a snippet can write."""
    max_processes: int = 64
    """Processes and threads of a slot; in a Plan those that RLIMIT_NPROC counts besides as well."""
    max_open_files: int = 128
    cgroup: bool = True
    """Have the kernel count each slot's memory and processes where a cgroup v2 is delegated; in a
    Plan whether one is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(SandboxConfig):
    """Everything the launcher, its zygotes and its slots have to know."""

    channels: list[int]
    """One inherited SOCK_SEQPACKET descriptor per preset."""
    code_root: str
    """Folder that holds the package `services`; read before the root directory changes."""
    package_paths: list[str]
    """site-packages folders that snippets may import from."""
    read_paths: list[str]
    """Files and folders that snippets may read."""
    uid_base: int | None
    """First host user id of the slots' range; None when the service is not root."""
    uid_count: int
    work_root: str
    """Folder for the slots' working directories at the levels without mount namespaces."""
    seccomp: str
    """Compiled filter, base64; empty at level none."""
    no_fork_filter: str
    """The filter that level basic adds before untrusted code runs, base64; empty elsewhere."""
    landlock: LandlockRights | None
    """None at level none."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        fields = json.loads(text)
        fields |= {"level": Level(fields["level"]), "presets": tuple(fields["presets"])}
        if fields["landlock"] is not None:
            fields["landlock"] = LandlockRights(**fields["landlock"])
        return cls(**fields)

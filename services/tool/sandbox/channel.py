"""What the API process and a zygote tell each other: one fixed record per packet.

A slot never sees this channel, so both ends can be trusted. Records and not JSON, because every
memory page that a zygote touches between two forks has to be copied.

    order  API -> zygote   SPAWN slot, with a descriptor where there are cgroups | KILL slot |
                           WATCH slot, bytes
    event  zygote -> API   READY collapsed | SLOT slot, with descriptors | EXIT slot, how it ended
"""

import struct
from typing import NamedTuple

SPAWN, WATCH, KILL = b"s", b"w", b"k"
READY, SLOT, EXIT = b"r", b"f", b"e"

ORDER = struct.Struct("<cIQ")
"""Kind, slot, memory limit in bytes."""
EVENT = struct.Struct("<cIidQ?q")
"""The fields of Event, in order."""


class Event(NamedTuple):
    """One event. The defaults stand for fields that READY and SLOT do not use."""

    kind: bytes
    slot: int
    """Number of the slot; of READY, the ranges of memory that huge pages back."""
    status: int = 0
    """Wait status as of wait4."""
    cpu_s: float = 0.0
    peak_bytes: int = 0
    memory: bool = False
    """Whether the watchdog killed it."""
    soft_cpu_s: int = 0
    """Its soft limit of CPU time when it ended, which the kernel raises when it signals that the
    limit is reached."""

    def encode(self) -> bytes:
        return EVENT.pack(*self)

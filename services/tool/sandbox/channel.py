"""What the API process and a zygote tell each other: one fixed record per packet.

Both ends are ours; a slot never sees this channel. Records instead of JSON, because whatever a
zygote touches between two forks costs it a page copy.

    order  API -> zygote   SPAWN slot, with a descriptor where there are cgroups | WATCH slot, bytes
    event  zygote -> API   READY collapsed | SLOT slot, with descriptors | EXIT slot, how it ended
"""

import struct
from typing import NamedTuple

SPAWN, WATCH = b"s", b"w"
READY, SLOT, EXIT = b"r", b"f", b"e"

ORDER = struct.Struct("<cIQ")
"""Kind, slot, memory limit in bytes (0 ends a watch)."""
EVENT = struct.Struct("<cIidQ?")
"""The fields of Event, in order."""


class Event(NamedTuple):
    """One event; of READY and SLOT only the first two fields mean something."""

    kind: bytes
    slot: int
    """Number of the slot; of READY, the ranges of memory that huge pages back."""
    status: int
    """Wait status as of wait4."""
    cpu_s: float
    peak_bytes: int
    memory: bool
    """Whether the watchdog killed it."""

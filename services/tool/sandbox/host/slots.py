"""The API process's ends of zygotes and slots: order a slot, hand it out, hear how it ended.

    LauncherHandle    the process; its death ends every zygote below it (pool.py)
      ZygoteHandle    a channel, the slots that it forked, the queue of those that wait
        SlotHandle    descriptors of one slot and the facts of its end

All of it lives on one event loop and never blocks: channels are non-blocking and read by callbacks.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from services.tool.sandbox import channel, wire
from services.tool.sandbox.host.cgroups import Cgroups, SlotCgroup
from services.tool.sandbox.host.verdict import ExitFacts

logger = logging.getLogger(__name__)

_DESCRIPTORS_PER_SLOT = 5


class ZygoteLostError(ConnectionError):
    """The zygote died before it could hand out a slot. Nothing ran; another zygote can be asked."""


class SlotFailedError(RuntimeError):
    """A fence could not be put up. The snippet never ran and is not run behind fewer fences."""


@dataclass(slots=True, kw_only=True)
class SlotHandle:
    """A slot: write the job, read the streams, wait for the facts."""

    zygote: "ZygoteHandle"
    number: int
    job: socket.socket
    stdin: int
    stdout: int
    stderr: int
    kill_fd: int
    cgroup: SlotCgroup | None
    """None where the watchdog counts its memory."""
    exited: asyncio.Future[ExitFacts]
    fenced: bool = False
    """Whether its first frame said that every fence stands."""
    failure: str = "a slot died before it was fenced"
    """Why a slot that is not fenced failed."""
    taken: bool = False
    """Whether a caller has it and will close it."""

    def kill(self) -> None:
        """Kill the first process of the slot; the zygote, which waits for it, then kills the
        rest."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.kill_fd, signal.SIGKILL)

    def resume(self) -> None:
        """Let the first process of the slot run again, if the slot's code has stopped it."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.kill_fd, signal.SIGCONT)

    def limit_memory(self, limit_bytes: int) -> None:
        """Set the cgroup's limit, if there is one, before the program starts. Raises OSError."""
        if self.cgroup is not None and not self.exited.done():
            self.cgroup.limit_memory(limit_bytes)

    def watch(self, limit_bytes: int) -> None:
        """Have the slot's memory watched until it ends, unless a cgroup does that."""
        if self.cgroup is None:
            self.zygote.order(channel.WATCH, self.number, limit_bytes)

    def close_stdin(self) -> None:
        if self.stdin >= 0:
            os.close(self.stdin)
            self.stdin = -1

    def close(self) -> None:
        """Close the descriptors. The slot must be dead or be killed first."""
        self.close_stdin()
        self.job.close()
        for descriptor in (self.stdout, self.stderr, self.kill_fd):
            os.close(descriptor)


class _Queue:
    """Fenced slots that wait for a caller, and callers that wait for a slot: never both."""

    def __init__(self) -> None:
        self.slots: deque[SlotHandle] = deque()
        self.callers: deque[asyncio.Future[SlotHandle]] = deque()

    def join(self) -> asyncio.Future[SlotHandle]:
        """Add a caller; its future gets the next slot."""
        caller: asyncio.Future[SlotHandle] = asyncio.get_running_loop().create_future()
        self.callers.append(caller)
        return caller

    def leave(self, caller: asyncio.Future[SlotHandle]) -> None:
        """Remove a caller that was cancelled, and pass on the slot that it may have got already."""
        if caller in self.callers:
            self.callers.remove(caller)
        elif not caller.cancelled() and caller.exception() is None:
            self.offer(caller.result())

    def offer(self, slot: SlotHandle) -> None:
        """Give the slot to the next caller, or keep it waiting."""
        caller = self._next_caller()
        slot.taken = caller is not None
        if caller is not None:
            caller.set_result(slot)
        else:
            self.slots.append(slot)

    def fail_next(self, error: Exception) -> bool:
        """Raise `error` in the next caller. False: there was none."""
        caller = self._next_caller()
        if caller is not None:
            caller.set_exception(error)
        return caller is not None

    def _next_caller(self) -> asyncio.Future[SlotHandle] | None:
        while self.callers:
            caller = self.callers.popleft()
            if not caller.done():  # a cancelled one leaves only when its task runs again
                return caller
        return None


@dataclass(slots=True, kw_only=True)
class ZygoteHandle:
    """One zygote: orders slots ahead, hands them out, hears of their end."""

    preset: str
    link: socket.socket
    target: int
    """Slots to keep waiting."""
    cgroups: Cgroups | None
    on_lost: Callable[[], None]
    ready: asyncio.Future[int] = field(init=False)
    """Done when it forks; the ranges of its memory that huge pages back."""
    queue: _Queue = field(default_factory=_Queue)
    slots: dict[int, SlotHandle] = field(default_factory=dict)
    """Live slots by number, whether waiting, running or serving a session."""
    pending: int = 0
    """Slots that were ordered and are not fenced yet."""
    joining: dict[int, SlotCgroup] = field(default_factory=dict)
    """Cgroups of the slots that were ordered and have not arrived yet, by number."""
    num_ordered: int = 0
    """Slots ever ordered, which numbers the next one."""
    alive: bool = True

    def __post_init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.ready = loop.create_future()
        self.link.setblocking(False)
        loop.add_reader(self.link.fileno(), self._on_packet)

    @property
    def load(self) -> tuple[int, int]:
        """What orders zygotes by how soon they have a slot: callers ahead, then live slots."""
        return len(self.queue.callers) - len(self.queue.slots), len(self.slots)

    def refill(self) -> None:
        """Order the slots that are missing. Not called when one is handed out but when its program
        has ended or its session is open: a fork would delay what has just started."""
        queue = self.queue
        while self.alive and len(queue.slots) + self.pending < self.target + len(queue.callers):
            self.pending += 1
            try:
                self._order_slot()
            except OSError as error:
                logger.error("no slot can be made: %s", error)
                self.pending -= 1
                queue.fail_next(SlotFailedError(f"the sandbox could not make a slot: {error}"))
                return

    async def take(self) -> SlotHandle:
        """Take a waiting slot, or the next to come. Raises ZygoteLostError, SlotFailedError."""
        if not self.alive:
            raise ZygoteLostError(f"zygote {self.preset} is gone")
        if self.queue.slots:
            slot = self.queue.slots.popleft()
            slot.taken = True
            return slot
        caller = self.queue.join()
        self.refill()
        try:
            return await caller
        except asyncio.CancelledError:
            self.queue.leave(caller)
            raise

    def order(
        self, kind: bytes, slot: int, limit_bytes: int = 0, descriptors: Sequence[int] = ()
    ) -> None:
        """Send an order, unless the zygote is gone."""
        if not self.alive:
            return
        try:
            socket.send_fds(self.link, [channel.ORDER.pack(kind, slot, limit_bytes)], descriptors)
        except OSError:
            self.on_lost()

    def close(self) -> None:
        """Forget the zygote: fail what waits, report every live slot as lost."""
        if not self.alive:
            return
        self.alive = False
        asyncio.get_running_loop().remove_reader(self.link.fileno())
        self.link.close()
        error = ZygoteLostError(f"zygote {self.preset} is gone")
        while self.queue.fail_next(error):
            pass
        for slot in list(self.slots.values()):
            self._finish(slot, ExitFacts(lost=True))
        for cgroup in self.joining.values():
            self._give_back(cgroup)
        if not self.ready.done():
            self.ready.set_exception(error)
            self.ready.exception()  # retrieved: a caller that gave up must not cause a warning

    def _order_slot(self) -> None:
        """Order one slot, with the way into its cgroup where there are cgroups. Raises OSError."""
        number = self.num_ordered
        self.num_ordered += 1
        if self.cgroups is None:
            self.order(channel.SPAWN, number)
            return
        self.joining[number] = cgroup = self.cgroups.take()
        try:
            way_in = cgroup.open()
        except OSError:
            self._give_back(self.joining.pop(number))
            raise
        self.order(channel.SPAWN, number, descriptors=[way_in])
        os.close(way_in)

    def _give_back(self, cgroup: SlotCgroup | None) -> None:
        if self.cgroups is not None and cgroup is not None:
            self.cgroups.give_back(cgroup)

    def _on_packet(self) -> None:
        while self.alive:
            try:
                data, descriptors, _, _ = socket.recv_fds(
                    self.link, channel.EVENT.size, _DESCRIPTORS_PER_SLOT
                )
            except BlockingIOError:
                return
            except OSError:
                data, descriptors = b"", []
            if not data:
                self.on_lost()
                return
            self._on_event(channel.Event(*channel.EVENT.unpack(data)), descriptors)

    def _on_event(self, event: channel.Event, descriptors: list[int]) -> None:
        if event.kind == channel.READY:
            self.ready.set_result(event.slot)
        elif event.kind == channel.SLOT:
            # When this process may open no more, descriptors are dropped and cannot be asked again.
            if len(descriptors) == _DESCRIPTORS_PER_SLOT:
                self._adopt(event.slot, descriptors)
            else:
                self._renounce(event.slot, descriptors)
        elif event.slot in self.slots:
            slot = self.slots[event.slot]
            self._finish(slot, _exit_facts(event, slot.cgroup))

    def _renounce(self, number: int, descriptors: list[int]) -> None:
        """Have a slot killed some of whose descriptors were lost; one caller learns of it."""
        for descriptor in descriptors:
            os.close(descriptor)
        self.order(channel.KILL, number)
        self._give_back(self.joining.pop(number, None))
        self.pending -= 1
        message = "the service has no descriptors left (ulimit -n) for another program"
        logger.error("%s", message)
        self.queue.fail_next(SlotFailedError(message))

    def _adopt(self, number: int, descriptors: list[int]) -> None:
        """Keep the descriptors of a new slot and wait until it is fenced."""
        loop = asyncio.get_running_loop()
        job_fd, stdin, stdout, stderr, kill_fd = descriptors
        job = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=job_fd)
        job.setblocking(False)
        for descriptor in (stdin, stdout, stderr):
            os.set_blocking(descriptor, False)
        slot = SlotHandle(
            zygote=self,
            number=number,
            job=job,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            kill_fd=kill_fd,
            cgroup=self.joining.pop(number, None),
            exited=loop.create_future(),
        )
        self.slots[number] = slot
        loop.add_reader(job.fileno(), self._on_fenced, slot, wire.FrameReader(1 << 16))

    def _on_fenced(self, slot: SlotHandle, reader: wire.FrameReader) -> None:
        """The slot's first frame says that its fences stand, or which one does not."""
        try:
            messages = reader.feed(slot.job.recv(1 << 16))
        except (OSError, wire.FrameError):
            messages = []
        asyncio.get_running_loop().remove_reader(slot.job.fileno())
        if messages and messages[0].get("ready") is True:
            slot.fenced = True
            self.pending -= 1
            self.queue.offer(slot)
            return
        if not messages:
            return  # it died: the zygote will say so, or is dead itself
        slot.failure = f"the sandbox could not fence a slot: {messages[0].get('failed')}"
        logger.error("%s", slot.failure)
        slot.kill()

    def _finish(self, slot: SlotHandle, facts: ExitFacts) -> None:
        if self.slots.pop(slot.number, None) is not None:
            self._give_back(slot.cgroup)
        if not slot.exited.done():
            slot.exited.set_result(facts)
        # Whoever took the slot still reads from it and closes it; nobody closes the others.
        if not slot.taken:
            asyncio.get_running_loop().remove_reader(slot.job.fileno())
            slot.close()
            if slot in self.queue.slots:
                self.queue.slots.remove(slot)
        if facts.lost:
            return
        if slot.fenced:
            self.refill()
            return
        # No new order for a slot that could not be fenced: the next one would fail the same way,
        # in a loop. One caller learns of it, and the next caller orders again.
        self.pending -= 1
        self.queue.fail_next(SlotFailedError(slot.failure))


def _exit_facts(event: channel.Event, cgroup: SlotCgroup | None) -> ExitFacts:
    """What wait4 told the zygote, and what the cgroup knows of all processes together."""
    memory, peak_bytes = event.memory, event.peak_bytes
    if cgroup is not None:
        try:
            memory, peak_bytes = cgroup.out_of_memory(), max(peak_bytes, cgroup.peak_bytes())
        except OSError as error:  # no descriptors left; the slot ended all the same
            logger.error("%s cannot be read: %s", cgroup.folder, error)
    return ExitFacts(
        status=event.status,
        cpu_s=event.cpu_s,
        peak_bytes=peak_bytes,
        soft_cpu_s=event.soft_cpu_s,
        memory=memory,
    )

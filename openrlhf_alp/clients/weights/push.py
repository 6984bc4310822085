"""The whole weight push as one blocking call, for a training thread that runs no event loop."""

import asyncio
import logging
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from openrlhf_alp.clients.channel import Timeouts
from openrlhf_alp.clients.control import ControlClient
from openrlhf_alp.clients.errors import UpdateUnanswered, WeightUpdateFailed
from openrlhf_alp.clients.fleet import Access
from openrlhf_alp.clients.weights.carry import Carrier, NamedBuckets, carry_weights
from openrlhf_alp.clients.weights.file_carriers import FileCarrier, HttpCarrier
from openrlhf_alp.clients.weights.gpu_carrier import GpuCarrier, Meeting
from services.rollout.wire.schemas import (
    CommitRequest,
    Contract,
    PrepareRequest,
    WeightsStatus,
    WeightTransport,
)

logger = logging.getLogger(__name__)

_UPDATE_PREFIX = "update-"


@dataclass(frozen=True, slots=True, kw_only=True)
class PushResult:
    """What a push did, and how long each part took in seconds."""

    version: int
    digest: str
    num_bytes: int  # sent; unchanged tensors are not
    write_s: float  # until everything was sent, with the gathering of the parameters
    prepare_s: float
    commit_s: float
    pause_s: float  # longest time that a server generated no token before its load began
    load_s: float  # longest load


class WeightPusher:
    """Pushes the learner's weights to every rollout server, and has each verify them by digest.

    Args:
        urls: base URLs of the servers.
        api_key: bearer key of the data routes.
        admin_key: bearer key of the control routes.
        timeouts: limits of every call.
        transport: `file` writes into the servers' shared folder, `http` sends files to each, `nccl`
            and `ipc` send from GPU to GPU.
        meeting: where learner and servers meet for nccl.
        patience_s: how long a push waits when no server answers: one may be starting again.
        make_client: builds the client, for tests.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        api_key: str,
        admin_key: str,
        timeouts: Timeouts | None = None,
        transport: WeightTransport = "file",
        meeting: Meeting | None = None,
        patience_s: float = 0.0,
        make_client: Callable[[], ControlClient] | None = None,
    ) -> None:
        self._timeouts = timeouts or Timeouts()
        access = Access(api_key=api_key, admin_key=admin_key, timeouts=self._timeouts)
        self._make_client = make_client or (lambda: ControlClient(urls, **access))
        self._transport = transport
        self._meeting = meeting or Meeting()
        self._patience_s = patience_s
        self._shared: Path | None = None
        self._version = 0

    def push(self, buckets: NamedBuckets) -> PushResult:
        """Write, prepare everywhere, commit everywhere. Must be called outside an event loop.

        The new version is one above the highest that any server has. Tensors whose bytes all
        servers already have are not written.

        Args:
            buckets: of `carry.in_buckets`.

        Raises:
            WeightUpdateFailed: a server refused the update, and nothing changed anywhere; or no
                server serves it. A server that did not answer misses the update and is stale.
            NoServerLeft: no server answered for `patience_s`, before any tensor was taken.
            ServiceUnavailable: on the first push, a server does not answer.
        """
        return asyncio.run(self.push_async(buckets))

    def push_folder(self, folder: Path) -> PushResult:
        """As `push`, with the tensors of a model folder's safetensors files."""
        return self.push(_tensors_of(folder))

    async def push_async(self, buckets: NamedBuckets) -> PushResult:
        """As `push`, inside an event loop. Taking the tensors blocks that loop."""
        async with self._make_client() as client:
            statuses = await self._begin(client)
            base_version = _common_version(statuses)
            # Above every server, also above one that missed the last updates: within a fleet one
            # version must not stand for two sets of weights.
            # Above the last one too, which servers that were started again do not know.
            version = max(self._version, *(status.version for status in statuses)) + 1
            name = f"{_UPDATE_PREFIX}{version}-{uuid.uuid4().hex[:8]}"
            started_s = time.perf_counter()
            try:
                async with await self._carrier(client, name) as carrier:
                    # Gathering shards may block this loop, in which nothing else runs.
                    carried = await carry_weights(
                        carrier,
                        buckets,
                        statuses[0].tensors,
                        # Servers with different weights lack different tensors; all get everything.
                        skip_unchanged=base_version is not None,
                    )
                    carried_s = time.perf_counter()
                    # Still inside the carrier: its files must exist until every server has them.
                    await client.prepare_weights(
                        PrepareRequest(
                            version=version,
                            digest=carried.digest,
                            files=list(carried.files),
                            base_version=base_version,
                        )
                    )
            except Exception:
                await client.abort_weights()
                raise
            prepared_s = time.perf_counter()
            # Only now, when every server has verified the digest, does any server pause.
            commits = await client.commit_weights(
                CommitRequest(version=version, digest=carried.digest)
            )
        self._version = version
        result = PushResult(
            version=version,
            digest=carried.digest,
            num_bytes=carried.num_bytes,
            write_s=carried_s - started_s,
            prepare_s=prepared_s - carried_s,
            commit_s=time.perf_counter() - prepared_s,
            pause_s=max(commit.pause_s for commit in commits),
            load_s=max(commit.load_s for commit in commits),
        )
        logger.info("pushed %s", result)
        return result

    async def _begin(self, client: ControlClient) -> list[WeightsStatus]:
        """The weights of the servers that answer, once there is one."""
        try:
            return await client.reachable_weights()
        except UpdateUnanswered as error:
            logger.warning("the push waits for a server: %s", error)
            await client.wait_for_one(self._patience_s)
            return await client.reachable_weights()

    async def _carrier(self, client: ControlClient, name: str) -> Carrier:
        if self._transport == "http":
            return HttpCarrier(client, name)
        if self._transport == "file":
            # A server that was started again may have another one.
            if self._shared is None or not self._shared.is_dir():
                self._shared = _shared_folder(await client.contracts())
            _remove_leftovers(self._shared)
            return FileCarrier(self._shared, name)
        limit_s = self._timeouts.transfer_s
        return GpuCarrier(client, name, self._transport, limit_s=limit_s, meeting=self._meeting)


def _remove_leftovers(weights_dir: Path) -> None:
    """Remove what a learner left that was killed in mid-push; there is one learner at a time."""
    for folder in weights_dir.glob(f"{_UPDATE_PREFIX}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _shared_folder(contracts: Sequence[Contract]) -> Path:
    folders = sorted({contract.weights_dir for contract in contracts})
    if len(folders) > 1:
        raise WeightUpdateFailed(
            f"The servers have different weights folders ({', '.join(folders)}). Fix: start all of "
            "them with the same --weights-dir, on a file system that the learner shares."
        )
    return Path(folders[0])


def _common_version(statuses: Sequence[WeightsStatus]) -> int | None:
    """The version that every server serves and so can be built upon; None when they differ."""
    first = statuses[0]
    same = all((s.version, s.digest) == (first.version, first.digest) for s in statuses)
    return first.version if same and all(s.state == "serving" for s in statuses) else None


def _tensors_of(folder: Path) -> NamedBuckets:
    """A file at a time; its tensors are memory-mapped."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            yield [(name, file.get_tensor(name)) for name in file.keys()]  # noqa: SIM118

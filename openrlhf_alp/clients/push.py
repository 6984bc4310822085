"""The whole weight push as one blocking call, for a training thread that runs no event loop."""

import asyncio
import logging
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from openrlhf_alp.clients.errors import WeightUpdateFailed
from openrlhf_alp.clients.http import Timeouts
from openrlhf_alp.clients.rollout import RolloutClient
from openrlhf_alp.clients.weights import NamedTensors, WrittenWeights, write_weights
from services.rollout.schemas import (
    CommitRequest,
    Contract,
    PauseMode,
    PrepareRequest,
    WeightsStatus,
)

logger = logging.getLogger(__name__)

_UPDATE_PREFIX = "update-"


@dataclass(frozen=True, slots=True, kw_only=True)
class PushResult:
    """What a push did, and how long each part took in seconds."""

    version: int
    digest: str
    num_bytes: int  # written; unchanged tensors are not
    write_s: float
    prepare_s: float
    commit_s: float
    pause_s: float  # longest time that a server drew no token before its load began
    load_s: float  # longest load


class WeightPusher:
    """Pushes the learner's weights to every rollout server through a shared folder.

    Args:
        urls: base URLs of the servers.
        api_key: bearer key of the data routes.
        admin_key: bearer key of the control routes.
        timeouts: limits of every call.
        transport: `file` writes into the servers' shared folder; `http` sends the bytes to each.
        make_client: builds the client, for tests.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        api_key: str,
        admin_key: str,
        timeouts: Timeouts | None = None,
        transport: Literal["file", "http"] = "file",
        make_client: Callable[[], RolloutClient] | None = None,
    ) -> None:
        self._make_client = make_client or (
            lambda: RolloutClient(urls, api_key=api_key, admin_key=admin_key, timeouts=timeouts)
        )
        self._transport = transport
        self._shared: Path | None = None

    def push(self, named_tensors: NamedTensors, *, pause: PauseMode = "keep") -> PushResult:
        """Write, prepare everywhere, commit everywhere. Must be called outside an event loop.

        The new version is one above the highest that any server has. Tensors whose bytes all
        servers have already are not written.

        Raises:
            WeightUpdateFailed: a server refused the update, and nothing changed anywhere; or no
                server serves it. A server that did not answer misses the update and is stale.
            ServiceUnavailable: on the first push, a server does not answer.
        """
        return asyncio.run(self.push_async(named_tensors, pause=pause))

    async def push_async(
        self, named_tensors: NamedTensors, *, pause: PauseMode = "keep"
    ) -> PushResult:
        """As `push`, inside an event loop. Writing the files blocks that loop."""
        async with self._make_client() as client:
            if self._transport == "file":
                if self._shared is None:
                    self._shared = _shared_folder(await client.contracts())
                _remove_leftovers(self._shared)
                return await self._push_from(self._shared, client, named_tensors, pause)
            with tempfile.TemporaryDirectory(prefix="openrlhf-alp-push-") as folder:
                return await self._push_from(Path(folder), client, named_tensors, pause)

    async def _push_from(
        self, folder: Path, client: RolloutClient, named_tensors: NamedTensors, pause: PauseMode
    ) -> PushResult:
        statuses = await client.reachable_weights()
        base_version = _common_version(statuses)
        version = max(status.version for status in statuses) + 1
        started_s = time.perf_counter()
        # Gathering shards may block on other ranks; nothing else runs in this loop meanwhile.
        written = write_weights(
            folder,
            f"{_UPDATE_PREFIX}{version}-{uuid.uuid4().hex[:8]}",
            named_tensors,
            statuses[0].tensors,
            skip_unchanged=base_version is not None,
        )
        written_s = time.perf_counter()
        try:
            if self._transport == "http":
                written = await _upload(client, written)
            await _prepare(client, written, version, base_version)
        finally:
            written.remove()
        prepared_s = time.perf_counter()
        commits = await client.commit_weights(
            CommitRequest(version=version, digest=written.digest, pause=pause)
        )
        result = PushResult(
            version=version,
            digest=written.digest,
            num_bytes=written.num_bytes,
            write_s=written_s - started_s,
            prepare_s=prepared_s - written_s,
            commit_s=time.perf_counter() - prepared_s,
            pause_s=max(commit.pause_s for commit in commits),
            load_s=max(commit.load_s for commit in commits),
        )
        logger.info("pushed %s", result)
        return result


async def _upload(client: RolloutClient, written: WrittenWeights) -> WrittenWeights:
    """Send every file to every server; prepare finds them under other names."""
    names = []
    for file in written.files:
        path = written.folder / Path(file).name
        names.append(await client.upload(path, f"{written.folder.name}-{path.name}"))
    return replace(written, files=tuple(names))


async def _prepare(
    client: RolloutClient, written: WrittenWeights, version: int, base_version: int | None
) -> None:
    request = PrepareRequest(
        version=version,
        digest=written.digest,
        files=list(written.files),
        base_version=base_version,
    )
    try:
        await client.prepare_weights(request)
    except WeightUpdateFailed:
        await client.abort_weights()
        raise


def _remove_leftovers(weights_dir: Path) -> None:
    """Remove what a learner wrote that was killed in mid-push; there is one learner at a time."""
    for pattern in (f"{_UPDATE_PREFIX}*", f".{_UPDATE_PREFIX}*"):
        for folder in weights_dir.glob(pattern):
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

"""Weights as safetensors files: in a folder that both sides share, or sent over HTTP."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from safetensors import SafetensorError
from safetensors.torch import save_file

from openrlhf_alp.clients.control import ControlClient
from openrlhf_alp.clients.errors import WeightUpdateFailed
from openrlhf_alp.clients.weights.carry import Bucket, Carrier


@dataclass(slots=True)
class FileCarrier(Carrier):
    """Writes into the servers' shared folder."""

    weights_dir: Path  # the contract's
    name: str  # folder of this update, new for each

    on_device = False

    async def __aenter__(self) -> Self:
        with _naming_the_folder(self.weights_dir):
            (self.weights_dir / self.name).mkdir(parents=True)
        return self

    async def __aexit__(self, *_: object) -> None:
        # After prepare each server has its own hard links to the files, so these can go.
        shutil.rmtree(self.weights_dir / self.name, ignore_errors=True)

    async def carry(self, index: int, bucket: Bucket) -> str:
        file = f"{self.name}/{index:05d}.safetensors"
        with _naming_the_folder(self.weights_dir):
            save_file(bucket, self.weights_dir / file)
        return file


@dataclass(slots=True)
class HttpCarrier(Carrier):
    """Sends every file to every server; a server that does not answer becomes stale."""

    client: ControlClient  # of all servers
    name: str  # begins the name of each file, new for each update
    _folder: Path = field(default_factory=Path, init=False)

    on_device = False

    async def __aenter__(self) -> Self:
        # A file on disk and not a buffer: every server reads it at its own pace, and an upload that
        # was cut short continues at any offset.
        self._folder = Path(tempfile.mkdtemp(prefix="openrlhf-alp-push-"))
        return self

    async def __aexit__(self, *_: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    async def carry(self, index: int, bucket: Bucket) -> str:
        name = f"{self.name}-{index:05d}.safetensors"
        path = self._folder / name
        with _naming_the_folder(self._folder):
            save_file(bucket, path)
        try:
            return await self.client.upload(path, name)
        finally:
            path.unlink()


@contextlib.contextmanager
def _naming_the_folder(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise WeightUpdateFailed(
            f"The update cannot be written to {folder}: {error}. Fix: free space there, or start "
            "the service with a --weights-dir that both sides can write."
        ) from error

"""Weights over HTTP, for a learner that shares no folder: files arrive in resumable pieces.

Once complete, an update is prepared and committed as from a shared folder, under the names
`uploads/<name>`. A learner that lost its connection asks for the size and continues from there.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from services.rollout.weights.serving import WeightsError

_PIECE_BYTES = 4 * 2**20  # fewer hops to a thread than with the network's chunks


class Uploads:
    """The upload folder of one service.

    Args:
        folder: of this service only; made with the first upload.
        max_bytes: limit of all uploaded files together.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._lock = asyncio.Lock()

    def size(self, name: str) -> int:
        """Bytes of `name` received so far; 0 for a file never seen."""
        path = self._folder / name
        return path.stat().st_size if path.is_file() else 0

    def reserve(self, name: str, num_bytes: int) -> Path:
        """The path of a file that the caller writes, once it is known to fit.

        Raises:
            WeightsError: `upload_too_large`, or `cannot_store` when the folder cannot be made.
        """
        path = self._folder / name
        with _disk_errors():
            self._folder.mkdir(exist_ok=True)
            if num_bytes > self._room_for(path):
                raise self._too_large()
        return path

    async def append(self, name: str, offset: int, chunks: AsyncIterator[bytes]) -> int:
        """Write a body at `offset` and return the new size. After a broken connection the bytes
        that arrived are kept.

        Args:
            name: file below the folder.
            offset: the size so far, or 0 to start again.
            chunks: the body.

        Raises:
            WeightsError: `wrong_offset`, `upload_too_large`, or `cannot_store`.
        """
        # One writer: an abandoned request may still be writing when its retry arrives.
        async with self._lock:
            size = self.size(name)
            if offset not in (0, size):
                message = f"{name} has {size} bytes; offset {offset} does not continue it."
                raise WeightsError("wrong_offset", message)
            with _disk_errors():
                self._folder.mkdir(exist_ok=True)
                return await self._write(self._folder / name, offset, chunks)

    async def _write(self, path: Path, offset: int, chunks: AsyncIterator[bytes]) -> int:
        room = self._room_for(path) - offset
        with path.open("r+b" if offset else "wb") as file:
            file.seek(offset)
            piece = bytearray()
            try:
                async for chunk in chunks:
                    room -= len(chunk)
                    if room < 0:
                        raise self._too_large()
                    piece += chunk
                    if len(piece) >= _PIECE_BYTES:
                        # In a thread: a slow disk would stop every stream of tokens.
                        await asyncio.to_thread(file.write, bytes(piece))
                        piece.clear()
            finally:
                # Also when the connection broke, so that the size tells where to continue.
                file.write(piece)
            return file.tell()

    def _room_for(self, path: Path) -> int:
        """Bytes that `path` may have beside the other uploads."""
        others = (file.stat().st_size for file in self._folder.iterdir() if file != path)
        return self._max_bytes - sum(others)

    def _too_large(self) -> WeightsError:
        message = f"The uploads would exceed {self._max_bytes} bytes."
        return WeightsError("upload_too_large", message)


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        message = f"The upload cannot be stored: {error.strerror or error}."
        raise WeightsError("cannot_store", message) from error

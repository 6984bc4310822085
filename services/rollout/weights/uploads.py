"""Weights over HTTP, for a learner that shares no folder: files arrive in pieces, resumable.

Once they are here, an update is prepared and committed as from a shared folder, under the names
`uploads/<name>`. A learner that lost its connection asks for the size and goes on from there.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from services.common.errors import ApiError

_PIECE_BYTES = 4 * 2**20


class Uploads:
    """The upload folder of one service.

    Args:
        folder: private to this service; made with the first upload.
        max_bytes: of all uploaded files together.
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
        """The path for a file that somebody else writes, once it is known to fit.

        Raises:
            ApiError: 413 above the limit, 507 when the folder cannot be made.
        """
        path = self._folder / name
        with _naming_a_full_disk():
            self._folder.mkdir(exist_ok=True)
            if num_bytes > self._max_bytes - self._held_beside(path):
                raise self._too_large()
        return path

    async def append(self, name: str, offset: int, chunks: AsyncIterator[bytes]) -> int:
        """Write a body at `offset`, which must be the size so far, and return the new size.

        What arrived before a broken connection stays.

        Raises:
            ApiError: 409 for another offset, 413 above the limit, 507 when the disk is full.
        """
        async with self._lock:
            size = self.size(name)
            if offset not in (0, size):
                raise ApiError(
                    409,
                    "wrong_offset",
                    f"{name} has {size} bytes; offset {offset} does not continue it.",
                    fix="Ask for the size with GET and go on from there, or start again at 0.",
                    field="offset",
                )
            with _naming_a_full_disk():
                self._folder.mkdir(exist_ok=True)
                return await self._write(self._folder / name, offset, chunks)

    async def _write(self, path: Path, offset: int, chunks: AsyncIterator[bytes]) -> int:
        budget = self._max_bytes - self._held_beside(path) - offset
        with path.open("r+b" if offset else "wb") as file:
            file.seek(offset)
            piece = bytearray()
            try:
                async for chunk in chunks:
                    budget -= len(chunk)
                    if budget < 0:
                        raise self._too_large()
                    piece += chunk
                    if len(piece) >= _PIECE_BYTES:
                        await asyncio.to_thread(file.write, bytes(piece))
                        piece.clear()
            finally:
                file.write(piece)
            return file.tell()

    def _held_beside(self, path: Path) -> int:
        return sum(file.stat().st_size for file in self._folder.iterdir() if file != path)

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            "upload_too_large",
            f"The uploads would exceed {self._max_bytes} bytes.",
            fix="Send the weights of the served model only, in its dtype.",
            field="body",
        )


@contextlib.contextmanager
def _naming_a_full_disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ApiError(
            507,
            "cannot_store",
            f"The upload cannot be stored: {error.strerror or error}.",
            fix="Free space in weights_dir.",
        ) from error

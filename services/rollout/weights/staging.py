"""Brings the files of an update under the service's own names and verifies them before the swap.

A hard link in a folder of this process keeps a staged file alive when the learner removes its own
name for it. The link is what gets verified and later loaded; replacing the learner's file in
between changes neither.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.common.errors import ConfigError
from services.common.owned_folders import OwnedFolder
from services.rollout.engines.protocol import LoadPlan
from services.rollout.weights.checkpoint import BadCheckpointError, TensorFile, scan
from services.rollout.weights.serving import WeightsError
from services.rollout.weights.versions import Version
from services.rollout.wire.fingerprint import weights_digest
from services.rollout.wire.schemas import DtypeCode, PrepareRequest

TIED_HEAD = "lm_head.weight"
UPLOADS = "uploads/"
WEIGHTS_PREFIX = "openrlhf-alp-weights-"
_STAGING_PREFIX = ".staging-"
_FLOATING = frozenset({"BF16", "F16", "F32", "F64"})
_SHOWN_NAMES = 3

Tensors = Mapping[str, TensorFile]


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged:
    """An update whose digest was verified and that can be committed."""

    version: Version
    tensors: Tensors
    folder: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What the service started with."""

    tensors: Tensors  # of the model folder, without a tied head
    dtype_code: DtypeCode  # of serving
    head_is_tied: bool

    def expected(self) -> dict[str, tuple[Sequence[int], DtypeCode]]:
        """name -> (shape, dtype code) of a full update; floating tensors in the serving dtype."""
        return {
            name: (tensor.shape, self.dtype_code if tensor.dtype in _FLOATING else tensor.dtype)
            for name, tensor in self.tensors.items()
        }


def load_plan(tensors: Tensors) -> LoadPlan:
    """Group tensor names by the file they are in."""
    plan: dict[Path, list[str]] = {}
    for name, tensor in tensors.items():
        plan.setdefault(tensor.path, []).append(name)
    return plan


def digest_of(tensors: Tensors) -> str:
    """The digest of a whole set of tensors."""
    return weights_digest({name: tensor.digest for name, tensor in tensors.items()})


class Staging:
    """The folder of one service inside weights_dir; removed when the service ends."""

    def __init__(self, model: ServedModel, weights_dir: Path) -> None:
        self.weights_dir = weights_dir.resolve()
        self._model = model
        self._folder = OwnedFolder.create(self.weights_dir, _STAGING_PREFIX)
        self._num_staged = 0

    @property
    def uploads_dir(self) -> Path:
        """Where files sent over HTTP are stored; a prepare request calls it `uploads/`."""
        return self._folder.path / UPLOADS

    def stage(self, request: PrepareRequest, serving: Tensors) -> Staged:
        """Link, read, compare and hash the files of `request`; leave nothing behind on failure.

        Args:
            request: names the files and the digest of the merged result.
            serving: where the tensors come from that the update leaves out.

        Raises:
            WeightsError: the code says what is wrong, the message which file, tensor or digest.
        """
        # A new folder each time: the serving tensors may be mapped from an earlier one.
        self._num_staged += 1
        folder = self._folder.path / str(self._num_staged)
        try:
            return self._stage_in(folder, request, serving)
        except BadCheckpointError as error:
            self.drop(folder)
            message = f"A weight file cannot be used: {error}."
            raise WeightsError("bad_weight_file", message) from error
        except OSError as error:
            self.drop(folder)
            message = f"The update cannot be staged in weights_dir: {error.strerror or error}."
            raise WeightsError("cannot_stage", message) from error
        except WeightsError:
            self.drop(folder)
            raise

    def drop(self, folder: Path) -> None:
        """Remove one staged update."""
        shutil.rmtree(folder, ignore_errors=True)

    def keep_only(self, tensors: Tensors) -> None:
        """Remove every folder, the uploads included, that `tensors` does not read from."""
        used = {tensor.path.parent for tensor in tensors.values()}
        for folder in self._folder.path.iterdir():
            if folder.is_dir() and folder not in used:
                self.drop(folder)

    def close(self) -> None:
        """Remove everything that this process staged."""
        self._folder.remove()

    def _stage_in(self, folder: Path, request: PrepareRequest, serving: Tensors) -> Staged:
        folder.mkdir(parents=True, mode=0o700)
        # Hashes come from the links: the learner may rewrite its own files at any moment.
        sent = scan(self._link(request.files, folder))
        # Before the digest, although a mismatch would show there too: names, shapes and dtypes
        # say what is wrong, a digest only that something is.
        self._compare(sent, partial=request.base_version is not None)
        # In the order of the served names, so a tied head that was sent is left out: the engine
        # ties it itself. A full update has every name, so `serving` is read by partial ones only.
        merged = {name: sent.get(name) or serving[name] for name in self._model.tensors}
        digest = digest_of(merged)
        if digest != request.digest:
            message = f"The files hash to {digest}, not to the digest sent ({request.digest})."
            raise WeightsError("digest_mismatch", message)
        version = Version(number=request.version, digest=digest)
        return Staged(version=version, tensors=merged, folder=folder)

    def _link(self, names: Sequence[str], folder: Path) -> list[Path]:
        # Numbered: two files of a request may have one name in different folders.
        links = [folder / f"{index:05d}.safetensors" for index in range(len(names))]
        for name, link in zip(names, links, strict=True):
            os.link(self._source(name), link)
        return links

    def _source(self, name: str) -> Path:
        base = self._folder.path if name.startswith(UPLOADS) else self.weights_dir
        # Resolved first, so that a symbolic link out of the folder is refused like "..".
        source = None if "\0" in name else (base / name).resolve()
        if source is None or Path(name).is_absolute() or not source.is_relative_to(base):
            message = "A file name points outside weights_dir."
            raise WeightsError("path_outside_weights_dir", message)
        if not source.is_file():
            message = f"There is no file {name!r} in weights_dir."
            raise WeightsError("weight_file_missing", message)
        return source

    def _compare(self, sent: Tensors, *, partial: bool) -> None:
        expected = self._model.expected()
        tolerated = {TIED_HEAD} if self._model.head_is_tied else set()
        unknown = sorted(sent.keys() - expected.keys() - tolerated)
        missing = sorted(expected.keys() - sent.keys())
        if unknown:
            raise WeightsError("unknown_tensors", f"The served model has no {_some(unknown)}.")
        if missing and not partial:
            raise WeightsError("missing_tensors", f"The update lacks {_some(missing)}.")
        for name in sent.keys() & expected.keys():
            tensor, (shape, dtype) = sent[name], expected[name]
            if tensor.shape != tuple(shape):
                message = f"{name} has shape {list(tensor.shape)}, expected {list(shape)}."
                raise WeightsError("shape_mismatch", message)
            if tensor.dtype != dtype:
                message = f"{name} has dtype {tensor.dtype}, expected {dtype}."
                raise WeightsError("dtype_mismatch", message)


@contextlib.contextmanager
def weights_folder(
    configured: Path | None, shared_memory: Path = Path("/dev/shm")
) -> Iterator[Path]:
    """The folder for weight updates while the service runs: `configured`, or one of its own.

    Its own is in shared memory, from which the engine reads without a copy, or else in the
    temporary folder, and is removed at the end.

    Raises:
        ConfigError: the folder cannot be made.
    """
    own = None
    try:
        if configured is not None:
            folder = configured
            folder.mkdir(parents=True, exist_ok=True)
        else:
            parent = shared_memory if shared_memory.is_dir() else Path(tempfile.gettempdir())
            own = OwnedFolder.create(parent, WEIGHTS_PREFIX)
            folder = own.path
    except OSError as error:
        raise ConfigError(
            f"--weights-dir cannot be used: {error}. Fix: name a folder this user can write."
        ) from error
    try:
        yield folder
    finally:
        if own is not None:
            own.remove()


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(names[:_SHOWN_NAMES]) + more

"""Bringing the files of an update under our own name and proving them, before anything is swapped.

A hard link in a private folder keeps a staged file alive when the learner removes its own name of
it, and is what gets verified, so nothing can change between the proof and the load.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.common.errors import ApiError
from services.rollout.engines.protocol import LoadPlan
from services.rollout.private_folder import PrivateFolder, remove_folders_of_the_dead
from services.rollout.weights.checkpoint import BadCheckpointError, TensorFile, scan
from services.rollout.weights.versions import Version
from services.rollout.wire.fingerprint import weights_digest
from services.rollout.wire.schemas import DtypeCode, PrepareRequest

TIED_HEAD = "lm_head.weight"
UPLOADS = "uploads/"
_STAGING_PREFIX = ".staging-"
_FLOATING = frozenset({"BF16", "F16", "F32", "F64"})
_SHOWN_NAMES = 3

Tensors = Mapping[str, TensorFile]


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged:
    """An update whose bytes have been proved and that can be committed."""

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
    """The private folder of one service inside weights_dir."""

    def __init__(self, model: ServedModel, weights_dir: Path) -> None:
        self._model = model
        self._weights_dir = weights_dir.resolve()
        self._folder = PrivateFolder(self._weights_dir, _STAGING_PREFIX)
        self._root = self._folder.path
        self._num_staged = 0

    @property
    def weights_dir(self) -> Path:
        return self._weights_dir

    @property
    def uploads_dir(self) -> Path:
        """Where files sent over HTTP go; prepare knows it as `uploads/`."""
        return self._root / UPLOADS

    def stage(self, request: PrepareRequest, serving: Tensors) -> Staged:
        """Link, read, compare and hash the files of `request`; leave nothing behind on failure.

        Raises:
            ApiError: names the file, tensor or digest that is wrong, or says the disk is full.
        """
        self._num_staged += 1
        folder = self._root / str(self._num_staged)
        try:
            return self._stage_in(folder, request, serving)
        except BadCheckpointError as error:
            self.drop(folder)
            raise _bad_files(
                "bad_weight_file", f"A weight file cannot be used: {error}."
            ) from error
        except OSError as error:
            self.drop(folder)
            raise ApiError(
                507,
                "cannot_stage",
                f"The update cannot be staged in weights_dir: {error.strerror or error}.",
                fix="Free space or inodes in weights_dir, or check its permissions.",
                field="files",
            ) from error
        except ApiError:
            self.drop(folder)
            raise

    def drop(self, folder: Path) -> None:
        """Forget one staged update."""
        shutil.rmtree(folder, ignore_errors=True)

    def keep_only(self, tensors: Tensors) -> None:
        """Remove every staged folder that `tensors` does not read from."""
        used = {tensor.path.parent for tensor in tensors.values()}
        for folder in self._root.iterdir():
            if folder.is_dir() and folder not in used:
                self.drop(folder)

    def close(self) -> None:
        """Remove everything this process staged."""
        self._folder.close()

    def _stage_in(self, folder: Path, request: PrepareRequest, serving: Tensors) -> Staged:
        folder.mkdir(parents=True, mode=0o700)
        sent = scan(self._link(request.files, folder))
        self._compare(sent, partial=request.base_version is not None)
        merged = {name: sent.get(name) or serving[name] for name in self._model.tensors}
        digest = digest_of(merged)
        if digest != request.digest:
            raise ApiError(
                422,
                "digest_mismatch",
                f"The files hash to {digest}, not to the digest sent ({request.digest}).",
                fix="Write the files again; they changed or were cut short on the way.",
                field="digest",
            )
        version = Version(number=request.version, digest=digest)
        return Staged(version=version, tensors=merged, folder=folder)

    def _link(self, names: Sequence[str], folder: Path) -> list[Path]:
        links = []
        for index, name in enumerate(names):
            source = self._source(name)
            link = folder / f"{index:05d}.safetensors"
            os.link(source, link)
            links.append(link)
        return links

    def _source(self, name: str) -> Path:
        if "\0" in name or Path(name).is_absolute():
            raise _outside()
        base = self._root if name.startswith(UPLOADS) else self._weights_dir
        source = (base / name).resolve()
        if not source.is_relative_to(base):
            raise _outside()
        if not source.is_file():
            raise ApiError(
                422,
                "weight_file_missing",
                f"There is no file {name!r} in weights_dir.",
                fix="Write the file before prepare, in a folder that both sides share.",
                field="files",
            )
        return source

    def _compare(self, sent: Tensors, *, partial: bool) -> None:
        expected = self._model.expected()
        tolerated = {TIED_HEAD} if self._model.head_is_tied else set()
        unknown = sorted(sent.keys() - expected.keys() - tolerated)
        missing = sorted(expected.keys() - sent.keys())
        if unknown:
            raise _bad_files("unknown_tensors", f"The served model has no {_some(unknown)}.")
        if missing and not partial:
            raise _bad_files("missing_tensors", f"The update lacks {_some(missing)}.")
        for name in sent.keys() & expected.keys():
            tensor, (shape, dtype) = sent[name], expected[name]
            if tensor.shape != tuple(shape):
                message = f"{name} has shape {list(tensor.shape)}, expected {list(shape)}."
                raise _bad_files("shape_mismatch", message)
            if tensor.dtype != dtype:
                message = f"{name} has dtype {tensor.dtype}, expected {dtype}."
                raise _bad_files("dtype_mismatch", message)


def remove_if_abandoned(weights_dir: Path) -> None:
    """Remove a private weights folder whose service was killed, with all that it holds."""
    if any(weights_dir.glob(f"{_STAGING_PREFIX}*")):
        remove_folders_of_the_dead(weights_dir, _STAGING_PREFIX)
        if not any(weights_dir.glob(f"{_STAGING_PREFIX}*")):
            shutil.rmtree(weights_dir, ignore_errors=True)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(names[:_SHOWN_NAMES]) + more


def _bad_files(code: str, message: str) -> ApiError:
    return ApiError(
        422,
        code,
        message,
        fix="Write whole files with exactly the names, shapes and dtypes of GET /v1/weights.",
        field="files",
    )


def _outside() -> ApiError:
    return ApiError(
        422,
        "path_outside_weights_dir",
        "A file name points outside weights_dir.",
        fix="Use names relative to the contract's weights_dir, without '..'.",
        field="files",
    )

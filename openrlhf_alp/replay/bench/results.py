"""A replay as JSON: written after every method, so that an interrupted one continues."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from openrlhf_alp.replay.bench.update import MethodResult

FILE_NAME = "replay.json"


@dataclass(slots=True, kw_only=True)
class Replay:
    """Results of one batch, with what they were made from."""

    batch: str
    """File of the batch."""
    settings: dict[str, Any]
    """Everything that decides the results: model and its digest, update, sigma0, noise."""
    results: dict[str, MethodResult] = field(default_factory=dict)
    """By method, in their order."""

    @property
    def key(self) -> str:
        """Changes with the batch or any setting."""
        text = json.dumps([self.batch, self.settings], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def save(self, folder: Path) -> Path:
        """Write `replay.json` in one atomic step."""
        folder.mkdir(parents=True, exist_ok=True)
        rows = {name: asdict(result) for name, result in self.results.items()}
        content = {"key": self.key, "batch": self.batch, "settings": self.settings, "methods": rows}
        path = folder / FILE_NAME
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(_without_nan(content), indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
        return path


def known_results(folder: Path, key: str) -> dict[str, MethodResult]:
    """Results that an earlier replay with the same key left in `folder`; none if it differs."""
    try:
        content = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
        if content["key"] != key:
            return {}
        return {name: _result(row) for name, row in content["methods"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _result(row: Mapping[str, Any]) -> MethodResult:
    names = {f.name for f in fields(MethodResult)}
    values = {name: row[name] for name in names}
    return MethodResult(**{**values, "cosine": _number(values["cosine"])})


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _without_nan(value: Any) -> Any:
    """JSON has no NaN; null says that there is no number."""
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

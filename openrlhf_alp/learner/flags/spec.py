"""Flags from dataclasses: each flag is stated once, as a field with a docstring.

    lr: float = 1e-2                              --alp.lr ALP.LR
    \"""Learning rate of log sigma.\"""     ->         Learning rate of log sigma. (default: 0.01)

`bool` becomes a switch, `Literal` choices, a tuple several values, `X | None` an X that may be
absent. A field's `metadata` holds the rest: `prefix` and `name` where the flag differs from
PREFIX.field (an empty prefix gives --name), `metavar`, `choices`, and `none` (the word that is
read as None). A field that is a dataclass itself adds its own fields under the same prefix.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import Field, fields, is_dataclass
from operator import attrgetter
from types import NoneType, SimpleNamespace
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, with_config

Config = TypeVar("Config")


def add_flags(group: argparse._ArgumentGroup, config: Any, prefix: str) -> None:
    """Add a flag for every field of the dataclass `config`.

    Raises:
        KeyError: a field has no docstring, so its flag would have no help.
    """
    helps = _docstrings(config)
    for field, kind in _typed_fields(config):
        if is_dataclass(kind):
            add_flags(group, kind, prefix)
            continue
        options = _argument(kind)
        options |= {k: field.metadata[k] for k in ("metavar", "choices") if k in field.metadata}
        options["default"] = field.default
        if "none" in field.metadata:
            options["default"] = field.metadata["none"]
            options["type"] = _or_none(options["type"], field.metadata["none"])
        # argparse formats help texts with %.
        options["help"] = helps[field.name].replace("%", "%%")
        if options["default"] not in (None, False, ()):
            options["help"] += " (default: %(default)s)"
        group.add_argument(f"--{_flag(field, prefix)}", **options)


def read_flags(args: SimpleNamespace, config: type[Config], prefix: str) -> Config:
    """Build `config` from OpenRLHF's nested `args`.

    Raises:
        ValueError: what the dataclass raises for its values.
    """
    values: dict[str, Any] = {}
    for field, kind in _typed_fields(config):
        if is_dataclass(kind):
            values[field.name] = read_flags(args, kind, prefix)  # type: ignore[arg-type]
            continue
        value = attrgetter(_flag(field, prefix))(args)
        values[field.name] = tuple(value) if isinstance(value, list) else value
    return config(**values)


def _flag(field: Field, prefix: str) -> str:
    names = (field.metadata.get("prefix", prefix), field.metadata.get("name", field.name))
    return ".".join(name for name in names if name)


def _typed_fields(config: type) -> Iterator[tuple[Field, Any]]:
    types = get_type_hints(config)
    yield from ((field, types[field.name]) for field in fields(config))


def _docstrings(config: type) -> dict[str, str]:
    """The text under each field, which pydantic reads from the source."""
    described = with_config(ConfigDict(use_attribute_docstrings=True))(config)
    properties = TypeAdapter(described).json_schema()["properties"]
    return {name: s["description"] for name, s in properties.items() if "description" in s}


def _argument(kind: Any) -> dict[str, Any]:
    """What argparse needs to know of a field's type."""
    if kind is bool:
        return {"action": "store_true"}
    if NoneType in get_args(kind):
        [kind] = (member for member in get_args(kind) if member is not NoneType)
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if get_origin(kind) is tuple:
        items = get_args(kind)
        return {"type": items[0], "nargs": "+" if Ellipsis in items else len(items)}
    return {"type": kind}


def _or_none(convert: Callable[[str], Any], word: str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        return None if text == word else convert(text)

    read.__name__ = f"{convert.__name__} or '{word}'"  # argparse names it in its error message
    return read

"""What clients and services agree on: JSON and msgpack of the pydantic models, numbers, variables.

float32 survives both formats bit for bit. JSON carries it as the decimal of the equal float64,
which parses back to the same float32. msgpack carries a list of numbers as one little-endian block:
extension 1 holds float32, extension 2 int32. Ordinary msgpack arrays are accepted too. Clients
import this module, so it needs no web framework.
"""

import array
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import msgpack
import orjson
from pydantic import BaseModel, BeforeValidator

ROLLOUT_VARIABLES = "OPENRLHF_ALP_ROLLOUT_"
TOOL_VARIABLES = "OPENRLHF_ALP_TOOL_"
"""Prefixes of the environment variables that set a service's settings."""

# Services and learner read their keys from the same variables, so one export serves both sides.
# The learner takes keys from there only: a command line is readable by every user of the machine.
API_KEY_VARIABLE = ROLLOUT_VARIABLES + "API_KEY"
ADMIN_KEY_VARIABLE = ROLLOUT_VARIABLES + "ADMIN_KEY"
TOOL_KEY_VARIABLE = TOOL_VARIABLES + "API_KEY"

FILE_SUFFIX = "_FILE"
"""A key's variable with this suffix names a file that holds the key."""


_LARGEST = 2**63 - 1


def _check_number(value: object) -> object:
    # pydantic takes True for 1, and whole numbers of any length.
    if isinstance(value, bool):
        raise ValueError("must be a number, not a boolean")
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise ValueError(f"must be at most {_LARGEST}")
    return value


Number = Annotated[float, BeforeValidator(_check_number)]
Whole = Annotated[int, BeforeValidator(_check_number)]
"""Numbers of requests."""

JSON_TYPE = "application/json"
MSGPACK_TYPE = "application/msgpack"
NDJSON_TYPE = "application/x-ndjson"

_FLOAT32_CODE = 1
_INT32_CODE = 2
_TYPECODES = {_FLOAT32_CODE: "f", _INT32_CODE: "i"}
_BIG_ENDIAN = sys.byteorder == "big"

FLOAT32_FIELDS = frozenset({"logprobs"})
INT32_FIELDS = frozenset({"token_ids"})


def read_key_files() -> None:
    """Set the key variables whose `_FILE` variable names a file, to the text of that file.

    Docker and Kubernetes hand secrets over as files: the environment of a container is shown by
    their `inspect` and `describe`. Space around the key is dropped. The `_FILE` variables are
    unset, so that child processes find one source for each key.

    Raises:
        ValueError: a file cannot be read or is empty, or both variables of a key are set.
    """
    for name in (API_KEY_VARIABLE, ADMIN_KEY_VARIABLE, TOOL_KEY_VARIABLE):
        source = name + FILE_SUFFIX
        path = os.environ.get(source)
        if not path:
            continue
        if os.environ.get(name):
            raise ValueError(f"Both {name} and {source} are set. Fix: unset one of them.")
        try:
            key = Path(path).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{source} names a file that cannot be read: {error}. Fix: make it readable for "
                f"uid {os.getuid()}, or set {name} instead."
            ) from error
        if not key:
            raise ValueError(f"{source} names {path}, which is empty. Fix: write the key into it.")
        os.environ[name] = key
        del os.environ[source]


def require_keys(*names: str, service: str) -> None:
    """Check that these key variables are set, for a service that somebody else has started.

    Raises:
        ValueError: one is not.
    """
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise ValueError(
            f"{' and '.join(missing)} {verb} not set. The {service} service prints its keys when "
            "it starts: export them, or start it with keys of your own."
        )


def _pack_array(code: int, values: list[Any]) -> msgpack.ExtType:
    block = array.array(_TYPECODES[code], values)
    if _BIG_ENDIAN:
        block.byteswap()
    return msgpack.ExtType(code, block.tobytes())


def _unpack_array(code: int, data: bytes) -> object:
    typecode = _TYPECODES.get(code)
    if typecode is None:
        raise ValueError(f"unknown msgpack extension {code}")
    block = array.array(typecode)
    block.frombytes(data)  # ValueError when it is no whole number of items
    if _BIG_ENDIAN:
        block.byteswap()
    return block.tolist()


def _compact(value: Any) -> Any:
    """Replace the number lists of known fields by blocks, in a tree fresh from `model_dump`."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key in FLOAT32_FIELDS and isinstance(item, list):
                value[key] = _pack_array(_FLOAT32_CODE, item)
            elif key in INT32_FIELDS and isinstance(item, list):
                value[key] = _pack_array(_INT32_CODE, item)
            elif isinstance(item, dict | list):
                _compact(item)
    # Lists are homogeneous, so the first item tells whether there is anything to descend into.
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for item in value:
            _compact(item)
    return value


def encode(model: BaseModel, media_type: str) -> bytes:
    """Serialise `model` as `media_type` (JSON_TYPE or MSGPACK_TYPE)."""
    if media_type == MSGPACK_TYPE:
        packed: bytes = msgpack.packb(_compact(model.model_dump()))
        return packed
    return model.model_dump_json().encode()


def decode(body: bytes, media_type: str) -> Any:
    """Parse `body` into plain Python values.

    Raises:
        ValueError: the body is not valid `media_type`.
    """
    if media_type == MSGPACK_TYPE:
        try:
            return msgpack.unpackb(body, ext_hook=_unpack_array, strict_map_key=True)
        # RecursionError: nesting depth is the sender's choice.
        except (msgpack.UnpackException, ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"not valid msgpack: {error or type(error).__name__}") from error
    return orjson.loads(body)


def media_type_of(header: str | None) -> str:
    """The media type named by a Content-Type or Accept header; JSON when it names no msgpack."""
    return MSGPACK_TYPE if header is not None and MSGPACK_TYPE in header.lower() else JSON_TYPE

"""Subclassing what upstream decorated with `@ray.remote`."""

from __future__ import annotations

from typing import Any


def undecorated(actor_class: Any) -> type:
    """The plain class under a `@ray.remote` one, which Ray does not allow to be subclassed.

    Raises:
        RuntimeError: Ray keeps it elsewhere than in 2.55; the message names the pin.
    """
    try:
        return actor_class.__ray_metadata__.modified_class.__ray_actor_class__
    except AttributeError as error:
        raise RuntimeError(
            f"cannot find the class under {actor_class!r}; Ray moved it. Install ray==2.55.0."
        ) from error

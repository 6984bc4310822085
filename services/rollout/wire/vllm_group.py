"""The group of a weight transfer, held alike by vLLM's engines at the learner and the server.

vLLM is not imported, so whoever has no engine may import this. Written against vLLM 0.29.
"""

from typing import Any


def lacks_nccl(engine: Any) -> bool:
    """Whether vLLM made a communicator that does nothing, because it cannot load NCCL."""
    group = _communicator(engine)
    return group is not None and bool(group.disabled)


def leave_group(engine: Any) -> None:
    """Leave the group; whoever still waits in it on this side is woken up with an error."""
    group = _communicator(engine)
    if group is not None:
        group.destroy()
    engine.shutdown()


def _communicator(engine: Any) -> Any:
    """vLLM's communicator; ipc has none, nor has a group that never met."""
    return getattr(engine, "model_update_group", None)

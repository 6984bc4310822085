"""What an episode asks of the outside world. The reward's is in `rewards/protocol.py`."""

from collections.abc import Sequence
from typing import Protocol

from openrlhf_alp.episodes.code_blocks import CodeResult
from openrlhf_alp.episodes.records import Completion, SamplingConfig


class Generate(Protocol):
    """Samples one continuation of token ids."""

    async def __call__(
        self, *, request_id: str, prompt_ids: Sequence[int], sampling: SamplingConfig
    ) -> Completion:
        """Returns the sampled tokens, after as many retries as the implementation sees fit.

        `request_id` makes a retry safe: the same id and the same body give the same answer.
        """
        ...


class Decode(Protocol):
    """Turns sampled ids into text for people and rewards, special tokens left out."""

    def __call__(self, token_ids: Sequence[int], /) -> str: ...


class Encode(Protocol):
    """Turns the text of an observation into ids; no special token is added."""

    def __call__(self, text: str, /) -> Sequence[int]: ...


class Interpreter(Protocol):
    """Runs the code of one episode; opened with it, closed with it."""

    async def run(self, code: str) -> CodeResult:
        """Runs `code` once and says how it ended; a failing program is a result.

        Raises:
            ToolLostError: nobody could run it, after as many retries as the implementation sees
                fit.
        """
        ...

    async def close(self) -> None:
        """Frees what the episode held."""
        ...

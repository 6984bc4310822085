"""From a configuration to the runner that plays its episodes over the services.

ToolConfig -> build_runner -> EpisodeRunner -> Episode -> `response.to_response`
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from openrlhf_alp.clients.channel import Timeouts
from openrlhf_alp.clients.rollout import RolloutClient
from openrlhf_alp.clients.tool import ToolClient
from openrlhf_alp.episodes.observation import chat_template, plain_template
from openrlhf_alp.episodes.protocols import EpisodeRunner, Generate
from openrlhf_alp.episodes.records import Completion, SamplingConfig, VersionSpan, VoidPolicy
from openrlhf_alp.episodes.runners import SingleTurn, ToolIntegrated, ToolIntegratedConfig
from openrlhf_alp.rewards.protocol import Reward
from openrlhf_alp.rollouts.interpreter import SessionInterpreter, StatelessInterpreter
from services.rollout.wire.schemas import GenerateRequest, Sampling

# The learner makes a flag of each field; this is the prefix of those that are not --tool.FIELD.
_TIR = {"prefix": "tir"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolConfig:
    """Where code runs, and the limits of an episode. The key comes from the environment."""

    urls: tuple[str, ...] = field(default=(), metadata={"name": "service_urls", "metavar": "URL"})
    """Tool services (python -m services.tool): episodes become tool-integrated, code that the
    policy writes in ```python blocks runs there. The key comes from $OPENRLHF_ALP_TOOL_API_KEY."""

    session: bool = False
    """Keep one interpreter with its state for a whole episode instead of a new one per program."""

    timeout_s: float = 5.0
    """Time limit of one program, in seconds."""

    request_timeout_s: float = 120.0
    """Longest wait for one program's result in seconds, queueing and retries included."""

    max_tool_turns: int = field(default=5, metadata=_TIR)
    """Most programs that an episode may run."""

    max_tokens_per_turn: int | None = field(default=None, metadata={**_TIR, "metavar": "N"})
    """Most sampled tokens of one turn; default: what is left of --rollout.max_new_tokens, the
    budget of the whole episode after its prompt."""

    max_output_chars: int = field(default=512, metadata=_TIR)
    """Characters that are kept of each output stream of a program."""

    void: VoidPolicy = field(default="trajectory", metadata=_TIR)
    """What a turn with neither code nor \\boxed{} answer removes from the loss: its whole episode
    (trajectory), itself (turn), or nothing (off)."""

    void_baseline: Literal["keep", "drop"] = field(default="keep", metadata=_TIR)
    """Whether a void episode's reward counts in its group's baseline."""

    template: Literal["auto", "chat", "plain"] = field(default="auto", metadata=_TIR)
    """Show a program's output as a user message of the chat template or as a plain fence; auto is
    chat with --data.apply_chat_template."""

    def __post_init__(self) -> None:
        # Clients join the path of a route to it.
        object.__setattr__(self, "urls", tuple(url.rstrip("/") for url in self.urls))
        _ = self.limits  # raises ValueError when a limit is out of range
        for flag, seconds in (
            ("--tool.timeout_s", self.timeout_s),
            ("--tool.request_timeout_s", self.request_timeout_s),
        ):
            if seconds <= 0:
                raise ValueError(f"{flag} is {seconds}; it must be above 0")

    @property
    def limits(self) -> ToolIntegratedConfig:
        """The limits of an episode, apart from its token budget."""
        return ToolIntegratedConfig(
            max_tokens_per_turn=self.max_tokens_per_turn,
            max_tool_turns=self.max_tool_turns,
            max_output_chars=self.max_output_chars,
        )


def build_runner(
    *,
    generate: Generate,
    reward: Reward,
    tokenizer: Any,
    tool: ToolConfig | None = None,
    client: ToolClient | None = None,
) -> EpisodeRunner:
    """Return a runner for one answer to a prompt, or with `client` for tool-integrated episodes.

    Args:
        tool: required with `client`; its `template` must not be `auto`.

    Raises:
        ValueError: the tokenizer's chat template cannot show a tool's output.
    """
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    if tool is None or client is None:
        return SingleTurn(generate=generate, decode=decode, reward=reward)
    interpreter = SessionInterpreter if tool.session else StatelessInterpreter
    template = chat_template if tool.template == "chat" else plain_template
    return ToolIntegrated(
        generate=generate,
        open_interpreter=partial(interpreter, client, timeout_s=tool.timeout_s),
        # Without the split, a program that prints the text of a special token prints the token.
        encode=partial(tokenizer.encode, add_special_tokens=False, split_special_tokens=True),
        decode=decode,
        template=template(tokenizer),
        reward=reward,
        config=tool.limits,
    )


def tool_client(tool: ToolConfig, key: str) -> ToolClient:
    """Return a client of the tool services with the time limits of `tool`."""
    limit_s = tool.request_timeout_s
    timeouts = Timeouts(read_s=limit_s, total_s=limit_s)
    return ToolClient(tool.urls, api_key=key, timeouts=timeouts)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceGenerate:
    """The rollout service as an episode's `Generate`.

    The client replaces a lost server by another one within `deadline_s`.
    """

    client: RolloutClient
    deadline_s: float
    """Server-side deadline of one request in seconds; after it the engine slot is freed."""

    work_limit_s: float | None = None
    """The same, from the first sampled token on; None: no such limit."""

    async def __call__(
        self, *, request_id: str, prompt_ids: Sequence[int], sampling: SamplingConfig
    ) -> Completion:
        """Sample over HTTP; see `episodes.protocols.Generate`.

        Raises:
            ServiceError: the services cannot be reached or refuse the request.
        """
        reply = await self.client.generate(
            GenerateRequest(
                request_id=request_id,
                token_ids=list(prompt_ids),
                # Every field is sent, so that no default of the server changes the distribution.
                sampling=Sampling(**dataclasses.asdict(sampling)),
                deadline_s=self.deadline_s,
                work_limit_s=self.work_limit_s,
            )
        )
        sample = reply.samples[0]
        return Completion(
            token_ids=tuple(sample.token_ids),
            logprobs=tuple(sample.logprobs),
            finish_reason=sample.finish_reason,
            stop_reason=sample.stop_reason,
            spans=tuple(VersionSpan(**span.model_dump()) for span in sample.spans),
        )

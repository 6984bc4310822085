"""The rollout service as a model of Inspect: tokens in, tokens out, counted by its own tokenizer.

Inspect's own counting downloads a table at first use, so an adapter without it needs a network.
Importing this module registers the provider `openrlhf_alp`; the entry point of the package does it
for the `inspect` command:

    inspect eval TASK --model openrlhf_alp/policy -M urls=http://127.0.0.1:8000 -M tokenizer=DIR
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    GenerateConfig,
    Logprob,
    Logprobs,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    modelapi,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from openrlhf_alp.clients.channel import Timeouts
from openrlhf_alp.clients.rollout import RolloutClient
from openrlhf_alp.data.templates import prompt_text
from openrlhf_alp.episodes.records import Completion, SamplingConfig
from openrlhf_alp.rollouts.runners import ServiceGenerate
from services.common.wire import API_KEY_VARIABLE

PROVIDER = "openrlhf_alp"
_MAX_CONNECTIONS = 64
_DEFAULT_MAX_TOKENS = 2048


class RolloutModel(ModelAPI):
    """Inspect's model over one or more rollout services that serve the same policy.

    Args:
        urls: rollout services, as a list or separated by commas; the API key comes from the
            environment.
        tokenizer: folder or Hugging Face id of the policy's tokenizer, or the tokenizer itself.
        request_timeout_s: longest work on one request, from its first token on.
        queue_timeout_s: longest wait for one request, queueing and retries included.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig | None = None,
        *,
        urls: Sequence[str] | str = (),
        tokenizer: Any = None,
        request_timeout_s: float = 600.0,
        queue_timeout_s: float = 3600.0,
    ) -> None:
        super().__init__(
            model_name, base_url, api_key, [API_KEY_VARIABLE], config or GenerateConfig()
        )
        listed = urls.split(",") if isinstance(urls, str) else list(urls)
        self._urls = [url.strip() for url in [*listed, base_url or ""] if url.strip()]
        if isinstance(tokenizer, str | Path):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        if tokenizer is None:
            raise ValueError("the model openrlhf_alp/... needs -M tokenizer=DIR, the policy's own")
        self.tokenizer = tokenizer
        self._limits = (request_timeout_s, queue_timeout_s)
        self._client: RolloutClient | None = None

    async def complete(
        self, *, request_id: str, prompt_ids: Sequence[int], sampling: SamplingConfig
    ) -> Completion:
        """Samples token ids; see `episodes.protocols.Generate`."""
        work_s, queue_s = self._limits
        if self._client is None:
            # Here and not in the constructor: a client lives in the event loop that uses it.
            key = self.api_key or os.environ.get(API_KEY_VARIABLE, "")
            timeouts = Timeouts(read_s=queue_s, total_s=queue_s)
            self._client = RolloutClient(self._urls, api_key=key, timeouts=timeouts)
        generate = ServiceGenerate(client=self._client, deadline_s=queue_s, work_limit_s=work_s)
        return await generate(request_id=request_id, prompt_ids=prompt_ids, sampling=sampling)

    async def generate(
        self,
        input: list[ChatMessage],
        tools: list[ToolInfo],
        tool_choice: ToolChoice,
        config: GenerateConfig,
    ) -> ModelOutput:
        """Answers a chat, for tasks that are not ours. Tools are not offered to the policy."""
        ids = self._encode(input)
        completion = await self.complete(
            request_id=f"inspect-{uuid4().hex}", prompt_ids=ids, sampling=_sampling(config)
        )
        return ModelOutput(
            model=self.model_name,
            choices=[_choice(completion, self.tokenizer, model=self.model_name)],
            usage=usage(len(ids), len(completion.token_ids)),
        )

    async def count_text_tokens(self, text: str) -> int:
        """Number of tokens of a text, without special tokens."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    async def count_tokens(
        self, input: str | list[ChatMessage], config: GenerateConfig | None = None
    ) -> int:
        """Number of tokens of a text, or of a chat behind the chat template."""
        if isinstance(input, str):
            return await self.count_text_tokens(input)
        return len(self._encode(input))

    async def aclose(self) -> None:
        """Closes the connections; a later request opens new ones."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    def max_connections(self) -> int:
        """Requests at the same time, unless `--max-connections` says otherwise."""
        return _MAX_CONNECTIONS

    def connection_key(self) -> str:
        """Requests to the same services share one limit."""
        return ",".join(self._urls)

    def _encode(self, messages: list[ChatMessage]) -> list[int]:
        chat = [{"role": message.role, "content": message.text} for message in messages]
        text = prompt_text(chat, self.tokenizer, named="-M tokenizer")
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


@modelapi(name=PROVIDER)
def openrlhf_alp() -> type[ModelAPI]:
    """The provider as Inspect finds it."""
    return RolloutModel


def usage(num_prompt: int, num_sampled: int) -> ModelUsage:
    """Token counts of one exchange, as Inspect adds them up."""
    return ModelUsage(
        input_tokens=num_prompt, output_tokens=num_sampled, total_tokens=num_prompt + num_sampled
    )


def _sampling(config: GenerateConfig) -> SamplingConfig:
    # Neutral values and not those of a model's generation config: what is sampled is what is said.
    return SamplingConfig(
        temperature=1.0 if config.temperature is None else config.temperature,
        top_p=1.0 if config.top_p is None else config.top_p,
        top_k=config.top_k or 0,
        max_tokens=config.max_tokens or _DEFAULT_MAX_TOKENS,
        stop=tuple(config.stop_seqs or ()),
        seed=config.seed,
    )


def _choice(completion: Completion, tokenizer: Any, *, model: str) -> ChatCompletionChoice:
    pairs = zip(completion.token_ids, completion.logprobs, strict=True)
    logprobs = [
        Logprob(token=tokenizer.decode([token]), logprob=logprob) for token, logprob in pairs
    ]
    text = tokenizer.decode(completion.token_ids, skip_special_tokens=True)
    return ChatCompletionChoice(
        message=ChatMessageAssistant(content=text, source="generate", model=model),
        stop_reason="max_tokens" if completion.finish_reason == "length" else "stop",
        logprobs=Logprobs(content=logprobs),
    )

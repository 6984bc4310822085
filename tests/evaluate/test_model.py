"""The rollout service as a model of Inspect, without a network for counting tokens."""

from __future__ import annotations

import asyncio

import pytest
from inspect_ai.model import ChatMessageUser, GenerateConfig, get_model

from openrlhf_alp.evaluate.model import PROVIDER

# Inspect leaves a stream of anyio to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:Unclosed <MemoryObject:ResourceWarning")


def test_a_chat_is_answered_with_log_probs_and_counted_by_the_policys_tokenizer(servers, policy):
    url = servers.start()

    async def ask():
        model = get_model(f"{PROVIDER}/policy", memoize=False, urls=url, tokenizer=str(policy))
        try:
            chat = [ChatMessageUser(content="What is 1 + 2?")]
            greedy = GenerateConfig(temperature=0.0, max_tokens=16)
            output = await model.generate(chat, config=greedy)
            counts = await model.api.count_tokens(chat), await model.api.count_text_tokens("abc")
            return output, counts
        finally:
            await model.api.aclose()

    output, (of_chat, of_text) = asyncio.run(ask())
    assert output.completion == "\\boxed{3}" and output.stop_reason == "stop"
    # "user: What is 1 + 2?" and "assistant: ", a token per character.
    assert of_chat == output.usage.input_tokens == len("user: What is 1 + 2?\nassistant: ")
    assert of_text == 3
    logprobs = output.choices[0].logprobs.content
    assert len(logprobs) == output.usage.output_tokens and all(p.logprob <= 0 for p in logprobs)


def test_a_model_without_a_tokenizer_says_which_argument_is_missing():
    with pytest.raises(ValueError, match="-M tokenizer=DIR"):
        get_model(f"{PROVIDER}/policy", memoize=False, urls="http://127.0.0.1:1")

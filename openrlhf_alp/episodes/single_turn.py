"""One prompt, one answer, one reward."""

import math
import time
from collections.abc import Sequence

from openrlhf_alp.episodes.protocols import Decode, Generate
from openrlhf_alp.episodes.records import (
    BadCompletionError,
    Completion,
    Episode,
    SamplingConfig,
    StopReason,
    Timings,
)
from openrlhf_alp.episodes.transcript import Transcript
from openrlhf_alp.rewards.protocol import Reward


async def run_single_turn(
    *,
    request_id: str,
    prompt: str,
    label: str,
    prompt_ids: Sequence[int],
    generate: Generate,
    decode: Decode,
    reward: Reward,
    sampling: SamplingConfig,
) -> Episode:
    """Samples an answer to `prompt_ids`, scores its text and returns the episode.

    The ids of the episode are the prompt's followed by the engine's: nothing is encoded again.

    Raises:
        BadCompletionError: the reply is empty, unfinished, or lacks a finite log-prob.
        RewardUnavailable: the reward could not be computed.
        Exception: whatever `generate` raises once its own retries are used up.
    """
    transcript = Transcript.begin(
        request_id=request_id, prompt=prompt, label=label, prompt_ids=prompt_ids
    )
    started_s = time.monotonic()
    completion = await generate(request_id=request_id, prompt_ids=prompt_ids, sampling=sampling)
    generated_s = time.monotonic()
    stop_reason = check_completion(completion, request_id=request_id)
    response = decode(completion.token_ids)
    transcript.add_sampled(completion)
    transcript.close_turn(response)
    result = await reward.score(prompt=prompt, response=response, label=label)
    rewarded_s = time.monotonic()
    return transcript.episode(
        stop_reason=stop_reason,
        reward=result,
        timings=Timings(generate_s=generated_s - started_s, reward_s=rewarded_s - generated_s),
    )


def check_completion(completion: Completion, *, request_id: str) -> StopReason:
    """Returns why the answer ended, after checking that it can be trained on.

    Raises:
        BadCompletionError: names the request and, for a log-prob, the sampled position.
    """
    num_sampled = len(completion.token_ids)
    if num_sampled == 0:
        raise BadCompletionError(f"request {request_id}: the engine returned no tokens")
    if len(completion.logprobs) != num_sampled:
        raise BadCompletionError(
            f"request {request_id}: log-prob missing at sampled position "
            f"{min(len(completion.logprobs), num_sampled)}: the engine returned {num_sampled} "
            f"tokens and {len(completion.logprobs)} log-probs"
        )
    for position, logprob in enumerate(completion.logprobs):
        if not math.isfinite(logprob):
            raise BadCompletionError(
                f"request {request_id}: log-prob {logprob} at sampled position {position} (token "
                f"{completion.token_ids[position]}). Usual causes: NaN weights were pushed, or the "
                "engine overflowed in half precision; look at the last update's gradient norm"
            )
    return _stop_reason(completion, request_id=request_id)


def _stop_reason(completion: Completion, *, request_id: str) -> StopReason:
    if completion.finish_reason == "length":
        return StopReason.LENGTH
    if completion.finish_reason == "stop":
        return StopReason.EOS if completion.stop_reason is None else StopReason.STOP
    raise BadCompletionError(
        f"request {request_id}: the engine ended it with {completion.finish_reason!r} after "
        f"{len(completion.token_ids)} tokens, before the answer was finished"
    )

"""Reason, write Python, read its output, answer: an episode of several turns.

    prompt -> [ policy turn -> code? -> run it -> observation ]* -> final answer -> reward

Every request to the engine carries the episode's own ids so far, so a turn can be sampled by any
server and nothing is encoded twice. The loop follows the setting of arXiv 2603.19470, section 4
and appendix E.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from openrlhf_alp.episodes.code_blocks import (
    STOP_AT_FENCE,
    find_code,
    has_boxed_answer,
    render_result,
    without_code,
)
from openrlhf_alp.episodes.observation import ObservationTemplate
from openrlhf_alp.episodes.protocols import Decode, Encode, Generate, Interpreter
from openrlhf_alp.episodes.records import (
    BadCompletionError,
    Episode,
    SamplingConfig,
    StopReason,
    Timings,
    ToolCall,
)
from openrlhf_alp.episodes.single_turn import check_completion
from openrlhf_alp.episodes.transcript import Transcript
from openrlhf_alp.rewards.protocol import Reward


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolIntegratedConfig:
    """The limits of an episode. Token budgets count what stands after the prompt."""

    max_tokens: int
    """Of the whole episode: sampled tokens and observations."""

    max_tokens_per_turn: int | None = None
    """Sampled in one turn; None leaves it to the budget of the episode."""

    max_tool_turns: int = 5
    """Code is run at most this often (paper, section 4.1); one more turn may follow."""

    max_output_chars: int = 512
    """Of each stream of a program's output; the middle of a longer one is cut out."""

    def __post_init__(self) -> None:
        limits = {
            "max_tokens": (self.max_tokens, 1),
            "max_tokens_per_turn": (self.max_tokens_per_turn or 1, 1),
            "max_tool_turns": (self.max_tool_turns, 0),
            "max_output_chars": (self.max_output_chars, 2),
        }
        for name, (value, least) in limits.items():
            if value < least:
                raise ValueError(f"{name}={value} is not possible: it must be {least} or above")


async def run_tool_integrated(
    *,
    request_id: str,
    prompt: str,
    label: str,
    prompt_ids: Sequence[int],
    generate: Generate,
    interpreter: Interpreter,
    encode: Encode,
    decode: Decode,
    template: ObservationTemplate,
    reward: Reward,
    sampling: SamplingConfig,
    config: ToolIntegratedConfig,
) -> Episode:
    """Lets the policy alternate with a Python interpreter, scores its prose, returns the episode.

    The reward sees the policy's own words without its code: neither a tool's output nor a string
    in a program can pass for an answer.

    Args:
        interpreter: of this episode alone; closed here in any case.
        sampling: `max_tokens` is set per turn from `config`.

    Raises:
        BadCompletionError: a reply is empty, unfinished, or lacks a finite log-prob.
        ToolLostError: code could not be run, through no fault of the policy.
        RewardUnavailable: the reward could not be computed.
        Exception: whatever `generate` raises once its own retries are used up.
    """
    transcript = Transcript.begin(
        request_id=request_id, prompt=prompt, label=label, prompt_ids=prompt_ids
    )
    dialogue = _Dialogue(
        transcript=transcript,
        generate=generate,
        interpreter=interpreter,
        encode=encode,
        decode=decode,
        template=template,
        sampling=sampling,
        config=config,
    )
    try:
        stop_reason = await dialogue.run()
    finally:
        await interpreter.close()
    asked_s = time.monotonic()
    response = "\n".join(without_code(text) for text in transcript.text_of_policy())
    result = await reward.score(prompt=prompt, response=response, label=label)
    return transcript.episode(
        stop_reason=stop_reason,
        reward=result,
        timings=Timings(
            generate_s=dialogue.generate_s,
            tool_s=sum(call.total_s for call in transcript.tool_calls),
            reward_s=time.monotonic() - asked_s,
        ),
    )


@dataclass(slots=True, kw_only=True)
class _Dialogue:
    """The turns of one episode, written into its transcript."""

    transcript: Transcript
    generate: Generate
    interpreter: Interpreter
    encode: Encode
    decode: Decode
    template: ObservationTemplate
    sampling: SamplingConfig
    config: ToolIntegratedConfig
    generate_s: float = field(default=0.0, init=False)
    num_requests: int = field(default=0, init=False)

    async def run(self) -> StopReason:
        """Turn after turn, until the policy answers or a limit is reached."""
        while True:
            stop_reason = await self._policy_turn()
            turn = self.transcript.turns[-1]
            code = find_code(turn.text)
            if code is None:
                return stop_reason
            if len(self.transcript.tool_calls) == self.config.max_tool_turns:
                return StopReason.TOOL_LIMIT
            output = await self._run_code(code)
            observation_ids = self.template.observation_ids(
                output,
                encode=self.encode,
                sampled_ids=self.transcript.token_ids[turn.start : turn.end],
                sampled_text=turn.text,
            )
            if len(observation_ids) >= self._room():
                return StopReason.NO_ROOM
            self.transcript.add_observation(observation_ids, output)

    async def _policy_turn(self) -> StopReason:
        """Sample one turn; a fence that closes no Python block does not end it."""
        while True:
            stop_reason, stopped_at_fence = await self._sample()
            text = self.decode(self.transcript.open_ids)
            if stopped_at_fence and STOP_AT_FENCE not in text:
                raise BadCompletionError(
                    f"request {self.transcript.request_id}: stopped at a closing fence that its "
                    "token ids do not hold. `Generate` must return every sampled id, those of the "
                    "stop string too"
                )
            goes_on = stopped_at_fence and find_code(text) is None
            if goes_on and self._turn_room() < 1:
                stop_reason, goes_on = StopReason.LENGTH, False
            if not goes_on:
                void = find_code(text) is None and not has_boxed_answer(text)
                self.transcript.close_turn(text, void=void)
                return stop_reason

    async def _sample(self) -> tuple[StopReason, bool]:
        request_id = f"{self.transcript.request_id}-{self.num_requests}"
        self.num_requests += 1
        started_s = time.monotonic()
        completion = await self.generate(
            request_id=request_id,
            prompt_ids=tuple(self.transcript.token_ids),
            sampling=replace(
                self.sampling,
                max_tokens=self._turn_room(),
                stop=(*self.sampling.stop, STOP_AT_FENCE),
            ),
        )
        self.generate_s += time.monotonic() - started_s
        stop_reason = check_completion(completion, request_id=request_id)
        self.transcript.add_sampled(completion)
        return stop_reason, completion.stop_reason == STOP_AT_FENCE

    async def _run_code(self, code: str) -> str:
        started_s = time.monotonic()
        result = await self.interpreter.run(code)
        call = ToolCall(
            code=code,
            status=result.status,
            total_s=time.monotonic() - started_s,
            run_s=result.run_s,
        )
        self.transcript.tool_calls.append(call)
        return render_result(result, max_chars=self.config.max_output_chars)

    def _room(self) -> int:
        """Tokens that the episode may still take."""
        return self.config.max_tokens - self.transcript.num_after_prompt

    def _turn_room(self) -> int:
        """Tokens that the open turn may still take."""
        limit = self.config.max_tokens_per_turn
        if limit is None:
            return self._room()
        return min(self._room(), limit - len(self.transcript.open_ids))

"""The two kinds of episode, each a runner: a callable that plays one task to its end.

    SingleTurn       prompt -> answer -> reward
    ToolIntegrated   prompt -> [ policy turn -> code -> its output ]* -> answer -> reward

Every request to the engine carries the episode's own ids so far, so any server can sample a turn
and nothing is encoded twice. The tool-integrated loop follows arXiv 2603.19470, section 4 and
appendix E.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from openrlhf_alp.episodes.code_blocks import (
    FENCE_STOPS,
    LINE_STOPS,
    answer_text,
    ends_in_code,
    find_code,
    has_boxed_answer,
)
from openrlhf_alp.episodes.observation import Encode, ObservationTemplate, render_result
from openrlhf_alp.episodes.protocols import Decode, Generate, Interpreter, Task
from openrlhf_alp.episodes.records import (
    BadCompletionError,
    Episode,
    SamplingConfig,
    StopReason,
    Timings,
    ToolCall,
    TurnKind,
)
from openrlhf_alp.episodes.transcript import Transcript
from openrlhf_alp.rewards.protocol import Reward


@dataclass(frozen=True, slots=True, kw_only=True)
class SingleTurn:
    """One prompt, one answer, one reward; see `EpisodeRunner`."""

    generate: Generate
    decode: Decode
    reward: Reward

    async def __call__(self, *, request_id: str, task: Task, sampling: SamplingConfig) -> Episode:
        """Sample an answer to `task` and score its text.

        The ids of the episode are the prompt's and then the engine's: nothing is encoded again.
        """
        transcript = _begin(request_id, task)
        started_s = time.monotonic()
        completion = await self.generate(
            request_id=request_id, prompt_ids=task.prompt_ids, sampling=sampling
        )
        generated_s = time.monotonic()
        stop_reason = transcript.add_sampled(completion, request_id=request_id)
        response = self.decode(completion.token_ids)
        transcript.close_turn(response)
        result = await self.reward.score(prompt=task.prompt, response=response, label=task.label)
        rewarded_s = time.monotonic()
        return transcript.episode(
            stop_reason=stop_reason,
            reward=result,
            timings=Timings(generate_s=generated_s - started_s, reward_s=rewarded_s - generated_s),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolIntegratedConfig:
    """The limits of a tool-integrated episode, apart from its token budget."""

    max_tokens_per_turn: int | None
    """Sampled tokens of one turn; None leaves the turn the rest of the episode's budget."""

    max_tool_turns: int
    """Number of programs that are run (paper, section 4.1: 5); one more turn may follow."""

    max_output_chars: int
    """Characters of each stream of a program's output; the middle of a longer one is cut out."""

    def __post_init__(self) -> None:
        limits = {
            "max_tokens_per_turn": (self.max_tokens_per_turn or 1, 1),
            "max_tool_turns": (self.max_tool_turns, 0),
            "max_output_chars": (self.max_output_chars, 2),
        }
        for name, (value, least) in limits.items():
            if value < least:
                raise ValueError(f"{name}={value} is not possible: it must be {least} or above")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolIntegrated:
    """Reason, run code, read its output, answer; see `EpisodeRunner`.

    The reward sees the policy's own words without its code: neither a tool's output nor a string in
    a program can pass for an answer.
    """

    generate: Generate
    open_interpreter: Callable[[], Interpreter]
    """Called once for each episode."""

    encode: Encode
    """For program output. It must encode the text of a special token as plain text, so that a
    program cannot print the end of a turn."""

    decode: Decode
    template: ObservationTemplate
    reward: Reward
    config: ToolIntegratedConfig

    async def __call__(self, *, request_id: str, task: Task, sampling: SamplingConfig) -> Episode:
        """Let the policy alternate with a Python interpreter, then score its prose.

        Args:
            sampling: its `max_tokens` is the budget of the whole episode after the prompt:
                sampled tokens and observations.
        """
        dialogue = _Dialogue(
            runner=self,
            transcript=_begin(request_id, task),
            interpreter=self.open_interpreter(),
            sampling=sampling,
        )
        try:
            stop_reason = await dialogue.run()
        finally:
            # Also after an error: a session would otherwise keep its sandbox until its time limit.
            await dialogue.interpreter.close()
        asked_s = time.monotonic()
        transcript = dialogue.transcript
        own_words = [turn.text for turn in transcript.turns if turn.kind is TurnKind.ACTION]
        response = answer_text(own_words)
        result = await self.reward.score(prompt=task.prompt, response=response, label=task.label)
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
    """The state of one tool-integrated episode: its turns are written into the transcript."""

    runner: ToolIntegrated
    transcript: Transcript
    interpreter: Interpreter
    sampling: SamplingConfig
    generate_s: float = field(default=0.0, init=False)
    num_requests: int = field(default=0, init=False)

    async def run(self) -> StopReason:
        """Play turn after turn, until the policy answers or reaches a limit."""
        config, template = self.runner.config, self.runner.template
        while True:
            stop_reason = await self._policy_turn()
            turn = self.transcript.turns[-1]
            code = find_code(turn.text)
            if code is None:
                return stop_reason
            if len(self.transcript.tool_calls) == config.max_tool_turns:
                return StopReason.TOOL_LIMIT
            output = await self._run_code(code)
            observation_ids = template.observation_ids(
                output,
                encode=self.runner.encode,
                sampled_ids=self.transcript.token_ids[turn.start : turn.end],
                sampled_text=turn.text,
            )
            # An observation that leaves no token for an answer would only be read in vain.
            if len(observation_ids) >= self._room():
                return StopReason.NO_ROOM
            self.transcript.add_observation(observation_ids, output)

    async def _policy_turn(self) -> StopReason:
        """Sample one turn; a fence that closes no Python block does not end it."""
        text = ""
        while True:
            # An engine stops on strings alone, also after "``` " in "``` output": the rest of the
            # line is sampled first, since it says whether the fence closes a block.
            at_line_start = text[-1:] in ("", *LINE_STOPS)
            stop_reason, stop = await self._sample(FENCE_STOPS if at_line_start else LINE_STOPS)
            text = self.runner.decode(self.runner.template.own_ids(self.transcript.open_ids))
            if stop not in text:
                raise BadCompletionError(
                    f"request {self.transcript.request_id}: stopped at {stop!r}, which its token "
                    "ids do not hold. `Generate` must return every sampled id, those of the stop "
                    "string too"
                )
            continues = stop != "" and not ends_in_code(text)
            if continues and self._turn_room() < 1:
                stop_reason, continues = StopReason.LENGTH, False
            if not continues:
                void = find_code(text) is None and not has_boxed_answer(text)
                self.transcript.close_turn(text, void=void)
                return stop_reason

    async def _sample(self, stops: tuple[str, ...]) -> tuple[StopReason, str]:
        """Sample until a stop; return also the one of `stops` that was hit, or an empty string."""
        # Each request has its own id: the service answers a repeated id with the stored reply.
        request_id = f"{self.transcript.request_id}-{self.num_requests}"
        self.num_requests += 1
        started_s = time.monotonic()
        completion = await self.runner.generate(
            request_id=request_id,
            prompt_ids=tuple(self.transcript.token_ids),
            sampling=replace(
                self.sampling,
                max_tokens=self._turn_room(),
                stop=(*self.sampling.stop, *stops),
            ),
        )
        self.generate_s += time.monotonic() - started_s
        stop_reason = self.transcript.add_sampled(completion, request_id=request_id)
        stop = completion.stop_reason
        if isinstance(stop, str) and stop in stops and stop not in self.sampling.stop:
            return stop_reason, stop
        return stop_reason, ""

    async def _run_code(self, code: str) -> str:
        started_s = time.monotonic()
        result = await self.interpreter.run(code)
        output = render_result(result, max_chars=self.runner.config.max_output_chars)
        call = ToolCall(
            code=code,
            status=result.status,
            total_s=time.monotonic() - started_s,
            run_s=result.run_s,
            output=output,
        )
        self.transcript.tool_calls.append(call)
        return output

    def _room(self) -> int:
        """Return how many tokens the episode may still take."""
        return self.sampling.max_tokens - self.transcript.num_after_prompt

    def _turn_room(self) -> int:
        """Return how many tokens the open turn may still take."""
        limit = self.runner.config.max_tokens_per_turn
        if limit is None:
            return self._room()
        # A turn may need several requests, and its limit counts the tokens of all of them.
        return min(self._room(), limit - len(self.transcript.open_ids))


def _begin(request_id: str, task: Task) -> Transcript:
    return Transcript.begin(
        request_id=request_id, prompt=task.prompt, label=task.label, prompt_ids=task.prompt_ids
    )

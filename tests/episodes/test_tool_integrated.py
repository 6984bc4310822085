"""The loop, with a scripted policy and interpreters that answer what a test wrote down."""

from dataclasses import replace
from functools import partial

import pytest
from scripted_policy import ScriptedPolicy, make_tokenizer

from openrlhf_alp.episodes.observation import (
    CodeResult,
    CodeStatus,
    chat_template,
    plain_template,
)
from openrlhf_alp.episodes.protocols import Task
from openrlhf_alp.episodes.records import (
    BadCompletionError,
    Episode,
    SamplingConfig,
    StopReason,
    ToolLostError,
    TurnKind,
)
from openrlhf_alp.episodes.runners import ToolIntegrated, ToolIntegratedConfig
from openrlhf_alp.rewards.protocol import RewardResult, RewardUnavailable

CALL = "```python\nprint(6 * 7)\n```\n"
ANSWER = "So \\boxed{42}.<eos>"
CONFIG = ToolIntegratedConfig(max_tokens_per_turn=None, max_tool_turns=5, max_output_chars=512)


class Interpreter:
    """Gives the prepared results in order, and remembers the code."""

    def __init__(self, *results: CodeResult | Exception) -> None:
        self.results = list(results) or [CodeResult(status=CodeStatus.OK, stdout="42\n")] * 9
        self.codes: list[str] = []
        self.num_closed = 0

    async def run(self, code: str) -> CodeResult:
        self.codes.append(code)
        result = self.results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    async def close(self) -> None:
        self.num_closed += 1


class RewardOfText:
    """Keeps what it was shown."""

    def __init__(self, error: Exception | None = None) -> None:
        self.seen: list[str] = []
        self.error = error

    async def score(self, *, prompt: str, response: str, label: str) -> RewardResult:
        self.seen.append(response)
        if self.error:
            raise self.error
        return RewardResult(value=1.0, detail={"answered": 1.0})


async def play(
    tokenizer,
    *turns: str,
    policy_class=ScriptedPolicy,
    interpreter=None,
    reward=None,
    config=CONFIG,
    max_tokens=500,
    template="plain",
    sampling=None,
) -> tuple[Episode, ScriptedPolicy, Interpreter, RewardOfText]:
    policy = policy_class(tokenizer, *turns)
    interpreter = interpreter or Interpreter()
    reward = reward or RewardOfText()
    prompt_ids = tokenizer.encode("6 * 7?\n", add_special_tokens=False)
    runner = ToolIntegrated(
        generate=policy,
        open_interpreter=lambda: interpreter,
        encode=partial(tokenizer.encode, add_special_tokens=False, split_special_tokens=True),
        decode=partial(tokenizer.decode, skip_special_tokens=True),
        template={"plain": plain_template, "chat": chat_template}[template](tokenizer),
        reward=reward,
        config=config,
    )
    episode = await runner(
        request_id="r",
        task=Task(prompt="6 * 7?", label="42", prompt_ids=prompt_ids),
        sampling=sampling or SamplingConfig(max_tokens=max_tokens),
    )
    return episode, policy, interpreter, reward


async def test_the_policy_calls_reads_and_answers(tokenizer):
    episode, _, interpreter, reward = await play(tokenizer, CALL, ANSWER)
    assert [turn.kind for turn in episode.turns] == [
        TurnKind.PROMPT,
        TurnKind.ACTION,
        TurnKind.OBSERVATION,
        TurnKind.ACTION,
    ]
    assert tokenizer.decode(episode.token_ids) == (
        "6 * 7?\n" + CALL + "```output\n42\n```\n" + ANSWER
    )
    assert interpreter.codes == ["print(6 * 7)\n"] and interpreter.num_closed == 1
    assert episode.stop_reason is StopReason.EOS and not episode.void
    assert [call.status for call in episode.tool_calls] == ["ok"]
    assert reward.seen == ["\n\nSo \\boxed{42}."]


@pytest.mark.parametrize("template", ["plain", "chat"])
async def test_every_request_carries_exactly_the_ids_that_the_engine_has_seen(tokenizer, template):
    """Turn by turn, the ids sent are those sent before, those sampled, and the observation."""
    episode, policy, *_ = await play(tokenizer, CALL, CALL, ANSWER, template=template)
    requests = [prompt_ids for _, prompt_ids, _ in policy.asked]
    observations = [turn for turn in episode.turns if turn.kind is TurnKind.OBSERVATION]
    assert len(requests) == 3 and len(observations) == 2
    for index, turn in enumerate(observations):
        added = episode.token_ids[turn.start : turn.end]
        assert requests[index + 1] == requests[index] + policy.sampled[index] + added
    assert episode.token_ids == requests[-1] + policy.sampled[-1]
    sampled = [token for drawn in policy.sampled for token in drawn]
    pairs = zip(episode.token_ids, episode.action_mask, strict=True)
    assert [token for token, is_action in pairs if is_action] == sampled
    assert [request_id for request_id, *_ in policy.asked] == ["r-0", "r-1", "r-2"]


async def test_tool_tokens_are_masked_with_log_prob_zero_and_a_sampled_eos_is_an_action(tokenizer):
    episode, policy, *_ = await play(tokenizer, CALL, ANSWER)
    observed = episode.turns[2]
    stretch = slice(observed.start, observed.end)
    assert not any(episode.action_mask[stretch])
    assert set(episode.logprobs[stretch]) == {0.0}
    assert episode.token_ids[-1] == tokenizer.eos_token_id and episode.action_mask[-1]
    expected = [-0.01 * (1 + token) for drawn in policy.sampled for token in drawn]
    assert [
        lp for lp, a in zip(episode.logprobs, episode.action_mask, strict=True) if a
    ] == expected
    assert [span.version for span in episode.spans] == [1, 2]


async def test_no_token_is_sampled_after_the_closing_fence(tokenizer):
    _, policy, *_ = await play(tokenizer, CALL + "wasted words", ANSWER)
    assert tokenizer.decode(policy.sampled[0]) == CALL


@pytest.mark.parametrize(
    ("call", "num_requests"),
    [
        ("Try:\r\n```python\r\nprint(6 * 7)\r\n```\r", 1),
        ("```Python\nprint(6 * 7)\n```\n", 1),
        ("~~~python\nprint(6 * 7)\n~~~\n", 1),
        ("````python\nprint(6 * 7)\n````\n", 1),
        ("1. Compute:\n   ```python\n   print(6 * 7)\n   ```\n", 1),
        ("- ```python\n  print(6 * 7)\n  ```\n", 1),
        # Blanks after the fence: a second request reads them to the end of the line.
        ("```python\nprint(6 * 7)\n```  \n", 2),
        ("```python\nprint(6 * 7)\n~~~ \n```\t\n", 4),
    ],
)
async def test_a_closed_block_ends_the_turn_in_every_form(tokenizer, call, num_requests):
    episode, policy, interpreter, _ = await play(tokenizer, call + "wasted words", ANSWER)
    assert episode.turns[1].text == call and len(policy.asked) == num_requests + 1
    assert interpreter.codes[0].startswith("print(6 * 7)\n")
    assert episode.stop_reason is StopReason.EOS and not episode.void


async def test_a_fence_with_more_in_its_line_is_sampled_past(tokenizer):
    turn = "``` python\nprint(1)\n``` no\n```\n"
    episode, _, interpreter, _ = await play(tokenizer, turn, ANSWER)
    assert interpreter.codes == ["print(1)\n``` no\n"] and episode.turns[1].text == turn


async def test_a_stop_string_of_the_caller_ends_the_episode_also_where_it_is_ours(tokenizer):
    sampling = SamplingConfig(max_tokens=500, stop=("```\n",))
    episode, policy, *_ = await play(tokenizer, "See\n```\nno", sampling=sampling)
    assert (episode.stop_reason, len(policy.asked)) == (StopReason.STOP, 1)


@pytest.mark.parametrize("before", ["Check.\n", "It is \\boxed{5}.\n"])
async def test_a_block_cut_by_the_budget_is_void_and_holds_no_answer(tokenizer, before):
    cut = before + "```python\n# answer \\boxed{5}\nprint(1)"
    episode, _, _, reward = await play(tokenizer, cut, max_tokens=len(cut))
    assert episode.stop_reason is StopReason.LENGTH and episode.void
    assert "boxed" not in reward.seen[0]


async def test_the_reward_reads_the_boxes_of_two_turns_in_two_paragraphs(tokenizer):
    _, _, _, reward = await play(tokenizer, "\\boxed{4}\n" + CALL, "\\boxed{5}<eos>")
    assert reward.seen == ["\\boxed{4}\n\n\n\\boxed{5}"]


async def test_a_fence_that_closes_no_python_block_does_not_end_the_turn(tokenizer):
    turn = "See\n```\nnot code\n```\nthen \\boxed{42}<eos>"
    episode, policy, interpreter, _ = await play(tokenizer, turn)
    assert len(policy.asked) == 3 and interpreter.codes == []
    assert tokenizer.decode(episode.token_ids) == "6 * 7?\n" + turn
    assert [turn.kind for turn in episode.turns] == [TurnKind.PROMPT, TurnKind.ACTION]
    assert episode.stop_reason is StopReason.EOS and not episode.void


async def test_code_that_ends_with_an_eos_is_run_too(tokenizer):
    call = "```python\nprint(1)\n```<|im_end|>"
    episode, _, interpreter, _ = await play(tokenizer, call, ANSWER, template="chat")
    assert interpreter.codes == ["print(1)\n"]
    assert tokenizer.decode(episode.token_ids).count("<|im_end|>") == 2


async def test_an_end_of_turn_that_the_tokenizer_decodes_is_no_text_of_the_policy():
    tokenizer = make_tokenizer(end_is_special=False)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.decode([end], skip_special_tokens=True) == "<|im_end|>"
    call = "```python\nprint(1)\n```<|im_end|>"
    episode, _, interpreter, reward = await play(
        tokenizer, call, "So \\boxed{42}.<|im_end|>", template="chat"
    )
    assert interpreter.codes == ["print(1)\n"] and episode.token_ids.count(end) == 3
    assert reward.seen[0].strip() == "So \\boxed{42}."


async def test_after_the_last_tool_turn_one_more_turn_may_answer(tokenizer):
    config = replace(CONFIG, max_tool_turns=2)
    episode, *_ = await play(tokenizer, CALL, CALL, ANSWER, config=config)
    assert (episode.stop_reason, len(episode.tool_calls)) == (StopReason.EOS, 2)
    episode, _, interpreter, _ = await play(tokenizer, CALL, CALL, CALL, config=config)
    assert (episode.stop_reason, len(interpreter.codes)) == (StopReason.TOOL_LIMIT, 2)
    assert not episode.void and not episode.truncated


async def test_a_turn_is_cut_at_its_own_budget(tokenizer):
    config = replace(CONFIG, max_tokens_per_turn=10)
    episode, _, interpreter, _ = await play(tokenizer, CALL, config=config)
    assert (episode.num_actions, episode.stop_reason) == (10, StopReason.LENGTH)
    assert episode.truncated and episode.void and interpreter.codes == []


async def test_the_budget_of_a_turn_counts_all_its_requests(tokenizer):
    config = replace(CONFIG, max_tokens_per_turn=12)
    episode, policy, *_ = await play(tokenizer, "See\n```\nnot code", config=config)
    assert [len(drawn) for drawn in policy.sampled] == [8, 4]
    assert episode.stop_reason is StopReason.LENGTH
    config = replace(CONFIG, max_tokens_per_turn=8)
    episode, policy, *_ = await play(tokenizer, "See\n```\nnot code", config=config)
    assert [len(drawn) for drawn in policy.sampled] == [8]
    assert episode.stop_reason is StopReason.LENGTH


async def test_the_budget_of_the_episode_counts_observations(tokenizer):
    observed = len("```output\n42\n```\n")
    enough = len(CALL) + observed + 1
    episode, *_ = await play(tokenizer, CALL, ANSWER, max_tokens=enough)
    assert (episode.stop_reason, len(episode.turns)) == (StopReason.LENGTH, 4)
    episode, _, interpreter, _ = await play(tokenizer, CALL, max_tokens=enough - 1)
    assert (episode.stop_reason, len(episode.turns)) == (StopReason.NO_ROOM, 2)
    assert episode.truncated and len(interpreter.codes) == 1


@pytest.mark.parametrize(
    ("last", "void"),
    [("I give up.<eos>", True), ("\\boxed{42}<eos>", False), ("It is 42.<eos>", True)],
)
async def test_a_turn_without_call_and_answer_is_void(tokenizer, last, void):
    episode, *_ = await play(tokenizer, CALL, last)
    assert episode.void is void
    first, second = (turn for turn in episode.turns if turn.kind is TurnKind.ACTION)
    both = [(first.start, first.end), (second.start, second.end)]
    assert episode.trained_ranges("off") == both
    assert episode.trained_ranges("turn") == (both[:1] if void else both)
    assert episode.trained_ranges("trajectory") == ([] if void else both)


async def test_an_answer_in_a_tools_output_or_in_code_is_no_answer(tokenizer):
    printed = CodeResult(status=CodeStatus.OK, stdout="\\boxed{42}\n")
    call = "```python\nprint('\\\\boxed{42}')\n```\n"
    turns = (call, "I give up.<eos>")
    episode, _, _, reward = await play(tokenizer, *turns, interpreter=Interpreter(printed))
    assert episode.void and "boxed" not in reward.seen[0]


async def test_a_failing_program_is_read_and_the_episode_goes_on(tokenizer):
    failed = CodeResult(status=CodeStatus.ERROR, stderr="NameError: name 'x' is not defined\n")
    ran = CodeResult(status=CodeStatus.OK, stdout="42\n")
    episode, *_ = await play(tokenizer, CALL, CALL, ANSWER, interpreter=Interpreter(failed, ran))
    assert "NameError: name 'x' is not defined" in tokenizer.decode(episode.token_ids)
    assert [call.status for call in episode.tool_calls] == ["error", "ok"]


@pytest.mark.parametrize(
    "error", [ToolLostError(reason="tool_unavailable", detail="down"), RuntimeError("bug")]
)
async def test_an_episode_whose_tool_is_lost_ends_by_name_and_frees_its_interpreter(
    tokenizer, error
):
    interpreter = Interpreter(error)
    with pytest.raises(type(error)):
        await play(tokenizer, CALL, interpreter=interpreter)
    assert interpreter.num_closed == 1


async def test_a_reward_that_cannot_be_computed_is_passed_on(tokenizer):
    reward = RewardOfText(RewardUnavailable(reason="timeout", detail="slow"))
    with pytest.raises(RewardUnavailable, match="timeout"):
        await play(tokenizer, ANSWER, reward=reward)


async def test_a_log_prob_that_is_not_finite_names_the_turns_request(tokenizer):
    class Broken(ScriptedPolicy):
        async def __call__(self, **request):
            completion = await super().__call__(**request)
            if len(self.asked) < 2:
                return completion
            return replace(completion, logprobs=(float("nan"),) * len(completion.token_ids))

    interpreter = Interpreter()
    with pytest.raises(BadCompletionError, match="request r-1"):
        await play(tokenizer, CALL, ANSWER, policy_class=Broken, interpreter=interpreter)
    assert interpreter.num_closed == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens_per_turn": -1}, "max_tokens_per_turn=-1"),
        ({"max_tool_turns": -1}, "max_tool_turns=-1"),
        ({"max_output_chars": 1}, "max_output_chars=1"),
    ],
)
def test_a_limit_out_of_range_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


async def test_an_episode_without_a_budget_is_refused_by_name(tokenizer):
    with pytest.raises(ValueError, match="max_tokens=0"):
        await play(tokenizer, ANSWER, max_tokens=0)


async def test_an_engine_that_keeps_the_stop_string_to_itself_is_found_out(tokenizer):
    class Cut(ScriptedPolicy):
        async def __call__(self, **request):
            completion = await super().__call__(**request)
            whole = len(completion.token_ids) - len("\n```\n")
            return replace(
                completion,
                token_ids=completion.token_ids[:whole],
                logprobs=completion.logprobs[:whole],
                spans=(replace(completion.spans[0], end=whole),),
            )

    with pytest.raises(BadCompletionError, match="those of the stop string too"):
        await play(tokenizer, CALL, policy_class=Cut)

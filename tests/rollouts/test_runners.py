"""Which runner a configuration builds."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from openrlhf_alp.data.smollm2 import unpack_smollm2
from openrlhf_alp.episodes.runners import SingleTurn, ToolIntegrated
from openrlhf_alp.rollouts.interpreter import SessionInterpreter, StatelessInterpreter
from openrlhf_alp.rollouts.runners import ToolConfig, build_runner, tool_client

TOOL = ToolConfig(urls=("http://127.0.0.1:1",), timeout_s=2.0, max_tool_turns=3, template="plain")


@pytest.fixture(scope="module")
def tokenizer():
    folder: Path = unpack_smollm2()
    return AutoTokenizer.from_pretrained(folder)


def build(tokenizer, tool: ToolConfig, *, has_client: bool = True):
    client = tool_client(tool, "key") if has_client else None
    return build_runner(generate=None, reward=None, tokenizer=tokenizer, tool=tool, client=client)


def test_without_a_tool_service_an_episode_has_one_turn(tokenizer):
    assert isinstance(build(tokenizer, TOOL, has_client=False), SingleTurn)


@pytest.mark.parametrize(
    ("session", "interpreter"), [(False, StatelessInterpreter), (True, SessionInterpreter)]
)
def test_every_episode_opens_an_interpreter_of_its_own(tokenizer, session, interpreter):
    tool = ToolConfig(urls=TOOL.urls, session=session, template="plain")
    runner = build(tokenizer, tool)
    first, second = runner.open_interpreter(), runner.open_interpreter()
    assert type(first) is type(second) is interpreter and first is not second


def test_the_limits_and_the_template_are_those_of_the_configuration(tokenizer):
    plain = build(tokenizer, TOOL)
    assert isinstance(plain, ToolIntegrated)
    assert plain.config == TOOL.limits and plain.config.max_tool_turns == 3
    assert plain.template.end_of_turn_ids == ()
    chat = build(tokenizer, ToolConfig(urls=TOOL.urls, template="chat"))
    assert tokenizer.decode(chat.template.end_of_turn_ids) == "<|im_end|>"


def test_the_text_of_a_special_token_stays_text_when_a_program_prints_it(tokenizer):
    runner = build(tokenizer, TOOL)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end not in runner.encode("<|im_end|>")
    assert runner.decode([*runner.encode("a"), end]) == "a"

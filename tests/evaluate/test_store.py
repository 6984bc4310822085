"""Answers on disk: whole lines, each once, whatever ended the process before."""

import json
from dataclasses import replace

import pytest

from openrlhf_alp.evaluate.records import Answer, SaidTurn, pack, unpack
from openrlhf_alp.evaluate.store import AnswerStore, StoreError

ANSWER = Answer(
    problem_id="own:1",
    sample=0,
    response="\\boxed{3}\u2028",
    turns=(SaidTurn(kind="action", text="\\boxed{3}"),),
    stop_reason="eos",
    truncated=False,
    void=False,
    num_tokens=2,
    tool_calls=("ok",),
    token_ids=pack("i", [5, 2**31 - 1]),
    logprobs=pack("f", [0.0, -0.1]),
    action_ranges=((1, 2),),
    versions=((0, "d"),),
    generate_s=0.5,
    tool_s=0.0,
)


def test_an_answer_comes_back_as_it_was(tmp_path):
    path = tmp_path / "answers" / "own.jsonl"
    AnswerStore(path).add(ANSWER)
    store = AnswerStore(path)
    assert list(store) == [ANSWER] and store.get(("own:1", 0)) == ANSWER
    assert store.get(("own:1", 1)) is None and store.num_broken == 0
    assert unpack("i", ANSWER.token_ids) == [5, 2**31 - 1]
    assert unpack("f", ANSWER.logprobs) == pytest.approx([0.0, -0.1], abs=1e-8)


@pytest.mark.parametrize("cut", [1, 40, 200])
def test_a_half_written_line_costs_its_own_answer_only(tmp_path, cut):
    path = tmp_path / "own.jsonl"
    store = AnswerStore(path)
    for sample in range(3):
        store.add(replace(ANSWER, sample=sample))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    again = AnswerStore(path)
    assert [answer.sample for answer in again] == [0, 1] and again.num_broken == 1
    # The broken line is kept aside, and the next answer begins a line of its own.
    assert path.with_name("own.jsonl.broken").stat().st_size > 0
    again.add(replace(ANSWER, sample=2))
    assert path.read_bytes() == whole


def test_a_line_of_something_else_is_set_aside(tmp_path):
    path = tmp_path / "own.jsonl"
    AnswerStore(path).add(ANSWER)
    with path.open("a") as file:
        file.write('{"problem_id": "own:2"}\nnull\n\xff\n')
    store = AnswerStore(path)
    assert len(store) == 1 and store.num_broken == 3


def test_a_doubled_answer_is_an_error(tmp_path):
    path = tmp_path / "own.jsonl"
    store = AnswerStore(path)
    store.add(ANSWER)
    with pytest.raises(StoreError, match="holds answer 0 of own:1"):
        store.add(ANSWER)
    with path.open("a") as file:
        file.write(json.dumps(ANSWER.to_json()) + "\n")
    with pytest.raises(StoreError, match="answer 0 of problem own:1 twice"):
        AnswerStore(path)


def test_a_missing_answer_is_named(tmp_path):
    store = AnswerStore(tmp_path / "own.jsonl")
    store.add(ANSWER)
    store.check_coverage([("own:1", 0)])
    with pytest.raises(StoreError, match=r"2 answers are missing in .*: own:1 #1, own:2 #0\."):
        store.check_coverage([("own:1", 0), ("own:1", 1), ("own:2", 0)])


def test_a_full_disk_is_named_and_nothing_before_is_lost(tmp_path):
    path = tmp_path / "own.jsonl"
    store = AnswerStore(path)
    path.symlink_to("/dev/full")
    with pytest.raises(
        StoreError, match=r"No space left on device\. The 0 answers before are safe"
    ):
        store.add(ANSWER)
    path.unlink()
    store.add(ANSWER)
    assert len(AnswerStore(path)) == 1

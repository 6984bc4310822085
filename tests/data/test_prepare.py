"""Rows in, prompts and rejected rows out, with the real reward in its worker processes."""

import dataclasses
import json

import pytest

from openrlhf_alp.data.formats import FORMATS
from openrlhf_alp.data.output import OutputError, OutputFiles, TokenLengths, summarise
from openrlhf_alp.data.pass_rates import PassRates
from openrlhf_alp.data.prepare import Options, Reason, prepare, problem_key
from openrlhf_alp.data.sources import Row
from openrlhf_alp.data.templates import TEMPLATES

OPTIONS = Options(template=TEMPLATES["chat-bare"], num_workers=1)
SUM, PRODUCT = "What is $3 + 4$?", "What is 3 times 4?"


def rows(*contents, source="set.jsonl"):
    return [
        (Row(source=source, number=number, content=content), FORMATS["deepscaler"])
        for number, content in enumerate(contents, start=1)
    ]


def pairs(*problems_and_answers, source="set.jsonl"):
    contents = [{"problem": problem, "answer": answer} for problem, answer in problems_and_answers]
    return rows(*contents, source=source)


def reasons(prepared):
    return [(one.row.number, one.reason) for one in prepared.rejected]


def test_a_good_row_becomes_a_prompt_with_its_label():
    (prompt,) = prepare(pairs((SUM, "7")), OPTIONS).prompts
    assert prompt.to_json() == {
        "input": [{"role": "user", "content": SUM}],
        "label": "7",
        "datasource": "set",
        "id": "set:1",
    }


def test_every_row_is_kept_or_rejected_with_its_reason_and_in_order():
    """'???' says nothing; the set with a stray dollar sign does not equal its boxed form."""
    given = rows(
        {"problem": SUM, "answer": "7"},
        "{broken",
        {"problem": "", "answer": "7"},
        {"problem": "What is 2 + 2?", "answer": None},
        {"problem": "<image> What is shown?", "answer": "7"},
        {"problem": "What do people say?", "answer": "???"},
        {"problem": "Which two?", "answer": "$221,$8$"},
        {"problem": "How far?", "answer": ["0.01", "0.02"]},
        {"problem": PRODUCT, "answer": "12"},
    )
    prepared = prepare(given, OPTIONS)
    assert [prompt.problem.row.number for prompt in prepared.prompts] == [1, 9]
    assert reasons(prepared) == [
        (2, Reason.BROKEN_ROW),
        (3, Reason.NO_PROBLEM),
        (4, Reason.NO_LABEL),
        (5, Reason.NEEDS_IMAGE),
        (6, Reason.LABEL_NOT_PARSABLE),
        (7, Reason.LABEL_NOT_REWARDED),
        (8, Reason.SEVERAL_LABELS),
    ]
    assert "'0.01', '0.02'" in prepared.rejected[-1].detail


def test_the_same_problem_is_kept_once_however_it_is_spaced():
    other = pairs(("What  is \\(3 + 4\\)?", "7.0"), source="other.jsonl")
    prepared = prepare([*pairs((SUM, "7")), *other], OPTIONS)
    assert len(prepared.prompts) == 1
    (duplicate,) = prepared.rejected
    assert duplicate.reason is Reason.DUPLICATE
    assert duplicate.row.source == "other.jsonl"
    assert duplicate.detail == "the same problem as row 1 of set.jsonl"


def test_labels_written_differently_but_equal_are_no_conflict():
    prepared = prepare(pairs(("Half of one?", "1/2"), ("Half of one?", "\\frac{1}{2}")), OPTIONS)
    assert reasons(prepared) == [(2, Reason.DUPLICATE)]


def test_different_answers_to_one_problem_leave_out_all_of_its_rows_and_name_them():
    prepared = prepare(pairs((SUM, "7"), (PRODUCT, "12"), (SUM, "8"), (SUM, "7")), OPTIONS)
    assert [prompt.problem.text for prompt in prepared.prompts] == [PRODUCT]
    assert {one.reason for one in prepared.rejected} == {Reason.CONFLICTING_LABELS}
    assert prepared.rejected[0].detail == (
        "the same problem has '7' (row 1 of set.jsonl); '8' (row 3 of set.jsonl); "
        "'7' (row 4 of set.jsonl)"
    )


def test_a_broken_label_makes_no_conflict_with_a_good_one():
    prepared = prepare(pairs((SUM, "???"), (SUM, "7")), OPTIONS)
    assert reasons(prepared) == [(1, Reason.LABEL_NOT_PARSABLE)]
    assert prepared.prompts[0].problem.label == "7"


def test_ways_to_write_one_answer_are_one_label():
    prepared = prepare(rows({"problem": SUM, "answer": ["\\frac{14}{2}", "7", "7.0"]}), OPTIONS)
    assert prepared.prompts[0].problem.label == "\\frac{14}{2}"


def test_problems_that_differ_in_a_number_or_a_name_are_different():
    keys = {problem_key(text) for text in ("Find x.", "Find X.", "Find y.", "Find x. 2")}
    assert len(keys) == 4


def count_words(inputs):
    return [len(messages[-1]["content"].split()) for messages in inputs]


def test_prompts_over_the_limit_are_left_out_and_the_lengths_of_the_rest_are_summarised():
    """Of 1 to 5 words, the limit of 4 leaves 1, 2, 3, 4: median 2.5."""
    options = dataclasses.replace(OPTIONS, count_tokens=count_words, max_prompt_tokens=4)
    problems = [(" ".join(["word"] * number), str(number)) for number in (5, 3, 1, 2, 4)]
    prepared = prepare(pairs(*problems), options)
    assert reasons(prepared) == [(1, Reason.PROMPT_TOO_LONG)]
    assert prepared.rejected[0].detail == "5 tokens, 4 are allowed"
    summary = summarise(prepared, template="chat-bare", train_flags="", formats={})
    assert summary.prompt_tokens == TokenLengths(shortest=1, median=2.5, p95=4, longest=4)


def test_a_limit_without_a_tokenizer_is_refused():
    with pytest.raises(ValueError, match="needs a tokenizer"):
        dataclasses.replace(OPTIONS, max_prompt_tokens=4)


def test_progress_counts_up_to_the_number_of_labels():
    seen = []
    prepare(pairs((SUM, "7"), (PRODUCT, "12")), OPTIONS, lambda *counts: seen.append(counts))
    assert seen == [(1, 2), (2, 2)]


def test_the_summary_adds_up():
    asked = PRODUCT + " Please reason step by step, and put your final answer in \\boxed{}."
    prepared = prepare(pairs((SUM, "7"), (SUM, "7"), (asked, "12"), ("?", "")), OPTIONS)
    summary = summarise(prepared, template="t", train_flags="--f", formats={"set": "deepscaler"})
    assert summary.rows_read == summary.rows_kept + sum(summary.rejected.values()) == 4
    assert summary.rejected == {"duplicate": 1, "no_label": 1}
    assert summary.label_kinds == {"integer": 2}
    assert summary.kept_by_datasource == {"set": 2}
    assert summary.instructions_cut == 1
    assert summary.prompt_tokens is None


@pytest.fixture
def written(tmp_path):
    """Files of a preparation with one prompt and one rejected row."""
    files = OutputFiles(prompts=tmp_path / "new" / "math.jsonl")
    prepared = prepare(pairs((SUM, "7"), (PRODUCT, "")), OPTIONS)
    files.write(prepared, summarise(prepared, template="t", train_flags="", formats={}))
    return files


def test_three_files_are_written_and_nothing_beside_them(written):
    assert sorted(path.name for path in written.prompts.parent.iterdir()) == [
        "math.jsonl",
        "math.rejected.jsonl",
        "math.summary.json",
    ]
    assert json.loads(written.prompts.read_text())["label"] == "7"
    rejected = json.loads(written.rejected.read_text())
    assert rejected["reason"] == "no_label"
    assert rejected["row"] == {"problem": PRODUCT, "answer": ""}
    assert json.loads(written.summary.read_text())["rows_kept"] == 1


def test_an_earlier_file_is_replaced_only_when_asked(written):
    with pytest.raises(OutputError, match=r"there already: .*math\.jsonl.*--overwrite"):
        written.check(sources=(), overwrite=False)
    written.check(sources=(), overwrite=True)


def test_a_result_without_prompts_leaves_no_file_of_prompts(written):
    prepared = prepare(pairs((SUM, "")), OPTIONS)
    written.write(prepared, summarise(prepared, template="t", train_flags="", formats={}))
    assert not written.prompts.exists()
    assert json.loads(written.summary.read_text())["rows_kept"] == 0


def test_a_failed_write_leaves_the_earlier_file_and_no_rest(written):
    before = written.prompts.read_text()
    prepared = prepare(pairs((PRODUCT, "12")), OPTIONS)
    (prompt,) = prepared.prompts
    unwritable = dataclasses.replace(prompt, input={1: {2, 3}, (4,): 5})
    with pytest.raises(TypeError):
        written.write(
            dataclasses.replace(prepared, prompts=(prompt, unwritable)),
            summarise(prepared, template="t", train_flags="", formats={}),
        )
    assert written.prompts.read_text() == before
    assert len(list(written.prompts.parent.iterdir())) == 3


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(OutputError, match=r"ends in \.jsonl"):
        OutputFiles(prompts=tmp_path / "math.json").check(sources=(), overwrite=True)


@pytest.mark.parametrize("name", ["math.jsonl", "math.rejected.jsonl"])
def test_a_source_is_never_written_over(tmp_path, name):
    source = tmp_path / name
    source.write_text("{}\n")
    files = OutputFiles(prompts=tmp_path / "math.jsonl")
    with pytest.raises(OutputError, match="is read and would be written over"):
        files.check(sources=(str(tmp_path / "." / name),), overwrite=True)
    assert source.read_text() == "{}\n"


@pytest.mark.parametrize(
    ("bounds", "kept"),
    [(None, [2, 3]), ((0.0, 0.5), [1, 2]), ((0.75, 1.0), [3, 4]), ((0.25, 0.25), [2])],
)
def test_problems_that_the_policy_solves_too_rarely_or_too_often_go(bounds, kept):
    given = pairs(*((f"What is {n} + 1?", str(n + 1)) for n in range(1, 5)), ("Find 7.", "7"))
    shares = (0.0, 0.25, 0.75, 1.0)
    of = {problem_key(f"What is $ {n} + 1$?"): share for n, share in enumerate(shares, start=1)}
    options = dataclasses.replace(OPTIONS, pass_rates=PassRates(of=of, bounds=bounds))
    prepared = prepare(given, options)
    assert [prompt.problem.row.number for prompt in prepared.prompts] == kept
    reason_of = dict(reasons(prepared))
    assert reason_of.pop(5) == Reason.NO_PASS_RATE
    assert set(reason_of.values()) == {Reason.PASS_RATE}
    (first, *_) = prepared.rejected
    assert "of the answers are right" in first.detail

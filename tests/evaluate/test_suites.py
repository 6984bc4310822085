"""What is asked: fields, labels, and every problem exactly once."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from openrlhf_alp.data.sources import SourceError
from openrlhf_alp.data.templates import TokenizerError
from openrlhf_alp.evaluate.grading import Grader, check_references
from openrlhf_alp.evaluate.player import Plan, Prompts
from openrlhf_alp.evaluate.suites import (
    LoadedSuite,
    Suite,
    SuiteError,
    find_suites,
    load_suite,
    registry,
)

OWN = Suite(name="own", title="Own", source="", problem=("q",), label=("a",), id=("id",))


def loaded(tmp_path: Path, rows: list, suite: Suite = OWN, **options) -> LoadedSuite:
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_suite(replace(suite, source=str(path)), data_dir=None, **options)


def test_the_registry_holds_the_five_sets_of_the_paper_and_two_more():
    suites, groups = registry()
    assert groups["paper"] == ("math500", "minerva", "olympiadbench", "aime24", "aime25")
    sizes = {name: suite.size for name, suite in suites.items()}
    assert sizes == {
        **{"math500": 500, "minerva": 272, "olympiadbench": 675, "aime24": 30, "aime25": 30},
        **{"gsm8k": 1319, "svamp": 1000},
    }
    assert all(suite.licence and suite.answer_form and suite.source for suite in suites.values())


def test_fields_labels_units_and_tolerances_are_read(tmp_path):
    suite = replace(OWN, unit=("u",), error=("e",), relative=0.01, level=("lvl",))
    rows = [
        {"q": " How far? ", "a": "$12$", "id": 7, "u": "km", "lvl": 3},
        {"q": "How hot?", "a": ["4.2"], "id": 8, "u": "%", "e": "1e-1"},
        {"q": "How wide?", "a": 90.0, "id": 9, "u": "^{\\circ}"},
    ]
    first, second, third = loaded(tmp_path, rows, suite).problems
    assert (first.id, first.text, first.label) == ("7", "How far?", "12 \\text{ km}")
    assert (first.level, first.tolerance.relative, first.tolerance.absolute) == ("3", 0.01, 0.0)
    assert (second.label, second.tolerance.absolute) == ("4.2 \\%", 0.1)
    assert third.label == "90 ^{\\circ}"


def test_a_label_may_be_the_last_box_of_the_solution(tmp_path):
    """Minerva's column `answer` holds the answer of the previous part."""
    minerva = replace(registry()[0]["minerva"], size=2)
    rows = [
        {"problem": "p", "solution": "So \\boxed{5}, hence \\boxed{0.53} years.", "answer": ["5"]},
        {"problem": "r", "answer": "7"},
    ]
    problems = loaded(tmp_path, rows, minerva).problems
    assert [problem.label for problem in problems] == ["0.53", "7"]


def test_the_hub_copies_are_read_as_the_authors_of_the_paper_read_them():
    """Their script loads `train` and grades with `gt`; SVAMP's copy splits its 1,000 problems."""
    suites, _ = registry()
    theirs = [suites[name] for name in ("olympiadbench", "aime24", "aime25")]
    assert all(suite.split == "train" and suite.label[0] == "gt" for suite in theirs)
    assert suites["minerva"].split == "train" and "gt" in suites["minerva"].label
    assert (suites["math500"].split, suites["svamp"].split) == ("test", "train+test")


@pytest.mark.parametrize("row", [{"answer": ["$221,$8$"], "id": 2349}, {"gt": "$221,$8$"}])
def test_a_broken_label_is_corrected_in_every_copy_of_a_set(tmp_path, row):
    olympiadbench = replace(registry()[0]["olympiadbench"], size=1)
    (problem,) = loaded(tmp_path, [{"problem": "p", **row}], olympiadbench).problems
    assert problem.label == "221, 8"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"q": "p", "id": 1}], r"row 1: nothing in a\. Its fields are id, q\. .*--label_field"),
        ([{"a": "1", "id": 1}], r"row 1: nothing in q\. .*--problem_field"),
        (
            [{"q": "p", "a": {"x": 1}}],
            r"row 1: its reference answer cannot be read: .*fields x; .*with --label_field$",
        ),
        ([{"q": "p", "a": ["1", "2"]}], "lists '1', '2' and does not say"),
        (["not an object"], "row 1 is not a JSON object"),
        ([{"q": "p", "a": "1", "id": 1}, {"q": "r", "a": "1", "id": 1}], "1 ids come twice.*'1'"),
        ([{"q": "p", "a": "1"}, {"q": "p", "a": "1"}], "1 problems come twice"),
        ([{"q": "p \ud83d", "a": "1"}], r"row 1: '\\ud83d' is half of a character"),
        ([{"q": "p", "a": "1", "id": "\udc00"}], r"row 1: '\\udc00' is half of a character"),
        ([], "has no problems"),
    ],
)
def test_a_broken_row_is_named_with_its_fix(tmp_path, rows, message):
    with pytest.raises(SuiteError, match=message):
        loaded(tmp_path, rows)


def test_a_set_that_cannot_be_fetched_is_named_with_the_file_to_put_in_its_place(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    aime25 = registry()[0]["aime25"]
    with pytest.raises(SourceError, match=r"Chenlu123/aime25 .*, as aime25\.jsonl, and name the"):
        load_suite(aime25, data_dir=tmp_path)
    with pytest.raises(SuiteError, match="nowhere: there is no such folder"):
        load_suite(aime25, data_dir=tmp_path / "nowhere")


@pytest.mark.parametrize("num", [29, 31])
def test_a_missing_or_a_doubled_problem_of_a_known_set_is_an_error(tmp_path, num):
    rows = [{"problem": f"p{i}", "answer": str(i)} for i in range(num)]
    with pytest.raises(SuiteError, match=f"has {num} problems, AIME24 has 30"):
        loaded(tmp_path, rows, registry()[0]["aime24"])


def test_the_digest_changes_with_a_label_and_not_with_the_file(tmp_path):
    rows = [{"q": "p", "a": "1"}, {"q": "r", "a": "2"}]
    first = loaded(tmp_path, rows)
    (tmp_path / "other").mkdir()
    assert loaded(tmp_path / "other", rows).digest == first.digest
    assert loaded(tmp_path, [*rows[:1], {"q": "r", "a": "3"}]).digest != first.digest
    limited = loaded(tmp_path, rows, limit=1)
    assert limited.digest != first.digest and limited.title == "Own (first 1)"


def test_names_files_and_groups_are_found_and_unknown_or_doubled_ones_refused():
    fields = {"problem": "q", "label": "a", "id": None}
    found = find_suites(["paper", "my set.jsonl"], fields=fields)
    assert [suite.name for suite in found][-2:] == ["aime25", "my-set"]
    assert found[-1].problem == ("q",) and found[-1].id == ()
    with pytest.raises(SuiteError, match="--suite mathh: unknown"):
        find_suites(["mathh"], fields={})
    with pytest.raises(SuiteError, match="aime24 2 times"):
        find_suites(["paper", "aime24"], fields={})
    fields = {"problem": "q", "label": "a"}
    with pytest.raises(SuiteError, match=r"a/x\.jsonl and b/x\.jsonl are both called x"):
        find_suites(["a/x.jsonl", "b/x.jsonl"], fields=fields)
    with pytest.raises(SuiteError, match="--problem_field, --label_field: only a file of your own"):
        find_suites(["gsm8k"], fields=fields)
    with pytest.raises(SuiteError, match="needs --problem_field NAME and --label_field NAME"):
        find_suites(["mine.jsonl"], fields={})


def test_a_long_file_name_becomes_a_name_that_files_can_have():
    fields = {"problem": "q", "label": "a"}
    (suite,) = find_suites([f"sets/{'long-' * 48}.jsonl"], fields=fields)
    assert suite.name.startswith("long-long") and len(suite.name) <= 100
    assert suite.title == "long-" * 48


def test_a_reference_that_no_answer_can_equal_is_named_before_anything_is_asked(tmp_path):
    rows = [{"q": "p", "a": "7"}, {"q": "Why?", "a": "because " * 50}]
    grader = Grader()
    try:
        with pytest.raises(SuiteError, match=r"1 reference answers cannot be graded.*\n  own:2: "):
            check_references(loaded(tmp_path, rows), grader)
        check_references(loaded(tmp_path, rows[:1]), grader)
    finally:
        grader.close()


def plan(template: str) -> Plan:
    return Plan(template=template, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=100, seed=0)


def test_a_model_without_a_chat_template_and_a_prompt_without_room_are_refused(tmp_path, policy):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(policy)
    suite = loaded(tmp_path, [{"q": "What is 1 + 2?", "a": "3"}])
    prompts = Prompts(suite, plan("chat-bare"), tokenizer, named="--model m", max_length=100)
    assert prompts.num_cut == 1 and prompts.task(suite.problems[0])[1] < 100
    with pytest.raises(SuiteError, match="leaves no room below the service's max_model_len 10"):
        Prompts(suite, plan("chat-bare"), tokenizer, named="--model m", max_length=10)
    tokenizer.chat_template = None
    with pytest.raises(TokenizerError, match=r"--model m has no chat template.*starts with base-"):
        Prompts(suite, plan("chat-bare"), tokenizer, named="--model m", max_length=100)
    assert Prompts(suite, plan("base-math"), tokenizer, named="", max_length=1000).num_cut == 0

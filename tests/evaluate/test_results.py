"""Numbers of a suite from answers and grades, and the tables."""

from dataclasses import replace

import pytest

from openrlhf_alp.evaluate.records import Answer, Grade
from openrlhf_alp.evaluate.results import average_over_suites, markdown, summarise
from openrlhf_alp.evaluate.store import StoreError
from openrlhf_alp.evaluate.suites import LoadedSuite, Problem, Suite
from openrlhf_alp.evaluate.task import to_score
from openrlhf_alp.rewards.verify import judge

ANSWER = Answer(
    problem_id="",
    sample=0,
    response="",
    turns=(),
    stop_reason="eos",
    truncated=False,
    void=False,
    num_tokens=10,
    tool_calls=(),
    token_ids="",
    logprobs="",
    action_ranges=((1, 2),),
    versions=((3, "digest"),),
    generate_s=0.5,
    tool_s=0.0,
)
RIGHT = Grade(right=True, answer="3", choice="3")
WRONG = Grade(right=False, answer="4", choice="4")
EMPTY = Grade(right=False, answer=None)
FAULT = Grade(right=None, answer=None, reason="timeout", detail="5 s")
SUMMED = Grade(right=False, answer="1 + 2", choice="1+2", unevaluated=True)


def suite(**levels: str) -> LoadedSuite:
    problems = tuple(
        Problem(
            id=name,
            text=name,
            label="3",
            tolerance=None,
            subject=None,
            level=level,
            solution=None,
        )
        for name, level in levels.items()
    )
    return LoadedSuite(
        suite=Suite(name="own", title="Own", source="", problem=(), label=()),
        problems=problems,
        origin="own.jsonl",
        is_whole=True,
    )


def summed(grades: dict[str, list[Grade]], answers: list[Answer] | None = None):
    loaded = suite(**{name: "1" if name == "a" else "2" for name in grades})
    n = len(next(iter(grades.values())))
    keys = {(name, i): grade for name, found in grades.items() for i, grade in enumerate(found)}
    made = [replace(ANSWER, problem_id=name, sample=i) for name, i in keys]
    return summarise(loaded, answers or made, keys, n=n)


def test_the_numbers_of_two_problems_by_hand():
    """a: 2 of 4 right, b: 1 of 4 right and 1 not graded."""
    found = summed({"a": [RIGHT, RIGHT, WRONG, EMPTY], "b": [RIGHT, WRONG, FAULT, SUMMED]})
    assert found["avg"]["value"] == pytest.approx(3 / 8)
    assert found["avg_if_right"] == pytest.approx(4 / 8)
    # pass@2: 1 - 1/6 for a, 1 - 3/6 for b.
    assert found["pass_at"]["2"]["value"] == pytest.approx((5 / 6 + 3 / 6) / 2)
    assert found["pass_at"]["4"]["value"] == 1.0
    # a: 3 is said twice. b: 3, 4 and 1 + 2 once each, so a third.
    assert found["majority"]["value"] == pytest.approx((1 + 1 / 3) / 2)
    shares = {"truncated": 0, "invalid": 1 / 8, "unevaluated": 1 / 8, "void": 0, "ungraded": 1 / 8}
    assert found["shares"] == shares
    assert found["ungraded"] == [
        {"problem_id": "b", "sample": 2, "reason": "timeout", "detail": "5 s"}
    ]
    assert found["by_level"]["1"]["avg"]["value"] == 0.5
    assert found["by_level"]["2"]["num_problems"] == 1
    assert found["by_subject"] == {} and found["weights"] == [{"version": 3, "digest": "digest"}]


def test_lengths_tool_calls_and_truncation_are_means_over_answers():
    answers = [
        replace(ANSWER, problem_id="a", sample=0, num_tokens=10, tool_calls=("ok", "error")),
        replace(ANSWER, problem_id="a", sample=1, num_tokens=30, truncated=True, void=True),
    ]
    found = summed({"a": [RIGHT, WRONG]}, answers)
    assert (found["mean_tokens"], found["mean_tool_calls"]) == (20, 1)
    assert found["tool_statuses"] == {"ok": 1, "error": 1}
    assert (found["shares"]["truncated"], found["shares"]["void"]) == (0.5, 0.5)


def test_answers_of_two_weights_are_no_number():
    answers = [
        replace(ANSWER, problem_id="a", sample=0),
        replace(ANSWER, problem_id="a", sample=1, versions=((4, "other"),)),
    ]
    with pytest.raises(StoreError, match="come from 2 weights: digest, other"):
        summed({"a": [RIGHT, WRONG]}, answers)


def test_spellings_of_one_wrong_answer_are_one_vote():
    said = [judge(f"\\boxed{{{text}}}", "3") for text in ("\\frac{1}{2}", "0.5", "$ 1/2 $")]
    assert len({verdict.choice for verdict in said}) == 1
    assert judge("\\boxed{x + 1}", "3").choice == judge("$\\boxed{x+1}$", "3").choice
    wrong = [Grade(right=False, answer=one.answer, choice=one.choice) for one in said[:2]]
    assert summed({"a": [*wrong, RIGHT]})["majority"]["value"] == 0.0


def run_of(*suites: dict) -> dict:
    return {
        "model": "policy",
        "n": 2,
        "weights_digest": "d" * 64,
        "weights_version": 0,
        "contract_hash": "c" * 64,
        "plan": {
            "temperature": 1.0,
            "top_p": 1.0,
            "max_new_tokens": 16,
            "template": "chat-math",
            "seed": 0,
        },
        "suites": list(suites),
        "average": average_over_suites(suites),
    }


def test_the_table_has_the_columns_of_the_paper_and_names_what_was_not_graded():
    first = summed({"a": [RIGHT, WRONG], "b": [RIGHT, RIGHT]})
    second = summed({"a": [FAULT, WRONG], "b": [WRONG, WRONG]})
    text = markdown(run_of(first, {**second, "title": "Other"}))
    assert "| avg@2, % | Own | Other | Average |" in text
    assert "| policy | 75.0 [" in text and "] | 37.5 [" in text
    assert "| pass@k, % | k = 1 | k = 2 |" in text
    assert "Other: 1 answers could not be graded (timeout 1)" in text
    assert "would be 25.0 %" in text and "nan" not in text
    assert "| Own: level | problems | avg@2, % |\n| --- | --- | --- |\n| 1 | 1 | 50.0 [" in text
    assert "\n| 2 | 1 | 100.0 [" in text and "subject" not in text


def test_names_cannot_break_a_table():
    found = summed({"a": [RIGHT, RIGHT]})
    text = markdown({**run_of({**found, "title": "my | set"}), "model": "a\n| b"})
    assert "| avg@2, % | my \\| set |\n| --- | --- |\n| a \\| b | 100.0 [" in text


def test_the_error_of_an_average_adds_variances():
    suites = [
        {"avg": {"value": 0.2, "stderr": 0.03, "low": 0.14, "high": 0.28}},
        {"avg": {"value": 0.6, "stderr": 0.04, "low": 0.52, "high": 0.66}},
    ]
    # (3, 4, 5) and (6, 8, 10), in hundredths, over two suites.
    assert average_over_suites(suites) == {
        "value": pytest.approx(0.4),
        "stderr": pytest.approx(0.025),
        "low": pytest.approx(0.35),
        "high": pytest.approx(0.45),
    }
    (alone,) = ({"avg": {"value": 0.0, "stderr": 0.0, "low": 0.0, "high": 0.3}},)
    assert average_over_suites([alone]) == alone["avg"]


def test_a_fault_of_the_grader_is_a_score_of_its_own_in_the_log():
    assert to_score(RIGHT).value == 1.0
    fault = to_score(FAULT)
    assert (fault.value, fault.reason) == (0.0, "scoring_failed")
    assert fault.explanation == "timeout: 5 s"
    assert to_score(EMPTY).reason == "no_response"
    assert "worked out" in to_score(SUMMED).explanation

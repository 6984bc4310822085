import pytest

from openrlhf_alp.data.formats import (
    FORMATS,
    UnknownFormatError,
    check_format,
    detect_format,
    plain_format,
    to_problem,
)
from openrlhf_alp.data.sources import Row


def row(content, number=1, source="sets/some.jsonl"):
    return Row(source=source, number=number, content=content)


SIMPLERL = {
    "input": "<|im_start|>user\nWhat is 3 + 4?<|im_end|>",
    "answer": "3 + 4 = 7, so the answer is 7",
    "gt_answer": "7",
    "question": "What is 3 + 4?",
    "subject": "Algebra",
    "level": 3,
}
RSTAR2 = {
    "input": "<|im_start|>user\nWhat is 3 + 4?<|im_end|>",
    "gt_answer": "7",
    "data_source": "dapo",
    "prompt": [{"role": "user", "content": "Solve it: What is 3 + 4?"}],
    "reward_model": {"style": "rule", "ground_truth": "7"},
    "extra_info": {"index": 5, "question": "What is 3 + 4?"},
}
DEEPSCALER = {"problem": "What is 3 + 4?", "answer": "7", "solution": "..."}


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (SIMPLERL, "simplerl"),
        (RSTAR2, "rstar2"),
        (DEEPSCALER, "deepscaler"),
        ({"problem": "What is 3 + 4?", "gt": "7"}, "deepscaler"),
        ({"input": "What is 3 + 4?", "label": "7"}, "plain"),
        ({"question": "What is 3 + 4?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"}, "plain"),
        ({"Body": "What is", "Question": "3 + 4?", "Answer": 7.0}, "plain"),
    ],
)
def test_each_published_form_is_recognised_and_gives_problem_and_answer(content, name):
    row_format = detect_format([row(content)])
    problem = to_problem(row(content), row_format)
    assert row_format.name == name
    assert (problem.text, problem.labels) == ("What is 3 + 4?", ("7",))


def test_a_field_that_is_empty_in_the_first_row_is_found_in_a_later_one():
    rows = [row({"problem": "?", "answer": None}), row(DEEPSCALER, 2)]
    assert detect_format(rows).name == "deepscaler"
    assert to_problem(rows[0], FORMATS["deepscaler"]).labels == ()


def test_messages_stand_for_the_last_user_message():
    content = {
        "prompt": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is 3 + 4?"},
        ],
        "reward_model": {"ground_truth": 7},
    }
    problem = to_problem(row(content), FORMATS["rstar2"])
    assert (problem.text, problem.labels) == ("What is 3 + 4?", ("7",))


@pytest.mark.parametrize(
    "text",
    [
        "Solve the following math problem step by step. The last line of your response should be "
        "of the form Answer: $Answer (without quotes) where $Answer is the answer to the problem."
        '\n\nWhat is 3 + 4?\n\nRemember to put your answer on its own line after "Answer:".',
        "What is 3 + 4? Let's think step by step and output the final answer within \\boxed{}.",
        "What is 3 + 4? Please output the final answer within \\boxed{}.",
        "What is 3 + 4?\nPlease reason step by step, and put your final answer within \\boxed{}.",
    ],
)
def test_instructions_on_the_form_of_the_answer_are_cut(text):
    problem = to_problem(row({"problem": text, "answer": "7"}), FORMATS["deepscaler"])
    assert problem.text == "What is 3 + 4?"
    assert problem.had_instructions


def test_a_problem_that_only_mentions_a_box_is_left_alone():
    text = r"Please reason step by step about a \boxed{} of side 2. What is its volume?"
    problem = to_problem(row({"problem": text, "answer": "8"}), FORMATS["deepscaler"])
    assert problem.text == text and not problem.had_instructions


def test_source_and_id_are_the_rows_own_or_say_where_it_stood():
    given = to_problem(row(RSTAR2), FORMATS["rstar2"])
    assert (given.datasource, given.id) == ("dapo", "5")
    own = to_problem(row(DEEPSCALER, 12), FORMATS["deepscaler"])
    assert (own.datasource, own.id) == ("some", "some:12")


def test_unknown_fields_are_shown_beside_the_known_ones():
    rows = [row({"query": "?", "solution": "7"}), row("not json", 2)]
    with pytest.raises(UnknownFormatError) as unknown:
        detect_format(rows)
    message = str(unknown.value)
    assert "has the fields" in message or "have the fields: query, solution" in message
    assert all(known.fields in message for known in FORMATS.values())
    assert "--problem-field" in message


def test_a_named_format_that_does_not_fit_is_refused():
    with pytest.raises(UnknownFormatError, match=r"asked for was rstar2: extra_info\.question"):
        check_format(FORMATS["rstar2"], [row(DEEPSCALER)])


def test_fields_named_by_hand_may_lie_deeper_or_be_joined():
    content = {"task": {"text": "What is 3 + 4?"}, "hint": "Add.", "solution": {"value": 7}}
    row_format = plain_format("hint+task.text", "solution.value")
    check_format(row_format, [row(content)])
    problem = to_problem(row(content), row_format)
    assert (problem.text, problem.labels) == ("Add. What is 3 + 4?", ("7",))

"""Rows as users have them: byte order marks, parts of messages, labels that are no text."""

import json

import numpy
import pyarrow
import pyarrow.parquet
import pytest

from openrlhf_alp.data.formats import FORMATS, detect_format, to_problem
from openrlhf_alp.data.labels import label_texts
from openrlhf_alp.data.prepare import Options, Reason, prepare
from openrlhf_alp.data.sources import Row, read_rows
from openrlhf_alp.data.templates import TEMPLATES
from openrlhf_alp.data.verdicts import Verdict, check_labels

BOM = "\ufeff"
ROWS = [{"problem": "What is 3 + 4?", "answer": "7"}, {"problem": "What is 2 + 2?", "answer": 4}]


def problem_of(content, name="rstar2"):
    return to_problem(Row(source="set.jsonl", number=1, content=content), FORMATS[name])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("set.jsonl", BOM + "\n".join(map(json.dumps, ROWS))),
        ("set.jsonl", BOM + f"\n{BOM}".join(map(json.dumps, ROWS))),
        ("set.jsonl", "\r\n".join(map(json.dumps, ROWS)) + "\r\n"),
        ("set.json", BOM + json.dumps(ROWS)),
        ("set.json", BOM + "\n".join(map(json.dumps, ROWS))),
    ],
)
def test_a_byte_order_mark_costs_no_row(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text.encode())
    assert [row.content for row in read_rows(str(path))] == ROWS


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "Find 2+4."}],
        [{"type": "text", "text": "Find"}, {"type": "text", "text": "2+4."}],
        ["Find", "2+4."],
        "Find 2+4.",
    ],
)
def test_the_text_parts_of_a_message_are_its_text(content):
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
    problem = problem_of({"prompt": prompt, "reward_model": {"ground_truth": "6"}})
    assert (problem.text.split(), problem.labels) == (["Find", "2+4."], ("6",))


def test_a_part_that_is_no_text_needs_more_than_a_text_model():
    parts = [{"type": "image_url", "image_url": "a.png"}, {"type": "text", "text": "What is it?"}]
    rows = [{"problem": [{"role": "user", "content": parts}], "answer": "7"}]
    assert reasons(rows) == [Reason.NEEDS_IMAGE]


def reasons(rows):
    found = [
        (Row(source="set.jsonl", number=number, content=row), FORMATS["deepscaler"])
        for number, row in enumerate(rows, start=1)
    ]
    prepared = prepare(found, Options(template=TEMPLATES["chat-bare"], num_workers=1))
    rejected = {one.row.number: one.reason for one in prepared.rejected}
    return [rejected.get(number, "kept") for number in range(1, len(rows) + 1)]


def test_labels_of_every_type_are_read_or_rejected_by_name():
    answers = [5, 5.0, 0.25, "5", r"\[7\]", ["6"], '["8"]', "Yes", None, True, {"value": "7"},
               float("nan"), [], ["1", "2"], "?"]  # fmt: skip
    rows = [{"problem": f"Problem {i}?", "answer": answer} for i, answer in enumerate(answers)]
    unreadable = Reason.LABEL_NOT_PARSABLE
    assert reasons(rows) == [
        *(["kept"] * 8),
        *(Reason.NO_LABEL, unreadable, unreadable, unreadable, Reason.NO_LABEL),
        *(Reason.SEVERAL_LABELS, unreadable),
    ]


def test_an_object_as_label_says_which_field_to_name():
    problem = problem_of({"problem": "p", "answer": {"value": "7"}}, "deepscaler")
    assert problem.labels == ()
    assert (
        "fields value" in problem.label_fault
        and "as the label's field, for example answer.value" in problem.label_fault
    )


@pytest.mark.parametrize(
    ("given", "bare"),
    [(r"\[7\]", "7"), (r"\(7\)", "7"), ("$$7$$", "7"), (" $7$. ", "7"), (r"\[\boxed{7}\]", "7")],
)
def test_math_delimiters_are_no_part_of_a_label(given, bare):
    assert label_texts(given) == (bare,)


def test_numpy_values_are_read_like_pythons(tmp_path):
    row = {
        "prompt": numpy.array([{"role": "user", "content": "Find 2+4."}], dtype=object),
        "reward_model": {"ground_truth": numpy.int64(6)},
    }
    problem = problem_of(row)
    assert (problem.text, problem.labels) == ("Find 2+4.", ("6",))
    path = tmp_path / "set.parquet"
    table = pyarrow.table({"problem": ["p", "q"], "answer": pyarrow.array([1.0, 2.5])})
    pyarrow.parquet.write_table(table, path)
    rows = list(read_rows(str(path)))
    assert [to_problem(row, detect_format(rows)).labels for row in rows] == [("1",), ("2.5",)]


def test_every_label_of_a_data_set_gets_a_verdict_and_progress_counts_each():
    counted = []
    verdicts = check_labels(
        ["7", 7, r"\frac{1}{2}", r"\frac{1}{2}", {"value": 1}, "", "?", ["1/2", "0.5"], "$1,$2$"],
        num_workers=1,
        on_done=lambda: counted.append(1),
    )
    right, unreadable = Verdict(equal=True), "label_not_parsable"
    assert verdicts[:4] == [right] * 4
    assert [verdict.unavailable for verdict in verdicts[4:7]] == [unreadable] * 3
    assert "fields value" in verdicts[4].detail
    assert verdicts[7:] == [right, Verdict(equal=False)]
    assert len(counted) == 9

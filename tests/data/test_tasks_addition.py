import json
import re

import pytest
from openrlhf.datasets.prompts_dataset import preprocess_data

from openrlhf_alp.data.tasks import (
    INPUT_KEY,
    LABEL_KEY,
    Question,
    repeat_rows,
    split_additions,
    write_rows,
)


def operands(row: Question) -> tuple[int, int]:
    match = re.fullmatch(r"What is (\d+) \+ (\d+)\?", row.question)
    assert match is not None
    return int(match[1]), int(match[2])


def test_every_label_is_the_sum_and_every_pair_of_digits_is_asked_once():
    split = split_additions()
    rows = [*split.train, *split.test]
    assert all(sum(operands(row)) == int(row.label) for row in rows)
    assert sorted(map(operands, rows)) == [(a, b) for a in range(1, 10) for b in range(1, 10)]


def test_no_sum_of_the_test_is_trained_on_in_either_order():
    """9 * 10 / 2 = 45 unordered pairs, a fifth of them held out: 9."""
    split = split_additions()
    train = {frozenset(operands(row)) for row in split.train}
    test = {frozenset(operands(row)) for row in split.test}
    assert (len(train), len(test)) == (36, 9)
    assert not train & test


def test_the_split_follows_the_seed_alone():
    assert split_additions(seed=3) == split_additions(seed=3)
    assert split_additions(seed=3) != split_additions(seed=4)


def test_larger_operands_give_larger_sums():
    split = split_additions(max_operand=20)
    assert len(split.train) + len(split.test) == 400
    assert max(int(row.label) for row in (*split.train, *split.test)) == 40


@pytest.mark.parametrize("arguments", [{"max_operand": 1}, {"max_operand": 9, "test_share": 1.0}])
def test_a_split_without_training_questions_is_refused(arguments):
    with pytest.raises(ValueError, match="nothing is left to train on"):
        split_additions(**arguments)


def test_repeating_makes_whole_passes_before_it_starts_again():
    rows = split_additions().train
    repeated = repeat_rows(rows, count=2 * len(rows) + 3, seed=1)
    first, second = repeated[: len(rows)], repeated[len(rows) : 2 * len(rows)]
    assert set(first) == set(second) == set(rows)
    assert first != second
    assert len(repeated) == 2 * len(rows) + 3


def test_the_file_is_what_openrlhf_reads(tmp_path):
    path = tmp_path / "train.jsonl"
    write_rows(path, [Question(question="What is 3 + 4?", label="7")])
    (row,) = [json.loads(line) for line in path.read_text().splitlines()]

    def template(chat, *, tokenize, add_generation_prompt):
        return f"<{chat[0]['role']}>{chat[0]['content']}"

    read = preprocess_data(
        row, input_key=INPUT_KEY, label_key=LABEL_KEY, apply_chat_template=template
    )
    assert read == ("<user>What is 3 + 4?", "7")

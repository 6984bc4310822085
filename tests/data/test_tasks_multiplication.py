import itertools
import re

from openrlhf_alp.data.tasks import sample_dialogues, split_products


def operands(question: str) -> tuple[int, int]:
    match = re.fullmatch(r"What is (\d\d) \* (\d\d)\?", question)
    assert match is not None
    return int(match[1]), int(match[2])


def test_every_label_is_the_product_and_no_held_out_pair_is_trained_on():
    split = split_products(seed=1)
    for row in (*split.train, *split.test):
        a, b = operands(row.question)
        assert a * b == int(row.label)
    train = {frozenset(operands(row.question)) for row in split.train}
    test = {frozenset(operands(row.question)) for row in split.test}
    assert (len(train), len(test)) == (114, 6) and not train & test


def test_the_questions_follow_the_seed_alone():
    assert split_products(seed=3) == split_products(seed=3)
    assert split_products(seed=3) != split_products(seed=4)


def test_every_third_dialogue_calls_the_tool_and_the_others_guess_wrong():
    dialogues = list(itertools.islice(sample_dialogues(seed=0), 200))
    for index, dialogue in enumerate(dialogues):
        a, b = operands(dialogue.question)
        answer = re.fullmatch(r"The answer is \\boxed\{(\d+)\}\.", dialogue.answer)
        assert answer is not None and dialogue.output == str(a * b)
        if index % 3 == 0:
            assert dialogue.call == f"```python\nprint({a} * {b})\n```\n"
            assert answer[1] == dialogue.output
        else:
            assert dialogue.call is None and answer[1] != dialogue.output
            assert len(answer[1]) == len(dialogue.output)

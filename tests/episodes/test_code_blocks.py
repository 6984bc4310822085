import pytest

from openrlhf_alp.episodes.code_blocks import (
    STOP_AT_FENCE,
    find_code,
    has_boxed_answer,
    without_code,
)
from openrlhf_alp.episodes.observation import (
    CodeResult,
    CodeStatus,
    cut_middle,
    last_frame,
    render_result,
)

TRACEBACK = """\
Traceback (most recent call last):
  File "<snippet>", line 9, in <module>
    outer()
  File "<snippet>", line 5, in outer
    inner()
  File "<snippet>", line 2, in inner
    return 1 / 0
           ~~^~~
ZeroDivisionError: division by zero
"""


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("So:\n```python\nprint(1)\n```\n", "print(1)\n"),
        ("```py\nprint(1)\n```", "print(1)\n"),
        ("```python3 \r\nprint(1)\n```", "print(1)\n"),
        ("  ```python\n  x = 1\n  ```\n", "  x = 1\n"),
        ("```python\n```\n", ""),
        ("```python\na = 1\n```\nand\n```python\nprint(a)\n```\n", "a = 1\n\nprint(a)\n"),
        ("```python\nprint('```')\n```\n", "print('```')\n"),
        ("```python\nprint(1)\n", None),
        ("```\nprint(1)\n```\n", None),
        ("```output\n42\n```\n", None),
        ("inline ```python print(1)``` code", None),
        ("The answer is 42.", None),
    ],
)
def test_the_code_of_a_turn_is_its_closed_python_blocks(text, code):
    assert find_code(text) == code


def test_the_stop_string_matches_a_closing_fence_and_no_tagged_opening_one():
    turn = "First\n```python\nprint(1)\n```\n"
    assert turn.index(STOP_AT_FENCE) == len(turn) - len(STOP_AT_FENCE)


@pytest.mark.parametrize(
    ("text", "answered"),
    [
        (r"so \boxed{7}", True),
        (r"so \boxed {\frac{1}{2}}", True),
        (r"so \boxed{}", False),
        (r"so \boxed{ }", False),
        ("so 7", False),
        ("```python\nprint('\\\\boxed{7}')\n```\n", False),
    ],
)
def test_a_final_answer_is_boxed_and_stands_outside_the_code(text, answered):
    assert has_boxed_answer(text) is answered


def test_code_is_no_part_of_the_policys_prose():
    assert without_code("a\n```python\nb\n```\nc") == "a\n\nc"


@pytest.mark.parametrize(
    ("result", "shown"),
    [
        (CodeResult(status=CodeStatus.OK, stdout="42\n"), "42"),
        (CodeResult(status=CodeStatus.OK), "[nothing was printed]"),
        (CodeResult(status=CodeStatus.OK, result="7"), "7"),
        (CodeResult(status=CodeStatus.OK, stdout="a\n", result="7"), "a\n7"),
        (CodeResult(status=CodeStatus.OK, stdout="42\n", stderr="Warning: old"), "42"),
        (CodeResult(status=CodeStatus.OK, stderr="Warning: old\n"), "Warning: old"),
        (
            CodeResult(status=CodeStatus.ERROR, stdout="half\n", stderr="ValueError: no\n"),
            "half\nValueError: no",
        ),
        (
            CodeResult(status=CodeStatus.TIMEOUT, stdout="half\n", message="timeout exceeded"),
            "half\n[timeout exceeded]",
        ),
        (CodeResult(status=CodeStatus.CRASHED), "[crashed]"),
    ],
)
def test_the_policy_reads_the_output_and_why_it_failed(result, shown):
    assert render_result(result, max_chars=100) == shown


def test_of_a_deep_traceback_the_last_frame_and_the_exception_stay():
    assert last_frame("warned\n" + TRACEBACK) == (
        "warned\nTraceback (most recent call last):\n  ...\n"
        '  File "<snippet>", line 2, in inner\n    return 1 / 0\n           ~~^~~\n'
        "ZeroDivisionError: division by zero\n"
    )
    shallow = TRACEBACK.split('  File "<snippet>", line 5')[0] + "ZeroDivisionError: no\n"
    assert last_frame(shallow) == shallow
    assert last_frame("no traceback") == "no traceback"


def test_a_long_output_keeps_head_and_tail_and_says_what_is_missing():
    cut = cut_middle("a" * 60 + "b" * 60, 21)
    assert cut == "a" * 11 + "\n[... 99 characters left out ...]\n" + "b" * 10
    assert cut_middle("a" * 21, 21) == "a" * 21

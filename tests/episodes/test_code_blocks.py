import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openrlhf_alp.episodes.code_blocks import (
    FENCE_STOPS,
    answer_text,
    ends_in_code,
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
        ("  ```python\n  x = 1\n  ```\n", "x = 1\n"),
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


@pytest.mark.parametrize(
    ("text", "code"),
    [
        # Line ends of another system, for the fences and the code.
        ("Try:\r\n```python\r\nif 1:\r\n    x\r\n```\r\n", "if 1:\n    x\n"),
        ("```python\rx\r```\r", "x\n"),
        # The language in any case, with attributes, and in the forms of other tools.
        ("```Python\nx\n```\n", "x\n"),
        ("``` PYTHON3\nx\n```\n", "x\n"),
        ('```python title="a.py" {1,3}\nx\n```\n', "x\n"),
        ("```{.python .numberLines}\nx\n```\n", "x\n"),
        ("```{python}\nx\n```\n", "x\n"),
        ("```python3.11\nx\n```\n", "x\n"),
        ("```python-repl\n>>> x\n```\n", None),
        ("```pycon\n>>> x\n```\n", None),
        ("```pyright\nx\n```\n", None),
        # Longer fences hold shorter ones, and tildes hold backticks.
        ("````python\nprint('''\n```\n''')\n````\n", "print('''\n```\n''')\n"),
        ("```python\nx\n`````\n", "x\n"),
        ("~~~python\n```\n~~~\n", "```\n"),
        ("~~~python\nx\n```\n", None),
        ("```python\nx\n~~~\n", None),
        # In lists and quotes the code loses the indentation of its place, and keeps its own.
        ("1. So:\n   ```python\n   if 1:\n       x\n   ```\n", "if 1:\n    x\n"),
        ("10. So:\n\n    ```python\n    x\n\n    y\n    ```\n", "x\n\ny\n"),
        ("- a\n  - b\n    ```python\n    x\n    ```\n", "x\n"),
        ("- ```python\n  x\n  ```\n", "x\n"),
        ("> ```python\n> x\n> ```\n", "x\n"),
        ("\t```python\n\tif 1:\n\t\tx\n\t```\n", "if 1:\n\tx\n"),
        # A model that indents the fences, or one of them, and not the code.
        ("1. So:\n   ```python\nif 1:\n    x\n   ```\n", "if 1:\n    x\n"),
        ("1. So:\n   ```python\n   x\n```\n", "x\n"),
        ("So:\n    ```python\n    x\n    ```\n", "x\n"),
        # An indented fence in a program belongs to the program.
        ("```python\n'''\n    ```\n'''\n```\n", "'''\n    ```\n'''\n"),
        ("```python\nx\n``` and more\n", None),
        ("```python\nx```\n", None),
        ("<think>\n```python\nx\n```\n</think>\n", "x\n"),
    ],
)
def test_a_block_is_found_in_every_form_that_commonmark_knows(text, code):
    assert find_code(text) == code


@given(
    mark=st.sampled_from(["```", "````", "~~~", "~~~~~"]),
    num_more=st.integers(0, 3),
    blanks=st.sampled_from(["", " ", "  \t"]),
    newline=st.sampled_from(["\n", "\r\n", "\r"]),
    place=st.sampled_from([("", ""), ("1. So:\n", "   "), ("* So:\n", "  "), ("So:\n", "      ")]),
)
def test_every_closing_fence_is_hit_by_a_stop_string_and_ends_the_turn(
    mark, num_more, blanks, newline, place
):
    before, indent = place
    closing = mark + mark[0] * num_more + blanks
    text = f"{before}{indent}{mark}python\n{indent}x = 1\n{indent}{closing}"
    text = text.replace("\n", newline) + newline
    hits = [text.index(stop) + len(stop) for stop in FENCE_STOPS if stop in text]
    # The stop comes right after the fence; blanks are then read to the end of their line.
    assert min(hits) == len(text) - len(blanks + newline) + 1
    assert ends_in_code(text) and find_code(text) == "x = 1\n"
    assert not ends_in_code(text.removesuffix(newline))


@pytest.mark.parametrize(
    "text",
    [
        "```python\n",
        "```python\nx\n",
        "```python\nx\n```",
        "```python\nx\n``` ",
        "```python\nprint('```\n",
        "```\nx\n```\n",
        "See ```\n",
    ],
)
def test_a_stop_string_elsewhere_does_not_end_the_turn(text):
    assert not ends_in_code(text)


def test_the_stop_strings_match_a_closing_fence_and_no_tagged_opening_one():
    turn = "First\n```python\nprint(1)\n```\n"
    assert [turn.index(stop) for stop in FENCE_STOPS if stop in turn] == [len(turn) - len("```\n")]
    for opening in ("~~~py\n", "````python {.a}\n"):
        assert not any(stop in opening for stop in FENCE_STOPS)


BOX = "\\boxed{5}"


@pytest.mark.parametrize(
    "turn",
    [
        f"Check.\n```python\n# answer {BOX}\nprint(1)",
        f"Check.\n```python\n# answer {BOX}\n",
        f"~~~python\nprint(r'{BOX}')\n```\n",
        f"```\n{BOX}",
        f"1. So:\n   ```python\n   # {BOX}\n\nAnd {BOX}",
        f"It is {BOX}.\n```python\nprint(1)",
        f"```python\nprint(1)\n``` It is {BOX}.",
    ],
)
def test_a_turn_with_a_block_that_was_never_closed_has_no_answer(turn):
    assert find_code(turn) is None and not has_boxed_answer(turn)
    assert "boxed" not in answer_text([turn])
    assert answer_text(["So \\boxed{4}.", turn]) == "So \\boxed{4}."


def test_a_stray_fence_at_the_end_opens_no_block():
    assert has_boxed_answer(f"So {BOX}.\n```") and has_boxed_answer(f"So {BOX}.\n```\n\n")


@pytest.mark.parametrize("language", ["", "output", "latex", "javascript", "Python"])
def test_nothing_in_a_block_of_code_is_an_answer(language):
    turn = f"See\n```{language}\n{BOX}\n```\nthere."
    assert not has_boxed_answer(turn) and answer_text([turn]) == "See\n\nthere."


def test_boxes_around_code_stand_in_different_paragraphs():
    call = "```python\nprint(2 + 3)\n```\n"
    assert answer_text([f"\\boxed{{4}}\n{call}", BOX]) == "\\boxed{4}\n\n\n\\boxed{5}"
    assert answer_text([f"\\boxed{{4}}\n{call}{BOX}"]) == "\\boxed{4}\n\n\\boxed{5}"


@given(st.text(alphabet="`~ \t\n\r>-*1.)py{#x", max_size=80))
def test_any_text_is_read_and_its_prose_is_made_of_its_own_lines(text):
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    prose = without_code(text).split("\n")
    assert len(prose) <= len(lines) and set(prose) <= {"", *lines}
    if find_code(text) is None:
        assert not ends_in_code(text)
    assert without_code("```python\nx\n```\n" + text) == "\n" + without_code(text)


@pytest.mark.parametrize(
    "part", ["- ", "> ", "> - ", "```\n", " ~~~\n", "1. a\n   - b\n", "> a\nb\n"]
)
def test_a_degenerate_text_does_not_hold_up_the_other_episodes(part):
    started_s = time.process_time()
    find_code(part * 5_000)
    assert time.process_time() - started_s < 5.0


@pytest.mark.parametrize(
    ("text", "answered"),
    [
        (r"so \boxed{7}", True),
        (r"so \boxed {\frac{1}{2}}", True),
        (r"so \fbox{7}", True),
        (r"so \boxed{}", False),
        (r"so \framebox{7}, that is \boxed 7", True),
        (r"so \boxed7", True),
        (r"so \fbox{}", False),
        (r"\boxedness {7}", False),
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

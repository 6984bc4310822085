import re
import subprocess
import sys

import pytest

from openrlhf_alp.rewards.values import Tolerance
from openrlhf_alp.rewards.verify import LabelNotParsableError, judge


@pytest.mark.parametrize(
    ("response", "label"),
    [
        ("The sum of 3 and 4 is 7.", "7"),
        ("3 + 4 = 7", "7"),
        ("The sum is $3+4=7$", "7"),
        ("The answer is **7**", "7"),
        (r"I first thought 5. \boxed{7}", "7"),
        ("7.0", "7"),
        ("8 or 7", "7"),
        (r"It costs \$32.", r"\$32"),
        (r"\boxed{p - q}", "p - q"),
        (r"\boxed{D, E}", "D, E"),
        ("The final answer is 7. However, 9 is close.", "7"),
        ("0.5", r"\frac{1}{2}"),
        ("1/2", "0.5"),
        (r"$1\frac{3}{4}$", "7/4"),
        (r"$3\times 10^8$", "300000000"),
        (r"It is $1 + 2\sqrt{3}$", r"2\sqrt{3}+1"),
        (r"\boxed{(1,2)}", "(1,2)"),
        (r"$x = 3$", "3"),
    ],
)
def test_a_right_answer_is_right_in_every_usual_form(response, label):
    verdict = judge(response, label)
    assert verdict.correct
    assert verdict.answered
    assert not verdict.unevaluated


@pytest.mark.parametrize(
    ("response", "label"),
    [
        ("3 + 4 = 8", "7"),
        ("70", "7"),
        ("-7", "7"),
        ("7 or 8", "7"),
        (r"\boxed{q - p}", "p - q"),
        ("5 + 9 = 15.\n\nSo 5 + 9 = 14.", "15"),
        ("2", r"2\sqrt{3}+1"),
    ],
)
def test_a_wrong_answer_is_wrong(response, label):
    verdict = judge(response, label)
    assert verdict.answered
    assert not verdict.correct


@pytest.mark.parametrize("response", ["", "seven", "I do not know."])
def test_a_text_without_mathematics_is_not_an_answer(response):
    verdict = judge(response, "7")
    assert not verdict.answered
    assert not verdict.correct


@pytest.mark.parametrize(
    "response",
    ["3 + 4", "The sum is 4 + 3.", r"\boxed{3+4}", "100 - 93", "3 + 4 = 3 + 4", "$3+4=4+3$"],
)
def test_repeating_the_question_earns_nothing_although_it_equals_the_label(response):
    verdict = judge(response, "7")
    assert verdict.unevaluated
    assert not verdict.correct


def test_a_product_that_is_left_to_the_reader_is_not_an_answer_either():
    assert judge("3*4", "12").unevaluated


def test_a_label_that_is_itself_a_sum_may_be_answered_by_one():
    assert judge("$x + 1$", "$1 + x$").correct


@pytest.mark.parametrize("label", ["", "???", "word " * 41])
def test_a_label_without_mathematics_is_an_error_that_shows_the_label(label):
    with pytest.raises(LabelNotParsableError, match=re.escape(repr(label))):
        judge("7", label)


def test_a_worker_cannot_grow_past_its_memory_limit():
    """The limit holds for the whole process, so it is tried in another one."""
    script = (
        "from openrlhf_alp.rewards.verify import limit_memory\n"
        "limit_memory(64 << 20)\n"
        "bytearray(16 << 20)\n"
        "bytearray(256 << 20)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == "MemoryError"
    assert "line 4" in run.stderr


@pytest.mark.parametrize(
    ("label", "answer", "tolerance", "right"),
    [
        ("0.265", "0.264", Tolerance(relative=0.01), True),
        ("0.265", "0.264", Tolerance(relative=1e-4), False),
        ("0.265", "0.264", None, False),
        ("4.2", "4.1", Tolerance(absolute=0.1), True),  # the edge belongs to it
        ("4.2", "4.099", Tolerance(absolute=0.1), False),
        ("4.2\\%", "4.25", Tolerance(absolute=0.1), True),
        ("4.2", "4.25\\%", Tolerance(absolute=0.1), False),
        ("4.5e33", "4.5001 \\times 10^{33}", Tolerance(relative=1e-4), True),
        ("\\frac{\\pi}{3}", "1.0472", Tolerance(relative=1e-4), True),
        ("12 \\text{ km}", "12.001", Tolerance(relative=1e-3), True),
        ("12 \\text{ km}", "12.001 \\text{ m}", Tolerance(relative=1e-3), False),
        ("x^2", "1.0001 x^2", Tolerance(relative=1e-3), False),  # for numbers only
        ("(1, 2)", "(1, 2.0001)", Tolerance(relative=1e-3), False),
        ("0", "0.001", Tolerance(relative=0.5), False),
    ],
)
def test_a_number_within_the_tolerance_of_a_label_is_right(label, answer, tolerance, right):
    assert judge(f"\\boxed{{{answer}}}", label, tolerance).correct is right

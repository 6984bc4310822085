"""Properties of the grader, searched for counterexamples."""

from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from openrlhf_alp.rewards.answers import final_answer, outside_code
from openrlhf_alp.rewards.verify import judge

INTEGERS = st.integers(min_value=-(10**60), max_value=10**60)
SIZES = st.integers(min_value=1, max_value=10**60)
FRACTIONS = st.builds(Fraction, INTEGERS, SIZES)


def boxed(answer):
    return f"So the answer is $\\boxed{{{answer}}}$."


def latex(value):
    sign = "-" if value < 0 else ""
    return rf"{sign}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def decimal(value, places):
    """The finite decimal value / 10^places."""
    digits = str(abs(value)).rjust(places + 1, "0")
    text = f"{digits[:-places]}.{digits[-places:]}" if places else digits
    return f"-{text}" if value < 0 else text


@given(FRACTIONS, FRACTIONS)
def test_different_fractions_of_any_size_are_never_equal(first, second):
    assume(first != second)
    assert not judge(boxed(latex(first)), latex(second)).correct


@given(FRACTIONS, SIZES)
def test_fractions_that_differ_by_little_are_not_equal(value, size):
    other = value + Fraction(1, size * 10**40)
    assert not judge(boxed(latex(other)), latex(value)).correct
    assert not judge(boxed(f"{other.numerator}/{other.denominator}"), latex(value)).correct


@given(st.integers(2, 9), st.integers(1, 300), st.integers(1, 300))
def test_different_powers_are_not_equal(base, first, second):
    assume(first != second)
    label = rf"\frac{{1}}{{{base}^{{{first}}}}}"
    assert not judge(boxed(rf"\frac{{1}}{{{base}^{{{second}}}}}"), label).correct
    assert judge(boxed(f"{base}^{{-{first}}}"), label).correct


@given(FRACTIONS)
def test_a_fraction_equals_itself_in_every_form(value):
    assume(value.denominator > 1)
    top, bottom = abs(value.numerator), value.denominator
    sign = "-" if value < 0 else ""
    whole, rest = divmod(top, bottom)
    forms = [
        latex(value),
        f"{sign}{top}/{bottom}",
        f"{sign}{top}./{bottom}",
        rf"{sign}\dfrac{{{3 * top}}}{{{3 * bottom}}}",
        rf"\frac{{{sign}{top}}}{{{bottom}}}",
        rf"{{ {sign}\tfrac {{{top}}} {{{bottom}}} }}.",
        rf"x = {sign}\frac{{{top}}}{{{bottom}}}",
        rf"{sign}\left(\frac{{{top}}}{{{bottom}}}\right)",
        *([rf"{sign}{whole}\frac{{{rest}}}{{{bottom}}}"] if whole else []),
    ]
    for form in forms:
        assert judge(boxed(form), latex(value)).correct, form
        assert judge(boxed(latex(value)), form).correct, form


@given(INTEGERS)
def test_an_integer_equals_itself_in_every_form(value):
    grouped = f"{value:,}"
    forms = [
        f"{value}.",
        f"{value}.0",
        f" {value} ",
        grouped,
        grouped.replace(",", "{,}"),
        grouped.replace(",", r"\,"),
        grouped.replace(",", r"{\,}"),
        grouped.replace(",", r",\!"),
        grouped.replace(",", "\u2009"),
        grouped.replace(",", "\u202f"),
        grouped.replace(",", "\u00a0"),
        grouped.replace(",", " "),
        grouped.replace(",", "~"),
        grouped.replace(",", "'"),
        str(value).replace("-", "\u2212"),
        rf"\text{{{value}}}",
        rf"\mathbf{{{value}}}",
        rf"{value}\text{{ cm}}",
        rf"{value}\,\mathrm{{km/h}}",
        rf"{value} \text{{ square feet}}",
        rf"{value} dollars",
        rf"{value}^\circ",
        f"{value}\u00b0",
        f"{value}\u20ac",
        rf"\boxed{{{value}}}",
        rf"n = {value}",
    ]
    for form in forms:
        assert judge(boxed(form), str(value)).correct, form
        assert judge(boxed(str(value)), form).correct, form
        assert not judge(boxed(form), str(value + 1)).correct, form


@given(st.integers(-(10**12), 10**12), st.integers(1, 9))
def test_a_decimal_equals_itself_as_a_fraction_and_in_scientific_notation(value, places):
    assume(value)
    label = decimal(value, places)
    exponent = len(str(abs(value))) - 1
    mantissa = decimal(value, exponent)
    power = exponent - places
    forms = [
        latex(Fraction(value, 10**places)),
        f"{label}00",
        f"{mantissa}e{power}",
        f"{mantissa}E{power:+d}",
        rf"{mantissa} \times 10^{{{power}}}",
        rf"{mantissa}\cdot10^{{{power}}}",
        f"{mantissa}*10**{power}",
        f"{mantissa}\u00d710^{{{power}}}",
        label.replace("0.", ".", 1) if label.startswith("0.") else label,
    ]
    for form in forms:
        assert judge(boxed(form), label).correct, form
        assert not judge(boxed(form), decimal(value + 1, places)).correct, form


@given(
    st.integers(0, 9),
    st.text("0123456789", max_size=5),
    st.text("0123456789", min_size=1, max_size=6),
)
def test_a_repeating_decimal_is_its_fraction(whole, head, period):
    assume(set(period) != {"9"})
    value = Fraction(int(f"{whole}{head}"), 10 ** len(head)) + Fraction(
        int(period), (10 ** len(period) - 1) * 10 ** len(head)
    )
    for form in (
        rf"{whole}.{head}\overline{{{period}}}",
        rf"{whole}.{head}\bar{{{period}}}",
        f"{whole}.{head}({period})",
    ):
        assert judge(boxed(form), f"{value.numerator}/{value.denominator}").correct, form
        wrong = value + Fraction(1, 10**9)
        assert not judge(boxed(form), latex(wrong)).correct, form


@given(st.integers(2, 10**6), st.integers(2, 10**6), st.integers(1, 50))
def test_roots_are_compared_exactly(radicand, other, factor):
    label = rf"{factor}\sqrt{{{radicand}}}"
    assert judge(boxed(rf"\sqrt{{{factor**2 * radicand}}}"), label).correct
    assert judge(boxed(rf"\frac{{{factor * radicand}}}{{\sqrt{{{radicand}}}}}"), label).correct
    assume(other != radicand)
    assert not judge(boxed(rf"{factor}\sqrt{{{other}}}"), label).correct
    huge = 10**40 * radicand**2
    assert not judge(boxed(rf"\sqrt{{{huge + 1}}}"), str(10**20 * radicand)).correct


@given(st.text("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", min_size=1, max_size=12))
def test_a_word_equals_itself_however_it_is_set(word):
    for form in (word, rf"\text{{{word}}}", rf"\textbf{{{word}}}", f" {word}. "):
        assert judge(boxed(form), word).correct, form
    assert not judge(boxed(word + "q"), word).correct


@given(st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_times_are_compared_as_times(hour, minute, other):
    label = f"{hour}:{minute:02d}"
    for form in (label, rf"{hour}{{:}}{minute:02d}", rf"{label} \text{{ a.m.}}", f"{label} AM"):
        assert judge(boxed(form), label).correct, form
    assume(other != minute)
    assert not judge(boxed(f"{hour}:{other:02d}"), label).correct


@given(st.lists(st.integers(-999, 999), min_size=2, max_size=6, unique=True), st.randoms())
def test_a_list_is_equal_in_any_order_and_a_tuple_only_in_its_own(values, random):
    shuffled = random.sample(values, k=len(values))
    listed, mixed = ("; ".join(map(str, some)) for some in (values, shuffled))
    assert judge(boxed(mixed), listed).correct
    assert judge(
        boxed(", ".join(map(str, shuffled))), rf"\{{{', '.join(map(str, values))}\}}"
    ).correct
    assert not judge(boxed(str(values[0])), listed).correct
    pair = f"({', '.join(map(str, values))})"
    assert judge(boxed(f"({', '.join(map(str, shuffled))})"), pair).correct == (values == shuffled)


@given(st.text(max_size=400))
def test_no_text_makes_the_judge_fail(text):
    for response in (text, boxed(text), f"The answer is {text}"):
        for label in ("7", r"\sqrt{2}", "x^2", "(1, 2)", "Yes", r"\{1, 2\}", "11:00"):
            judge(response, label)


PIECES = st.sampled_from(
    [
        *r"{}()[]^_12xei+-*/,;=<|!$:.&'",
        *(r"\frac", r"\sqrt", r"\pi", r"\leq", r"\cup", r"\in", r"\text", r"\left", r"\%", r"\\"),
        *(r"\begin{pmatrix}", r"\end{pmatrix}", r"\infty", r"\log", r"\sin", r"\pm", r"\overline"),
        *(r"\circ", r"\boxed", "9^9^9", "10", "0", " "),
    ]
)


@given(st.lists(PIECES, max_size=25).map("".join))
def test_no_broken_latex_makes_the_judge_fail(text):
    for label in ("7", r"\sqrt{2}+1", "x^2+1", "(1,2)", r"x \in [0, 1)"):
        judge(boxed(text), label)
        judge(f"It is ${text}$", label)


@given(st.lists(st.integers(0, 99), min_size=1, max_size=5), st.sampled_from(["```", "~~~~"]))
def test_the_last_box_outside_code_is_the_answer(values, fence):
    text = "".join(
        f"I think \\boxed{{{v}}} now.\n{fence}python\n\\boxed{{777}}\n{fence}\n" for v in values
    )
    assert final_answer(text) == str(values[-1])
    assert final_answer(f"{text}{fence}\n\\boxed{{888}}") == str(values[-1])
    assert "777" not in outside_code(text)


@pytest.mark.parametrize("digits", [5_000, 40_000])
def test_a_number_of_any_length_equals_itself_and_no_other(digits):
    label = "3" * digits
    assert judge(boxed(label), label).correct
    assert not judge(boxed(label + "3"), label).correct
    assert not judge(boxed(label[:-1] + "4"), label).correct
    assert not judge(f"the answer is {label}", "7").correct

"""Forms in which answers and labels are written: each line is (label, answer in the box)."""

import pytest

from openrlhf_alp.rewards.labels import LabelNotParsableError
from openrlhf_alp.rewards.verify import judge, label_text

EQUAL = [
    ("1/2", "0.5"),
    ("1/3", "0.3333333333333333"),
    ("1/3", r"0.\dot{3}"),
    ("1/7", r"0.\overline{142857}"),
    ("1/7", "0.(142857)"),
    ("4/3", r"1.\bar{3}"),
    ("0.3", "0.30000000000000004"),
    ("1e-20", "1.0e-20"),
    ("6.02e23", r"6.02 \times 10^{23}"),
    (r"6.02 \times 10^{23}", "6.02E+23"),
    ("-3/2", "-1.5"),
    ("17", "17."),
    ("17", "17.0"),
    ("17", "{ 17 }"),
    ("17", "~17~"),
    ("17", "17\\"),
    ("17", "$17$"),
    ("12345", r"12\,345"),
    ("12345", "12 345"),
    ("12345", "12{,}345"),
    ("12345", "12,345"),
    ("12345", "12'345"),
    ("12345", r"12\;345"),
    ("12345", r"12\ 345"),
    ("1234567", r"1\,234\,567"),
    ("3.14", "3{,}14"),
    ("9", "\u20ac9"),
    ("9", "\u00a39"),
    ("9", "9\u20ac"),
    ("9", "9 \u20ac"),
    ("9", "\u00a59"),
    ("9", r"\pounds 9"),
    ("9", "9 dollars"),
    ("9", "USD 9"),
    ("-9", r"-\$9"),
    ("9.50", r"\text{\$}9.50"),
    ("9", "\\text{\u20ac}9"),
    ("9", r"\text{9 euros}"),
    (r"5 \text{ km}", r"5 \text{ kilometers}"),
    ("5", r"5\,\mathrm{km/h}"),
    ("5", r"5\ \text{kg}\cdot\text{m}/\text{s}^2"),
    ("12", r"12\text{ cm}^{2}"),
    ("12", "12 cm^2"),
    ("12", "12 square meters"),
    ("12", r"12\,\mathrm{m}^2"),
    ("12", r"12\mathrm{m}"),
    ("60", "60\u00b0"),
    ("60", r"60^{\circ}"),
    ("60", r"60\degree"),
    ("100", r"100^\circ\text{C}"),
    (r"35\%", "35"),
    (r"35\%", "0.35"),
    ("35", "35 percent"),
    ("35", r"35\text{ percent}"),
    ("35", r"35\,\%"),
    (r"12.5\%", r"\frac{1}{8}"),
    ("e^2", r"\mathrm{e}^2"),
    ("e^2", r"\mathrm{e}^{2}"),
    (r"2\pi i", r"2\pi\mathrm{i}"),
    (r"\pi", r"\mathrm{\pi}"),
    ("3+4i", r"4\mathrm{i}+3"),
    ("3+4i", r"3+4\text{i}"),
    ("3+4i", "3+4j"),
    ("3+4i", r"3+4\imath"),
    ("Yes", "yes"),
    ("Yes", r"\text{Yes}"),
    ("Yes", r"\textbf{Yes}"),
    ("Yes", "YES."),
    ("B", r"\text{B}"),
    ("B", "(B)"),
    ("B", "B."),
    ("B", r"\mathbf{B}"),
    ("B", r"\mathrm{(B)}"),
    ("(B)", "B"),
    (r"\text{(B)}", r"\textbf{(B)} 12"),
    ("xy", "xy"),
    ("xy", "yx"),
    ("xy", "x y"),
    ("xy", r"x \cdot y"),
    ("Alice", r"\text{Alice}"),
    ("Alice and Bob", "Alice and Bob"),
    ("Alice and Bob", r"\text{Alice and Bob}"),
    ("New York", r"\text{New York}"),
    ("east", r"\text{East}"),
    ("11:00", "11:00"),
    ("11:00", r"11\!:\!00"),
    ("11:00", "11{:}00"),
    ("11:00", r"11:00 \text{ AM}"),
    ("11:00", "11:00 a.m."),
    (r"7:05 \text{ p.m.}", "7:05 PM"),
    ("3:4", "3:4"),
    ("3:4", "6:8"),
    ("3:4", r"\frac{3}{4}"),
    (r"\[7\]", "7"),
    ("$$7$$", "7"),
    (r"\(7\)", "7"),
    (r"\(\frac12\)", "0.5"),
    (r"2\frac{2}{3}", "2 2/3"),
    (r"2\frac{2}{3}", r"\frac{8}{3}"),
    (r"\frac{8}{3}", r"2\tfrac23"),
    (r"2\sqrt{2}", r"\sqrt{8}"),
    (r"2\sqrt{2}", "2.828427"),
    (r"2\sqrt{2}", "2.8284271247461903"),
    (r"\sqrt{2}+\sqrt{3}", r"\sqrt{5+2\sqrt{6}}"),
    (r"\sqrt{2}+\sqrt{3}", "3.14626436994"),
    (r"\sqrt[3]{2}", "2^{1/3}"),
    (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"),
    (r"\log_2 3", r"\frac{\ln 3}{\ln 2}"),
    (r"\ln 6", r"\ln 2 + \ln 3"),
    (
        r"\sqrt{2}+\sqrt{3}+\sqrt{5}+\sqrt{7}+\sqrt{11}",
        r"\sqrt{11}+\sqrt{7}+\sqrt{5}+\sqrt{5+2\sqrt{6}}",
    ),
    (r"\sin 30^\circ", r"\frac{1}{2}"),
    (r"\frac{\pi^2}{6}", "1.644934"),
    ("2^{100}", "1267650600228229401496703205376"),
    ("100!", "100!"),
    ("x+1", "1+x"),
    ("x^2", "|x|^2"),
    (r"\sin(2x)", r"2\sin x\cos x"),
    (r"\frac{x^2-1}{x-1}", "x+1"),
    ("ce^{-2x}", "c e^{-2x}"),
    ("n(n+1)/2", r"\frac{n^2+n}{2}"),
    (r"\binom{n}{2}", r"\frac{n(n-1)}{2}"),
    ("(n+1)!", "(n+1)n!"),
    ("(-1)^n", r"\cos(n\pi)"),
    (r"\lfloor n/2 \rfloor", r"\left\lfloor \frac{n}{2} \right\rfloor"),
    ("y=2x+3", "2x-y+3=0"),
    ("y=2x+3", "2x+3"),
    ("x^2+y^2=25", "2x^2+2y^2=50"),
    ("x>2", "2<x"),
    ("x>2", r"(2,\infty)"),
    (r"(2,\infty)", "x>2"),
    ("[1,3)", r"1 \le x < 3"),
    (r"x \ne 2", r"(-\infty,2)\cup(2,\infty)"),
    (r"x<1 \text{ or } x>3", r"(-\infty,1)\cup(3,\infty)"),
    (r"(-\infty,1)\cup(3,\infty)", r"(3,\infty)\cup(-\infty,1)"),
    ("1,2", "2,1"),
    ("1,2", r"1 \text{ and } 2"),
    ("1,2", "1 or 2"),
    ("1,2", r"\{1,2\}"),
    ("(1,2)", "1,2"),
    ("(1,2)", "(1, 2)"),
    ("(1,2)", r"\left(1,2\right)"),
    ("(1,2)", r"\langle 1,2\rangle"),
    ("(1,2)", "x=1,y=2"),
    (r"\pm 3", "3,-3"),
    (r"1\pm\sqrt2", r"1+\sqrt2, 1-\sqrt2"),
    (r"\emptyset", r"\varnothing"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,2)"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"),
    ("7", r"7 \text{ (approximately)}"),
    ("0", "0"),
    ("0", "-0"),
    ("5", "10/2"),
    ("1000", "10^3"),
    ("1000", "1e3"),
    ("0.5", ".5"),
    ("0.5", "1/2"),
    ("1,000", "1000"),
    ("1,000,000", "10^6"),
    ("2 hours", r"2 \text{ hrs}"),
    ("x=3", "x = 3"),
    ("x=1, 2", "x=2, 1"),
    (r"\infty", r"+\infty"),
    (r"\frac{3}{4}\pi", r"\frac{3\pi}{4}"),
    (r"7\times10^{-3}", "0.007"),
    ("2.5", r"2\frac12"),
    (r"144\pi", r"144\pi \text{ cm}^3"),
    (r"1\frac{1}{2} \text{ hours}", "1.5"),
    (r"\text{even}", "even"),
    ("0.1", "0.10000000000000001"),
    ("2/3", "0.666667"),
    (r"\frac{a}{b}", "a/b"),
    ("f(x)=x^2", "x^2"),
    ("3.0", "3"),
    ("33.3", "33.30"),
    ("A, B", "B, A"),
    (r"10\%", "10"),
    ("2:30", "2:30 pm"),
]

DIFFERENT = [
    ("1/3", "0.333"),
    (r"\frac{1}{3^{40}}", r"\frac{1}{3^{41}}"),
    ("10^{-30}", r"2 \times 10^{-30}"),
    ("0.0000001", "0.0000002"),
    (r"\$9", "\u20ac9"),
    (r"5 \text{ km}", r"5 \text{ m}"),
    ("0.35", r"0.35\%"),
    (r"2\pi", r"2\uppi"),
    ("3+4i", "3-4i"),
    ("Yes", "No"),
    ("B", "D"),
    ("B", "b"),
    ("xy", "xz"),
    ("Alice", "Bob"),
    ("east", "seat"),
    ("11:00", "11:30"),
    ("11:00 am", "11:00 pm"),
    ("7:05", "7:50"),
    ("3:4", "4:3"),
    (r"\frac{4}{3}", r"2\frac{2}{3}"),
    ("2", r"2\frac{2}{3}"),
    (r"2\sqrt{2}", "2.83"),
    (r"\sqrt{10^{40}+1}", "10^{20}"),
    (r"e^{\pi\sqrt{163}}", "262537412640768744"),
    ("e^{10000}", "e^{10000}+1"),
    (r"\pi+10^{200}", r"\pi+10^{200}+10^{-200}"),
    (r"\ln(10^{300}+1)", r"\ln(10^{300})"),
    (r"\sin(10^{-200})", "10^{-200}"),
    (r"\cos\frac{\pi}{7}", r"\cos\frac{\pi}{8}"),
    ("2^{100}", "1267650600228229401496703205377"),
    ("x+1", "x+2"),
    ("X", "x"),
    ("x'", "x"),
    ("|x|", "x"),
    (r"\ln x^2", r"2\ln x"),
    ("y=2x+3", "y=2x+4"),
    ("x^2+y^2=25", "x^2+y^2=24"),
    ("x>2", "x<2"),
    ("x>2", r"x\ge 2"),
    ("1,2", "1,2,3"),
    ("(1,2)", "(2,1)"),
    (r"\pm 3", "3"),
    (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"\frac{dM}{dt}", r"\frac{M}{t}"),
    ("5", "5!"),
    ("0", "10^{-100}"),
    ("50", "50,0"),
    ("x=3", "y = 3"),
    (r"-\infty", r"\infty"),
    (r"20 \text{ minutes}", r"20 \text{ seconds}"),
    ("123456789", "123456788"),
    ("99999999999999999999", "99999999999999999998"),
    (r"\frac{1}{10^{50}}", r"\frac{1}{10^{50}+1}"),
    ("2/3", "0.667"),
]

TO_BE_WORKED_OUT = [
    ("0", r"\sqrt{2}-\sqrt{2}"),
    ("1", r"\sin^2 x + \cos^2 x"),
    ("7", "3 + 4"),
    ("12", "3(4)"),
    ("7", r"3 + 4 = 2 + 5"),
]


def boxed(answer):
    return f"So $\\boxed{{{answer}}}$."


@pytest.mark.parametrize(("label", "answer"), EQUAL)
def test_the_answer_is_the_label_in_another_form(label, answer):
    assert judge(boxed(answer), label).correct


@pytest.mark.parametrize(("label", "answer"), DIFFERENT)
def test_the_answer_is_not_the_label(label, answer):
    verdict = judge(boxed(answer), label)
    assert verdict.answered and not verdict.correct and not verdict.unevaluated


@pytest.mark.parametrize(("label", "answer"), TO_BE_WORKED_OUT)
def test_what_is_left_to_work_out_earns_nothing(label, answer):
    verdict = judge(boxed(answer), label)
    assert verdict.unevaluated and not verdict.correct


@pytest.mark.parametrize(("label", "_"), [*EQUAL, *DIFFERENT])
def test_a_label_equals_itself(label, _):
    assert judge(boxed(label), label).correct


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("so \\fbox{42}", "42"),
        (r"so \boxed{5}. Wait, I lost one: \boxed{6}", "6"),
        (r"\boxed{35 cm} ++++++ \boxed{4}", "4"),
        (r"\boxed{4}" "\n" r"\boxed{5}", "5"),
        ("\\boxed{4}\n```python\nprint(2+3)\n```\n\\boxed{5}", "5"),
        (r"first \boxed{5}, and cut off: \boxed{\frac{1}", "5"),
        ("The answer is 2 2/3", r"\frac{8}{3}"),
        ("The answer is: **Yes**.", "Yes"),
        ("Answer: B", "B"),
        ("The answer is 12 apples, as shown above.", "12"),
        ("The total is $1,234.50 for both.", "1234.5"),
        ("#### 72", "72"),
        ("Final answer:\n\n$x = 3$", "3"),
        ("1 234 567", "1234567"),
        (r"either $\boxed{3}$, $\boxed{5}$ or $\boxed{7}$", "3, 5, 7"),
        ("The values are 1331 and 1728.", "1331, 1728"),
    ],
)
def test_the_final_answer_of_a_text(response, answer):
    assert judge(response, answer).correct


@pytest.mark.parametrize(
    ("response", "label"),
    [
        ("The answer is 2 2/3", "2"),
        ("Check.\n```python\n# answer \\boxed{5}\nprint(1)", "5"),
        ("~~~\n\\boxed{5}\n~~~\nI stop.", "5"),
        (r"\boxed{5} \boxed{6}", "5"),
        (r"\boxed{5}, or maybe \boxed{6}", "5"),
        (r"\boxed{4}" "\n" r"\boxed{5}", "4, 5"),
    ],
)
def test_what_is_not_the_final_answer_earns_nothing(response, label):
    assert not judge(response, label).correct


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        (5, "5"),
        (5.0, "5"),
        (0.5, r"\frac12"),
        (1e-7, r"10^{-7}"),
        (["1/2", "0.5"], "0.5"),
        ('["4"]', "4"),
    ],
)
def test_labels_that_are_no_text_are_read_when_their_meaning_is_plain(value, answer):
    assert judge(boxed(answer), value).correct


def test_numpy_labels_are_read_like_pythons():
    numpy = pytest.importorskip("numpy")
    for value in (numpy.int64(5), numpy.float32(5), numpy.array(["5", "5.0"]), numpy.str_("5")):
        assert judge(boxed("5"), value).correct


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "empty"),
        ([], "empty"),
        (True, "truth value True"),
        (float("nan"), "nan"),
        ({"value": "7"}, "fields value"),
        ('{"value": "7"}', "fields value"),
        (["1", "2"], "'1', '2'.*not equal"),
        (b"\xff", "bytes"),
    ],
)
def test_a_label_without_a_plain_meaning_is_named(value, message):
    with pytest.raises(LabelNotParsableError, match=message):
        label_text(value)

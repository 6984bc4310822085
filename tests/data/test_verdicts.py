from openrlhf_alp.data.verdicts import Comparison, Verdict, compare

HANGS = r"\sum_{k=1}^{100000000} \frac{1}{k^3+k}"
"""Minutes of work in C code, unless the answer is this very text."""


def test_equal_answers_are_equal_and_verdicts_come_in_order():
    verdicts = compare(
        [
            Comparison(answer="1/2", label="\\frac{1}{2}"),
            Comparison(answer="8", label="7"),
            Comparison(answer="3 + 4", label="7"),
            Comparison(answer="2, 1", label="1, 2"),
        ],
        num_workers=2,
    )
    assert verdicts == [
        Verdict(equal=True),
        Verdict(equal=False),
        Verdict(equal=True),
        Verdict(equal=True),
    ]


def test_a_comparison_that_hangs_is_given_up_and_the_next_one_is_made():
    given_up, made = compare(
        [Comparison(answer="7", label=HANGS), Comparison(answer="7", label="7")],
        num_workers=1,
        timeout_s=6.0,
    )
    assert (given_up.equal, given_up.unavailable) == (False, "timeout")
    assert made == Verdict(equal=True)


def test_a_label_that_is_no_mathematics_is_named():
    (verdict,) = compare([Comparison(answer="???", label="???")], num_workers=1)
    assert (verdict.equal, verdict.unavailable) == (False, "label_not_parsable")

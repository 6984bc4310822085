import pytest

from openrlhf_alp.data.labels import LabelKind, label_kind, label_texts


@pytest.mark.parametrize(
    ("given", "bare"),
    [
        ("48/2 = <<48/2=24>>24 clips.\n#### 2,125", "2,125"),
        (145.0, "145"),
        (0.5, "0.5"),
        (7, "7"),
        (r"$\boxed{\frac{1}{2}}$", r"\frac{1}{2}"),
        (r"\boxed{1} and \boxed{2}", r"\boxed{1} and \boxed{2}"),
        ("$69$,$84$", "69, 84"),
        (r"$(0, 1) \cup (2, 3)$.", r"(0, 1) \cup (2, 3)"),
        (r"\$32", "32"),
        (r"1,\!000", "1,000"),
        ("7e37", r"7 \times 10^{37}"),
        ("3.3E-10", r"3.3 \times 10^{-10}"),
        ("p - q", "p - q"),
        ("even", "even"),
    ],
)
def test_an_answer_is_freed_of_what_stands_around_it(given, bare):
    assert label_texts(given) == (bare,)


@pytest.mark.parametrize("nothing", [None, "", "  ", [], [None, ""]])
def test_no_answer_is_no_label(nothing):
    assert label_texts(nothing) == ()


def test_a_list_gives_each_of_its_different_members_once():
    assert label_texts(["4", " 4\n", "$5$"]) == ("4", "5")


@pytest.mark.parametrize(
    ("label", "kind"),
    [
        ("-12", LabelKind.INTEGER),
        ("1,234,567", LabelKind.INTEGER),
        ("0.25", LabelKind.DECIMAL),
        (r"\frac{3}{4}", LabelKind.FRACTION),
        ("-3/4", LabelKind.FRACTION),
        (r"\text{(B)}", LabelKind.CHOICE),
        ("y = 2x + 1", LabelKind.EQUATION),
        ("(1, 2)", LabelKind.TUPLE),
        ("[0, 1)", LabelKind.TUPLE),
        ("1, 2, 3", LabelKind.SEVERAL),
        (r"\text{even}", LabelKind.TEXT),
        (r"2\sqrt{3}", LabelKind.EXPRESSION),
    ],
)
def test_labels_are_told_apart_by_kind(label, kind):
    assert label_kind(label) is kind

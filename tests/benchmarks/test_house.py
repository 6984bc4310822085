"""The figures of a tree that is small enough to count by hand."""

from pathlib import Path

import pytest

from benchmarks import house

FIRST = '''\
#!/usr/bin/env python
"""A module."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from openrlhf_alp.b import Thing  # noqa: F401


def run(values):
    # The first value wins.
    total = 0
    for value in values:
        total += value
        if total > 3:
            return total
    raise ValueError("too little")
'''
SECOND = '''\
def late():
    from . import a  # the other half of a circle

    return a


def summed(parts):
    """Other names, the same lines."""
    amount = 100

    for part in parts:
        amount += part
        if amount > 7:  # not code
            return amount
    raise ValueError("not enough")
'''
ALONE = "import openrlhf_alp.a\n"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Three files with lines and two empty ones in the source, one test."""
    for name, text in {
        "openrlhf_alp/__init__.py": "",
        "openrlhf_alp/a.py": FIRST,
        "openrlhf_alp/b.py": SECOND,
        "services/__init__.py": "",
        "services/alone.py": ALONE,
        "tests/test_a.py": FIRST,
        "README.md": "not Python",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_table_has_the_numbers_that_one_counts_by_hand(tree):
    """17 + 15 + 1 = 33 source lines, 4 of them imports, 3 comments that are not for a tool; with
    the test 50 lines, in which a, b and the test repeat each other, a and the test to the letter.
    """
    measured = {name: value for name, value, _ in house.figures(tree)}
    assert measured == {
        "import circles, TYPE_CHECKING included": "1",
        "functions over 60 lines": "0",
        "longest file": "17  openrlhf_alp/a.py",
        "files with a line, per 1,000 lines": "90.9",
        "import lines": "12.1%",
        "comments per 1,000 lines": "90.9",
        "flat folder with the most files": "3  openrlhf_alp",
        "source lines": "33",
        "pairs that repeat, per 1,000 lines": "60.00",
        "identical pairs, per 1,000 lines": "20.00",
    }


def test_a_circle_is_found_under_type_checking_and_inside_functions(tree):
    files = house.read_files(tree, house.SOURCE)
    assert house.import_circles(files) == [{"openrlhf_alp.a", "openrlhf_alp.b"}]


def test_a_function_is_long_from_61_lines_on(tree):
    body = "".join(f"    x{n} = {n}\n" for n in range(59))
    (tree / "services/alone.py").write_text(
        f"def short():\n{body}\n\ndef long():\n{body}    pass\n"
    )
    files = house.read_files(tree, house.SOURCE)
    assert house.long_functions(files) == ["services/alone.py:63"]


def test_a_repeat_is_named_by_both_places(tree):
    """Docstrings, comments and empty lines between the repeated lines do not matter."""
    pairs = house.repeats(house.read_files(tree, house.EVERYTHING), house.shape)
    assert pairs["openrlhf_alp/a.py", "openrlhf_alp/b.py"] == (10, "openrlhf_alp/b.py:7")


def test_a_run_in_more_than_eight_places_does_not_count(tree):
    for number in range(7):
        (tree / f"tests/copy_{number}.py").write_text(FIRST)
    assert house.repeats(house.read_files(tree, house.EVERYTHING), house.shape) == {}


def test_a_list_of_fields_is_no_repeat(tree):
    for name in ("one", "two"):
        fields = "".join(f"    {name}_{n}: int\n" for n in range(8))
        (tree / f"tests/{name}.py").write_text(f"class {name.title()}:\n{fields}")
    pairs = house.repeats(house.read_files(tree, ["tests"]), house.shape)
    assert pairs == {}


def test_the_shape_of_a_line_keeps_what_the_language_means():
    assert house.shape('if count > 3 and name == "a b":') == 'if.x>0and.x==":'

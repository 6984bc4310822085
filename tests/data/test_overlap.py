"""What of a benchmark is found in a data set."""

from openrlhf_alp.data.overlap import Place, find_overlaps, ngrams, words

BENCHMARK = [
    (
        "long",
        "A train leaves the station at 9 and reaches the next town, 120 km away, at 11 sharp.",
    ),
    ("short", "What is $3 + 4$?"),
]


def found(*texts: str) -> list[tuple[str, int, bool, int]]:
    places = [Place(source="s", row=i, text=text) for i, text in enumerate(texts, start=1)]
    return [
        (one.benchmark_id, one.place.row, one.same_text, one.shared_ngrams)
        for one in find_overlaps(places, "own", BENCHMARK)
    ]


def test_words_are_compared_without_typography():
    assert words("The $X_1$-axis, \\frac{1}{2}!") == ["the", "x", "1", "axis", "frac", "1", "2"]
    assert len(ngrams("one two three", size=2)) == 2 and ngrams("one two") == set()


def test_a_copy_with_other_spaces_and_dollar_signs_is_the_same_text():
    assert found("Another.", "what is 3+4?") == [("short", 2, True, 0)]


def test_an_adapted_copy_shares_runs_of_thirteen_words():
    """The benchmark has 18 words, so 6 runs; the copy keeps its first 13, up to 120."""
    adapted = "A TRAIN leaves the station at 9 and reaches the next town, 120 miles later."
    assert len(ngrams(BENCHMARK[0][1])) == 6
    assert found(adapted) == [("long", 1, False, 1)]
    assert found(BENCHMARK[0][1].upper()) == [("long", 1, True, 6)]


def test_twelve_words_in_common_are_no_overlap():
    assert found("A train leaves the station at 9 and reaches the next town by noon.") == []

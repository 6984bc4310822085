"""Finds problems of one set in another: by normalised text, and by runs of 13 words.

A training set that holds a benchmark's problems makes its numbers worthless. Copies differ in
typography, so texts are compared without it; adapted copies still share long runs of words. 13 is
the length that GPT-3's study of contamination uses (Brown et al., arXiv 2005.14165, appendix C).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openrlhf_alp.data.prepare import problem_key

NGRAM_WORDS = 13
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A problem and where it stands."""

    source: str
    row: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """A problem of the data that a benchmark also has, or shares a run of words with."""

    suite: str
    benchmark_id: str
    place: Place
    same_text: bool
    """Equal but for spaces, dollar signs and bracket sizes."""

    shared_ngrams: int
    """Number of different runs of 13 words that both hold."""

    benchmark_ngrams: int
    """Number of different runs of 13 words of the benchmark's problem."""

    def to_json(self) -> dict[str, Any]:
        """A line of the overlaps file."""
        return {
            "suite": self.suite,
            "benchmark_id": self.benchmark_id,
            "source": self.place.source,
            "row_number": self.place.row,
            "same_text": self.same_text,
            "shared_ngrams": self.shared_ngrams,
            "benchmark_ngrams": self.benchmark_ngrams,
            "problem": self.place.text,
        }


def words(text: str) -> list[str]:
    """Letters and digits of a text as lower-case words, without typography."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def ngrams(text: str, size: int = NGRAM_WORDS) -> set[tuple[str, ...]]:
    """The different runs of `size` words; none where the text is shorter."""
    found = words(text)
    return {tuple(found[start : start + size]) for start in range(len(found) - size + 1)}


def find_overlaps(
    data: Iterable[Place], suite: str, benchmark: Sequence[tuple[str, str]]
) -> Iterator[Overlap]:
    """Overlaps in the order of the data.

    Args:
        suite: name of the benchmark, for the report.
        benchmark: id and text of each of its problems.
    """
    by_key: dict[str, list[str]] = {}
    by_ngram: dict[tuple[str, ...], set[str]] = {}
    num_ngrams: dict[str, int] = {}
    for name, text in benchmark:
        by_key.setdefault(problem_key(text).casefold(), []).append(name)
        runs = ngrams(text)
        num_ngrams[name] = len(runs)
        for run in runs:
            by_ngram.setdefault(run, set()).add(name)
    for place in data:
        same = by_key.get(problem_key(place.text).casefold(), [])
        shared = _shared(place.text, by_ngram)
        for name in dict.fromkeys([*same, *shared]):
            yield Overlap(
                suite=suite,
                benchmark_id=name,
                place=place,
                same_text=name in same,
                shared_ngrams=shared.get(name, 0),
                benchmark_ngrams=num_ngrams[name],
            )


def _shared(text: str, by_ngram: Mapping[tuple[str, ...], set[str]]) -> dict[str, int]:
    """How many runs of words a text shares with each problem that has any of them."""
    counts: dict[str, int] = {}
    for run in ngrams(text):
        for name in by_ngram.get(run, ()):
            counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items(), key=lambda one: -one[1]))

"""What a preparation found, in numbers."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from openrlhf_alp.data.labels import label_kind
from openrlhf_alp.data.prepare import Prepared


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLengths:
    """Tokens of the kept prompts."""

    shortest: int
    median: float
    p95: int
    longest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Counts of one preparation. `rows_read` is `rows_kept` plus all of `rejected`."""

    template: str
    train_flags: str
    """The flags of train_ppo_ray that go with the file."""

    formats: Mapping[str, str]
    """Source -> name of the format that was used."""

    rows_read: int
    rows_kept: int
    rejected: Mapping[str, int]
    """Reason -> rows."""

    kept_by_datasource: Mapping[str, int]
    label_kinds: Mapping[str, int]
    """Of the kept rows."""

    instructions_cut: int
    """Kept rows that came with an instruction on the form of the answer; it was cut."""

    prompt_tokens: TokenLengths | None
    """None when no tokenizer was given, or nothing was kept."""

    def to_json(self) -> dict[str, Any]:
        """The content of the summary file."""
        return asdict(self)


def summarise(
    prepared: Prepared, *, template: str, train_flags: str, formats: Mapping[str, str]
) -> Summary:
    """Counts rows by what became of them."""
    prompts = prepared.prompts
    return Summary(
        template=template,
        train_flags=train_flags,
        formats=dict(formats),
        rows_read=len(prompts) + len(prepared.rejected),
        rows_kept=len(prompts),
        rejected=_counts(one.reason.value for one in prepared.rejected),
        kept_by_datasource=_counts(prompt.problem.datasource for prompt in prompts),
        label_kinds=_counts(label_kind(prompt.problem.label).value for prompt in prompts),
        instructions_cut=sum(prompt.problem.had_instructions for prompt in prompts),
        prompt_tokens=_lengths([p.num_tokens for p in prompts if p.num_tokens is not None]),
    )


def _counts(names: Any) -> dict[str, int]:
    """The most frequent first."""
    return dict(Counter(names).most_common())


def _lengths(counts: Sequence[int]) -> TokenLengths | None:
    if not counts:
        return None
    ordered = sorted(counts)
    return TokenLengths(
        shortest=ordered[0],
        median=statistics.median(ordered),
        p95=ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))],
        longest=ordered[-1],
    )

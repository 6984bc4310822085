"""A replay as tables for people, each at most 80 characters wide."""

from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table

from openrlhf_alp.replay.bench.update import MethodResult

_GIGABYTE = 1e9
_TAILS = ("p01", "p99")


def method_tables(results: Iterable[MethodResult]) -> tuple[Table, Table]:
    """What each method sees before its update, and what the update does; one row per method.

    Log-ratios are learner over rollout engine, of single tokens. Methods that make the same update
    have its figures once.
    """
    rows = list(results)
    before = _table(
        "before the update, with the noise of the method",
        ("method", "loss", "ESS", "P1", "P99", "clip", "mask"),
        map(_before, rows),
    )
    after = _table(
        "the update, and the log-ratio of tokens after it",
        ("method", "|grad|", "cos", "P1", "P99", "KL", "s", "GB"),
        map(_after, rows),
    )
    return before, after


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _before(result: MethodResult) -> list[str]:
    figures, cuts = result.before, result.cuts
    return [
        result.method,
        f"{result.loss:+.4f}",
        f"{figures['alp/token_ess']:.3f}",
        *(f"{figures[f'alp/log_ratio_{q}']:+.3f}" for q in _TAILS),
        _percent(cuts["clip_fraction"] + cuts["dual_clip_fraction"]),
        _percent(cuts["mask_fraction"]),
    ]


def _after(result: MethodResult) -> list[str]:
    if result.same_as is not None:
        return [result.method, f"= {result.same_as}"]
    return [
        result.method,
        f"{result.gradient_norm:.3g}",
        f"{result.cosine:.3f}",
        *(f"{result.after[f'alp/log_ratio_{q}']:+.3f}" for q in _TAILS),
        f"{result.kl_after:.2e}",
        f"{result.seconds:.0f}",
        f"{result.peak_bytes / _GIGABYTE:.1f}",
    ]


def _percent(share: float) -> str:
    return f"{share:.1%}"

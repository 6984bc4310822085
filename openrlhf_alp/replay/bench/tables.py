"""A replay and an explanation as tables for people."""

from collections.abc import Iterable, Sequence

from rich.table import Table

from openrlhf_alp.replay.bench.update import MethodResult

_GIGABYTE = 1e9


def method_table(results: Iterable[MethodResult]) -> Table:
    """One row per method. Log-ratios are learner over rollout engine, of single tokens."""
    table = Table(
        caption="log-ratios of tokens: learner as it is trained (with its noise) / rollout"
    )
    for column in (
        "method", "loss", "|grad|", "cos", "ESS", "clip", "mask", "P1", "P99", "P1 after",
        "P99 after", "KL after", "s", "GB",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for result in results:
        table.add_row(*method_row(result))
    return table


def method_row(result: MethodResult) -> list[str]:
    """The cells of `method_table` for one method."""
    before, after, cuts = result.before, result.after, result.cuts
    same = "" if result.same_as is None else f" = {result.same_as}"
    return [
        f"{result.method}{same}",
        f"{result.loss:+.4f}",
        f"{result.gradient_norm:.3g}",
        f"{result.cosine:.3f}",
        f"{before['alp/token_ess']:.3f}",
        _percent(cuts["clip_fraction"] + cuts["dual_clip_fraction"]),
        _percent(cuts["mask_fraction"]),
        *(f"{before[f'alp/log_ratio_{q}']:+.3f}" for q in ("p01", "p99")),
        *(f"{after[f'alp/log_ratio_{q}']:+.3f}" for q in ("p01", "p99")),
        f"{result.kl_after:.2e}",
        "-" if result.same_as else f"{result.seconds:.0f}",
        f"{result.peak_bytes / _GIGABYTE:.1f}",
    ]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table for a document."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _percent(share: float) -> str:
    return f"{share:.1%}"

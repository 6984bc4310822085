"""How `replay --explain` and `preflight --explain` show an explanation."""

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from openrlhf_alp.replay.explain.explain import Explanation
    from openrlhf_alp.replay.files.records import RecordedBatch
    from openrlhf_alp.replay.learner import Learner

_COLORS = {"likely": "red", "ok": "green", "unlikely": "green", "not tested": "yellow"}


def explain_model(
    batch: "RecordedBatch",
    model: str,
    *,
    device: str = "cpu",
    learner: "Learner | None" = None,
    on_stage: Callable[[str], None] = lambda line: None,
) -> "Explanation":
    """Explain `batch` with the weights of a model folder or id.

    Args:
        learner: the model in float32, without noise, if it is loaded already.

    Raises:
        ValueError: the model cannot be loaded, or the batch has no action token.
    """
    # Here and not above: torch and transformers take seconds to import.
    import torch

    from openrlhf_alp.replay.explain.explain import explain
    from openrlhf_alp.replay.learner import Learner, load_model, load_tokenizer

    def load(dtype: torch.dtype) -> Learner:
        loaded = load_model(model, dtype=dtype, device=device)
        return Learner(loaded, temperature=batch.info.temperature)

    return explain(learner or load(torch.float32), batch, load_tokenizer(model), load, on_stage)


def show(explanation: "Explanation", console: Console) -> None:
    """Three tables: classes of tokens, layers, hypotheses."""
    console.print(_classes(explanation))
    console.print(_layers(explanation))
    console.print(_hypotheses(explanation))


def explanation_json(explanation: "Explanation") -> dict[str, Any]:
    """The same for machines."""
    return asdict(explanation)


def _table(title: str) -> Table:
    """Without lines between columns: readable in a terminal of 80 characters."""
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))


def _classes(explanation: "Explanation") -> Table:
    table = _table("where: clean learner over rollout engine, by class of token")
    for column in ("", "tokens", "k3 KL", "of KL", "mean", "P1", "P99"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    view = ""
    for row in explanation.classes:
        if row.view != view:
            view = row.view
            table.add_section()
            table.add_row(f"[bold]{view}[/]")
        table.add_row(
            f"  {row.name}",
            str(row.num_tokens),
            f"{row.k3_kl:.2e}",
            f"{row.share:.1%}",
            f"{row.mean:+.4f}",
            f"{row.p01:+.3f}",
            f"{row.p99:+.3f}",
        )
    return table


def _layers(explanation: "Explanation") -> Table:
    table = _table(f"layers: KL of one part's rounding alone, {explanation.num_samples} samples")
    for column in ("part", "k3 KL", "relative error of its output"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for row in explanation.layers:
        table.add_row(row.layer, f"{row.k3_kl:.2e}", f"{row.relative_error:.2e}")
    return table


def _hypotheses(explanation: "Explanation") -> Table:
    table = _table("why: one thing changed at a time")
    for column in ("cause", "verdict", "figure", "switch"):
        table.add_column(column, overflow="fold")
    for row in explanation.hypotheses:
        verdict = f"[{_COLORS[row.verdict]}]{row.verdict}[/]"
        table.add_row(row.name, verdict, row.figure, row.switch)
    return table

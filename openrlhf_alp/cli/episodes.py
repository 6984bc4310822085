"""`openrlhf-alp episodes`: its options. The folder `report/episodes` does the work."""

import argparse
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape

from openrlhf_alp.report.metrics import BATCHES, RECIPE
from openrlhf_alp.report.visible import visible

if TYPE_CHECKING:
    from openrlhf_alp.replay.files.records import RecordedBatch
    from openrlhf_alp.report.episodes.ratios import Ratios

HELP = "show recorded episodes token by token, coloured by log-ratio"

DESCRIPTION = """\
Write one page per recorded step, which opens from disk without a network: the answers to a prompt
side by side, every token coloured, tool calls folded between, the reward and why, and the worst
tokens as a list that jumps. Training with --alp.record DIR records the steps.

With --model, the weights that a step updated, a token can be coloured by the log-ratio of learner
and rollout engine: total, clean, or what ALP's noise adds. Without it the colour is the engine's
surprise, and the texts come from the tokenizer of the model that the run started from.

  openrlhf-alp episodes runs/demo --out runs/demo/episodes
  openrlhf-alp episodes runs/batches/step-000001.parquet --model /models/policy
  openrlhf-alp episodes runs/batches --step 4 --model checkpoint --inspect

exit status: 0 written, 2 a file, model or option is not usable.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `openrlhf-alp episodes`."""
    add = parser.add_argument
    add("path", type=Path, help="a run folder, a folder of --alp.record, or a batch file")
    add("--model", metavar="DIR", help="folder or Hugging Face id of the weights before the update")
    add("--step", type=int, help="this step alone (default: all; with --model the first)")
    add("--out", type=Path, default=Path("runs/episodes"), help="folder (default: %(default)s)")
    add("--sigma0", type=float, help="noise relative to |h| (default: with the mismatch's KL)")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="(default: float32)")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--max-tokens", type=int, default=1024, help="tokens of a micro-batch (default: 1024)")
    add("--inspect", action="store_true", help="write each step as a log of Inspect as well")


def run(arguments: argparse.Namespace) -> int:
    """Writes the pages; returns 0, or 2 when something given is not usable."""
    console = Console()
    try:
        for page in _pages(arguments, console):
            where = f"{page} ({decimal(page.stat().st_size)})"
            console.print(f"[bold cyan]file[/]  {escape(visible(where))}", soft_wrap=True)
    except (ValueError, OSError) as error:
        console.print(f"[bold red]Not written.[/] {escape(visible(error))}", soft_wrap=True)
        return 2
    return 0


def _pages(arguments: argparse.Namespace, console: Console) -> Iterator[Path]:
    # Here and not above: torch and transformers take seconds to import.
    from openrlhf_alp.replay.learner import load_tokenizer
    from openrlhf_alp.report.episodes.page import write_page

    for path, batch in _batches(arguments, console):
        notes: list[str] = []
        source = arguments.model or batch.info.model
        tokenizer = load_tokenizer(source) if source else None
        if tokenizer is None:
            notes.append(
                f"There is no tokenizer in {source or 'the file'}, so tokens are shown as ids. "
                "Name a model folder with --model."
            )
        if arguments.model is None:
            notes.append(
                "Without --model the learner's log-probs are unknown, so the colour is the rollout "
                "engine's surprise alone."
            )
        with console.status("running the model") as status:
            ratios = _ratios(arguments, path, batch)
            status.update("writing the page")
            out = arguments.out / f"{path.stem}.html"
            page = write_page(batch, out, tokenizer=tokenizer, ratios=ratios, notes=notes)
        if arguments.inspect:
            yield _inspect_log(batch, out.with_suffix(".eval"))
        yield page


def _ratios(arguments: argparse.Namespace, path: Path, batch: "RecordedBatch") -> "Ratios | None":
    if arguments.model is None:
        return None
    from openrlhf_alp.report.episodes.ratios import measure_ratios

    return measure_ratios(
        batch,
        path,
        arguments.model,
        dtype=arguments.dtype,
        device=arguments.device,
        sigma0=arguments.sigma0,
        max_tokens=arguments.max_tokens,
    )


def _inspect_log(batch: "RecordedBatch", out: Path) -> Path:
    try:
        from openrlhf_alp.report.episodes.inspect_log import write_inspect_log
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--inspect needs {error.name}: pip install 'openrlhf-alp[evaluate]'"
        ) from error
    return write_inspect_log(batch, out)


def _batches(
    arguments: argparse.Namespace, console: Console
) -> Iterator[tuple[Path, "RecordedBatch"]]:
    """The batches that were asked for; what is wrong with others is said."""
    from openrlhf_alp.replay.files.read import find_files, read_all
    from openrlhf_alp.replay.files.records import RecordedBatch

    files, faults = find_files(recorded_in(arguments.path))
    found = 0
    for path, batch in read_all(files):
        if not isinstance(batch, RecordedBatch):
            faults += batch
        elif arguments.step in (None, batch.info.step):
            found += 1
            yield path, batch
            # The weights are those of one step.
            if arguments.model is not None:
                break
    for fault in faults:
        console.print(f"[bold yellow]note[/]  {escape(visible(fault))}", soft_wrap=True)
    if not found:
        wanted = "" if arguments.step is None else f" of step {arguments.step}"
        raise ValueError(
            f"{arguments.path} has no readable batch{wanted}. Training with --alp.record DIR (in a "
            "recipe run.record = true) writes them"
        )


def recorded_in(path: Path) -> Path:
    """Where a run has its batches; any other path is taken as it is.

    Raises:
        ValueError: the run has recorded none.
    """
    if not (path / RECIPE).is_file():
        return path
    if (path / BATCHES).is_dir():
        return path / BATCHES
    found: Any = _recipe(path / RECIPE)
    for key in ("train", "alp", "record"):
        found = found.get(key) if isinstance(found, dict) else None
    if not isinstance(found, str):
        raise ValueError(
            f"{path} has recorded no batches. Set run.record to true in its recipe and run it again"
        )
    return Path(found)


def _recipe(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} cannot be read ({error}), so it is unknown where the run recorded. Name the "
            "folder of the batches in place of the run"
        ) from error

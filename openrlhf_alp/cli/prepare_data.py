"""`openrlhf-alp prepare-data`: its options and what it shows. `data/prepare.py` does the work."""

from __future__ import annotations

import argparse
import itertools
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich import progress
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from openrlhf_alp.data import formats
from openrlhf_alp.data.sources import DataError, Row, SourceError, read_rows
from openrlhf_alp.data.templates import TEMPLATES, TokenCounter
from openrlhf_alp.launch.view import StageView

if TYPE_CHECKING:  # the modules behind them import sympy
    from openrlhf_alp.data.output import Summary
    from openrlhf_alp.data.overlap import Overlap
    from openrlhf_alp.data.pass_rates import PassRates
    from openrlhf_alp.data.prepare import OnProgress, Prompt

_DEFAULT_TEMPLATE = "chat-math"
_MAX_DEFAULT_WORKERS = 8
_LINE_EVERY_ROWS = 2000
"""Without a terminal, a line is written each time that this many labels have been checked."""


def _table(rows: Sequence[tuple[str, str, str]]) -> str:
    """Two lines for each: name and first text, then the second text below the first."""
    return "\n".join(f"  {name:<11} {first}\n{'':14}{second}" for name, first, second in rows)


HELP = "turn problem sets into prompts to train on"

DESCRIPTION = f"""\
Turns mathematical problem sets into prompts that OpenRLHF reads: JSON lines with input, label,
datasource and id. Several sets become one file, and a problem that two of them have is kept once.

A row is left out when it has no problem or no label, when an earlier row has the same problem, when
two rows give one problem different answers, when the reward cannot read its label or does not find
the label equal to itself, and when its prompt is too long. OUT.rejected.jsonl keeps each of these
rows with the reason, OUT.summary.json the counts. With --pass-rates, so are problems that the
policy always or never solves.

formats, in the order in which auto tries them:
{_table([(name, f.fields, f.found_in) for name, f in formats.FORMATS.items()])}

templates, and the flags of openrlhf_alp.cli.train_ppo_ray that go with the file:
{_table([(name, t.summary, t.train_flags) for name, t in TEMPLATES.items()])}

A base-* file holds whole prompts: leave --data.apply_chat_template off, or a chat template is put
around them. A chat-* file holds messages: without that flag OpenRLHF fails. --data.input_template
goes with neither.

  openrlhf-alp prepare-data --from train.parquet --to data/math.jsonl --tokenizer /models/policy \\
    --max-prompt-tokens 1024
  openrlhf-alp prepare-data --template base-tir --to data/tir.jsonl --from \\
    hkust-nlp/SimpleRL-Zoo-Data:simplelr_qwen_level3to5/train.parquet \\
    agentica-org/DeepScaleR-Preview-Dataset
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `openrlhf-alp prepare-data`."""
    add = parser.add_argument
    add(
        "--from",
        dest="sources",
        nargs="+",
        required=True,
        metavar="SOURCE",
        help=".jsonl, .json or .parquet file, Hugging Face id, or id:path/of/one/file.parquet",
    )
    add("--to", type=Path, required=True, metavar="OUT.jsonl", help="the file to write")
    add(
        "--format",
        choices=["auto", *formats.FORMATS],
        default="auto",
        help="format of the rows (default: auto)",
    )
    add("--problem-field", metavar="NAME", help="name of the problem's field, for other formats")
    add("--label-field", metavar="NAME", help="name of the answer's field, for other formats")
    add("--split", default="train", help="split of a Hugging Face id (default: train)")
    add(
        "--template",
        choices=TEMPLATES,
        default=_DEFAULT_TEMPLATE,
        help=f"how the problem is asked (default: {_DEFAULT_TEMPLATE})",
    )
    add("--tokenizer", metavar="DIR", help="model folder or id of the policy; counts prompt tokens")
    add("--max-prompt-tokens", type=int, metavar="N", help="leave out prompts longer than this")
    add(
        "--pass-rates",
        type=Path,
        metavar="RUN",
        help="folder of an evaluation (openrlhf-alp evaluate --suite FILE --output RUN): keep "
        "what its policy solves sometimes; answers that are all right or all wrong teach nothing",
    )
    add(
        "--pass-rate",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="keep problems with this share of right answers in RUN, both included (default: "
        "above 0 and below 1)",
    )
    add("--limit", type=int, metavar="N", help="read only the first N rows of each source")
    workers = min(_MAX_DEFAULT_WORKERS, os.cpu_count() or 1)
    workers_help = f"processes that check labels (default: {workers})"
    add("--workers", type=int, default=workers, help=workers_help)
    add(
        "--check-against",
        nargs="+",
        default=[],
        metavar="SUITE",
        help="report problems that a benchmark has too (paper, math500, ..., see openrlhf-alp "
        "evaluate --list), by text and by runs of 13 words: OUT.overlaps.jsonl",
    )
    add("--data-dir", type=Path, metavar="DIR", help="folder with the benchmarks' files")
    add("--overwrite", action="store_true", help="replace the files of an earlier run")


def run(arguments: argparse.Namespace) -> int:
    """Prepares; returns 0, 1 (no row could be kept) or 2 (wrong options, input or output)."""
    view = PrepareView(Console(), failed="Nothing was written.")
    try:
        _check(arguments)
        return _prepare(arguments, view)
    except (DataError, OSError) as error:
        view.error(str(error))
        return 2


def _check(options: argparse.Namespace) -> None:
    """Raises DataError for options that contradict each other or are out of range."""
    if (options.problem_field is None) != (options.label_field is None):
        raise DataError("--problem-field and --label-field go together; give both or neither")
    if options.problem_field is not None and options.format not in ("auto", "plain"):
        raise DataError(f"--format {options.format} names the fields itself; drop --problem-field")
    if options.max_prompt_tokens is not None and options.tokenizer is None:
        raise DataError("--max-prompt-tokens needs --tokenizer DIR to count with")
    for name in ("max_prompt_tokens", "limit", "workers"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise DataError(f"--{name.replace('_', '-')} {value}: must be 1 or more")
    for source, times in Counter(options.sources).items():
        if times > 1:
            raise DataError(f"--from names {source} twice")


def _prepare(options: argparse.Namespace, view: PrepareView) -> int:
    # Here and not above: these import sympy, and `--help` should not wait for that.
    from openrlhf_alp.data.output import OutputFiles, summarise
    from openrlhf_alp.data.prepare import Options, prepare

    # Each label without a reward is in the rejected file, with the reason.
    logging.getLogger("openrlhf_alp.rewards").setLevel(logging.ERROR)
    files = OutputFiles(prompts=options.to)
    # Before the work, which may take minutes and would be lost.
    files.check(sources=options.sources, overwrite=options.overwrite)
    benchmarks = _benchmarks(options)
    template = TEMPLATES[options.template]
    how = Options(
        template=template,
        num_workers=options.workers,
        count_tokens=TokenCounter(options.tokenizer) if options.tokenizer else None,
        max_prompt_tokens=options.max_prompt_tokens,
        pass_rates=_pass_rates(options),
    )
    rows: list[tuple[Row, formats.RowFormat]] = []
    format_of: dict[str, str] = {}
    for source in options.sources:
        found, row_format = _read(source, options)
        rows += [(row, row_format) for row in found]
        format_of[source] = row_format.name
        view.say("read", f"{len(found)} rows of {source}, format {row_format.name}")
    with view.checking() as on_progress:
        prepared = prepare(rows, how, on_progress)
    summary = summarise(
        prepared, template=template.name, train_flags=template.train_flags, formats=format_of
    )
    files.write(prepared, summary)
    view.counts(summary)
    if not prepared.prompts:
        view.say("nothing", f"no row could be kept; {files.rejected} says why of each")
        return 1
    view.say("written", f"{files.prompts}, {files.rejected} and {files.summary}")
    if benchmarks:
        overlaps = _overlaps(prepared.prompts, benchmarks)
        files.write_overlaps(overlap.to_json() for overlap in overlaps)
        view.overlaps(overlaps, list(benchmarks))
        view.say("overlaps", f"{len(overlaps)} listed in {files.overlaps}; no row was left out")
    view.say("train", f"--data.prompt_dataset {files.prompts} {summary.train_flags}")
    return 0


def _pass_rates(options: argparse.Namespace) -> PassRates | None:
    bounds = None if options.pass_rate is None else tuple(options.pass_rate)
    if options.pass_rates is None:
        if bounds:
            raise DataError("--pass-rate needs --pass-rates RUN, which has the shares")
        return None
    if bounds and not 0.0 <= bounds[0] <= bounds[1] <= 1.0:
        given = " ".join(f"{bound:g}" for bound in bounds)
        raise DataError(f"--pass-rate {given}: give 0 <= LOW <= HIGH <= 1")
    from openrlhf_alp.data.pass_rates import PassRates
    from openrlhf_alp.data.prepare import problem_key
    from openrlhf_alp.evaluate.folder import RunFolder

    shares = {
        problem_key(formats.without_instructions(text)): share
        for text, share in RunFolder(options.pass_rates).pass_rates()
    }
    return PassRates(of=shares, bounds=bounds)


def _benchmarks(options: argparse.Namespace) -> dict[str, list[tuple[str, str]]]:
    """Id and text of the problems of each benchmark to check against, by name."""
    if not options.check_against:
        return {}
    from openrlhf_alp.evaluate.suites import find_suites, load_suite

    loaded = [
        load_suite(suite, data_dir=options.data_dir)
        for suite in find_suites(options.check_against, fields={})
    ]
    return {one.name: [(problem.id, problem.text) for problem in one.problems] for one in loaded}


def _overlaps(
    prompts: Sequence[Prompt], benchmarks: Mapping[str, Sequence[tuple[str, str]]]
) -> list[Overlap]:
    from openrlhf_alp.data.overlap import Place, find_overlaps

    places = [
        Place(
            source=prompt.problem.row.source,
            row=prompt.problem.row.number,
            text=prompt.problem.text,
        )
        for prompt in prompts
    ]
    return [
        overlap
        for name, problems in benchmarks.items()
        for overlap in find_overlaps(places, name, problems)
    ]


def _read(source: str, options: argparse.Namespace) -> tuple[list[Row], formats.RowFormat]:
    rows = list(itertools.islice(read_rows(source, split=options.split), options.limit))
    if not rows:
        raise SourceError(f"{source} has no rows")
    if options.problem_field is not None:
        row_format = formats.plain_format(options.problem_field, options.label_field)
    elif options.format == "auto":
        return rows, formats.detect_format(rows)
    else:
        row_format = formats.FORMATS[options.format]
    formats.check_format(row_format, rows)
    return rows, row_format


class PrepareView(StageView):
    """A line per stage, a progress bar on a terminal, the counts."""

    @contextmanager
    def checking(self) -> Iterator[OnProgress]:
        """Yields what to call with each checked label."""
        if not self._console.is_terminal:
            yield self._line
            return
        bar = progress.BarColumn(bar_width=40)
        columns = (bar, progress.MofNCompleteColumn(), progress.TimeRemainingColumn())
        with progress.Progress("checking labels", *columns, console=self._console) as shown:
            task = shown.add_task("", total=None)
            yield lambda done, total: shown.update(task, completed=done, total=total)

    def counts(self, summary: Summary) -> None:
        """The table of what was read, kept and left out."""
        table = Table(title=f"Prepared with {summary.template}", title_justify="left")
        table.add_column("")
        table.add_column("rows", justify="right")
        table.add_row("read", str(summary.rows_read))
        table.add_row("kept", str(summary.rows_kept), style="bold")
        reasons = {name.replace("_", " "): count for name, count in summary.rejected.items()}
        _add_section(table, "left out: ", reasons)
        _add_section(table, "from ", summary.kept_by_datasource)
        _add_section(table, "label: ", summary.label_kinds)
        if summary.instructions_cut:
            table.add_row("instruction cut from the problem", str(summary.instructions_cut))
        if tokens := summary.prompt_tokens:
            lengths = {
                "shortest": tokens.shortest,
                "median": f"{tokens.median:g}",
                "95th percentile": tokens.p95,
                "longest": tokens.longest,
            }
            _add_section(table, "prompt tokens, ", lengths)
        self._console.print(table)

    def overlaps(self, found: Sequence[Overlap], suites: Sequence[str]) -> None:
        """The table of what benchmarks share with the data."""
        table = Table(title="Overlaps with benchmarks", title_justify="left")
        for heading in ("benchmark", "same text", "shared runs of 13 words", "its problems"):
            table.add_column(heading, justify="right")
        for suite in suites:
            own = [overlap for overlap in found if overlap.suite == suite]
            numbers = (
                sum(overlap.same_text for overlap in own),
                sum(overlap.shared_ngrams > 0 for overlap in own),
                len({overlap.benchmark_id for overlap in own}),
            )
            table.add_row(suite, *map(str, numbers))
        self._console.print(table)

    def _line(self, done: int, total: int) -> None:
        if done % _LINE_EVERY_ROWS == 0 or done == total:
            self.say("labels", f"{done} of {total} checked")


def _add_section(table: Table, prefix: str, numbers: Mapping[str, object]) -> None:
    table.add_section()
    for name, number in numbers.items():
        table.add_row(escape(f"{prefix}{name}"), str(number))

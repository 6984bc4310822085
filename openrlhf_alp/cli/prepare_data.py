"""`openrlhf-alp prepare-data`: problem sets to prompts. `data/prepare.py` does the work."""

import argparse
import itertools
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from openrlhf_alp.cli.prepare_view import PrepareView
from openrlhf_alp.data.formats import (
    FORMATS,
    RowFormat,
    check_format,
    detect_format,
    plain_format,
)
from openrlhf_alp.data.sources import DataError, Row, SourceError, read_rows
from openrlhf_alp.data.templates import TEMPLATES, TokenCounter

_DEFAULT_TEMPLATE = "chat-math"
_MAX_DEFAULT_WORKERS = 8


def _table(rows: Sequence[tuple[str, str, str]]) -> str:
    """Two lines for each: name and first text, then the second text below the first."""
    return "\n".join(f"  {name:<11} {first}\n{'':14}{second}" for name, first, second in rows)


DESCRIPTION = f"""\
Turns mathematical problem sets into prompts that OpenRLHF reads: JSON lines with input, label,
datasource and id. Several sets become one file, and a problem that two of them have is kept once.

A row is left out when it has no problem or no label, when it was there before, when two rows give
one problem different answers, when the reward cannot read its label or does not find the label
equal to itself, and when its prompt is too long. Nothing is lost: OUT.rejected.jsonl has each of
these rows with the reason, OUT.summary.json the counts.

formats, in the order in which auto tries them:
{_table([(name, f.fields, f.found_in) for name, f in FORMATS.items()])}

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


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareConfig:
    """The options of the command."""

    sources: tuple[str, ...]
    to: Path
    format: str
    problem_field: str | None
    label_field: str | None
    split: str
    template: str
    tokenizer: str | None
    max_prompt_tokens: int | None
    limit: int | None
    workers: int
    overwrite: bool

    def __post_init__(self) -> None:
        if (self.problem_field is None) != (self.label_field is None):
            raise ValueError("--problem-field and --label-field go together; give both or neither")
        if self.problem_field is not None and self.format not in ("auto", "plain"):
            raise ValueError(
                f"--format {self.format} names the fields itself; drop --problem-field"
            )
        if self.max_prompt_tokens is not None and self.tokenizer is None:
            raise ValueError("--max-prompt-tokens needs --tokenizer DIR to count with")
        for name in ("max_prompt_tokens", "limit", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be 1 or more")
        twice = [source for source, times in Counter(self.sources).items() if times > 1]
        if twice:
            raise ValueError(f"--from names {twice[0]} twice")


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
    add("--format", choices=["auto", *FORMATS], default="auto", help="of the rows (default: auto)")
    add("--problem-field", metavar="NAME", help="the field of the problem, for other formats")
    add("--label-field", metavar="NAME", help="the field of the answer, for other formats")
    add("--split", default="train", help="split of a Hugging Face id (default: train)")
    add(
        "--template",
        choices=TEMPLATES,
        default=_DEFAULT_TEMPLATE,
        help=f"how the problem is asked (default: {_DEFAULT_TEMPLATE})",
    )
    add("--tokenizer", metavar="DIR", help="model folder or id of the policy; counts prompt tokens")
    add("--max-prompt-tokens", type=int, metavar="N", help="leave out prompts longer than this")
    add("--limit", type=int, metavar="N", help="read only the first N rows of each source")
    workers = min(_MAX_DEFAULT_WORKERS, os.cpu_count() or 1)
    add(
        "--workers",
        type=int,
        default=workers,
        help=f"processes that check labels (default: {workers})",
    )
    add("--overwrite", action="store_true", help="replace the files of an earlier run")


def run(arguments: argparse.Namespace) -> int:
    """Prepares; returns 0, 1 (no row could be kept) or 2 (wrong options, input or output)."""
    view = PrepareView(Console())
    fields = {field: getattr(arguments, field) for field in PrepareConfig.__dataclass_fields__}
    try:
        config = PrepareConfig(**{**fields, "sources": tuple(arguments.sources)})
    except ValueError as error:
        view.error(str(error))
        return 2
    try:
        return _prepare(config, view)
    except (DataError, OSError) as error:
        view.error(str(error))
        return 2


def _prepare(config: PrepareConfig, view: PrepareView) -> int:
    # Here and not above: these import sympy, and `--help` should not wait for that.
    from openrlhf_alp.data.output import OutputFiles, summarise
    from openrlhf_alp.data.prepare import Options, prepare

    # Each label without a reward is in the rejected file, with the reason.
    logging.getLogger("openrlhf_alp.rewards").setLevel(logging.ERROR)
    files = OutputFiles(prompts=config.to)
    files.check(sources=config.sources, overwrite=config.overwrite)
    template = TEMPLATES[config.template]
    options = Options(
        template=template,
        num_workers=config.workers,
        count_tokens=TokenCounter(config.tokenizer) if config.tokenizer else None,
        max_prompt_tokens=config.max_prompt_tokens,
    )
    rows: list[tuple[Row, RowFormat]] = []
    formats: dict[str, str] = {}
    for source in config.sources:
        found, row_format = _read(source, config)
        rows += [(row, row_format) for row in found]
        formats[source] = row_format.name
        view.say("read", f"{len(found)} rows of {source}, format {row_format.name}")
    with view.checking() as on_progress:
        prepared = prepare(rows, options, on_progress)
    summary = summarise(
        prepared, template=template.name, train_flags=template.train_flags, formats=formats
    )
    files.write(prepared, summary)
    view.results(summary, files)
    return 0 if prepared.prompts else 1


def _read(source: str, config: PrepareConfig) -> tuple[list[Row], RowFormat]:
    rows = list(itertools.islice(read_rows(source, split=config.split), config.limit))
    if not rows:
        raise SourceError(f"{source} has no rows")
    if config.problem_field is not None and config.label_field is not None:
        row_format = plain_format(config.problem_field, config.label_field)
    elif config.format == "auto":
        return rows, detect_format(rows)
    else:
        row_format = FORMATS[config.format]
    check_format(row_format, rows)
    return rows, row_format

"""`openrlhf-alp metrics`: what the numbers of a training step mean."""

import argparse
import sys

from openrlhf_alp.objective.metric_names import METRICS

HELP = "explain the metrics of a training step"
DESCRIPTION = """\
Explain the `alp/` metrics that a training step logs to --logger.metrics_jsonl, TensorBoard or
Weights & Biases. docs/metrics.md says which of them to look at first.

  openrlhf-alp metrics              all of them
  openrlhf-alp metrics envelope     those with this word in name or meaning
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("word", nargs="?", default="", help="part of a name or of a meaning")


def run(arguments: argparse.Namespace) -> int:
    """Prints a line for each metric; returns 1 when none has the word."""
    word = arguments.word.lower()
    found = {k: v for k, v in METRICS.items() if word in k.lower() or word in v.lower()}
    for name, meaning in found.items():
        print(f"{name:42} {meaning}")
    if not found:
        print(f"no metric has {arguments.word!r} in its name or meaning", file=sys.stderr)
    return 0 if found else 1

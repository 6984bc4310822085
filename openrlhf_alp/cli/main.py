"""`openrlhf-alp`: one table of commands, each a file of this folder that parses, wires and calls.

Training has a command of its own, `openrlhf_alp.cli.train_ppo_ray`.
"""

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence
from typing import Protocol

from openrlhf_alp.cli import demo, preflight, prepare_data

_DESCRIPTION = """\
Adaptive Layerwise Perturbation for LLM reinforcement learning, on OpenRLHF, vLLM and Ray.
"""

_EPILOG = """\
training runs have a command of their own, which takes every OpenRLHF flag and ours:
  python -m openrlhf_alp.cli.train_ppo_ray --help

the services that a run talks to:
  python -m services.rollout --help
  python -m services.tool --help
"""


class Command(Protocol):
    """What the module of a command has."""

    HELP: str
    """One line for the list of commands."""
    DESCRIPTION: str
    """What its own `--help` begins with."""

    def add_arguments(self, parser: argparse.ArgumentParser, /) -> None: ...

    def run(self, arguments: argparse.Namespace, /) -> int:
        """Returns the exit status."""


COMMANDS: dict[str, Command] = {
    "demo": demo,
    "preflight": preflight,
    "prepare-data": prepare_data,
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of `openrlhf-alp` with every command of the table."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="openrlhf-alp", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=raw
    )
    version = importlib.metadata.version("openrlhf-alp")
    parser.add_argument("--version", action="version", version=f"openrlhf-alp {version}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(
            name, help=command.HELP, description=command.DESCRIPTION, formatter_class=raw
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status (2: the command line is wrong, 130: Ctrl-C)."""
    parsed = build_parser().parse_args(arguments)
    try:
        status: int = parsed.run(parsed)
    except KeyboardInterrupt:
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())

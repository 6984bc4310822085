"""`openrlhf-alp`: one table of commands. Training runs by `openrlhf_alp.cli.train_ppo_ray`."""

import argparse
import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One subcommand: a line of help, its arguments, and what it does."""

    help: str
    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    """Returns the exit status."""


COMMANDS = {
    "demo": Command(
        help="watch a small model learn to add, start to finish, on this machine",
        description=demo.DESCRIPTION,
        add_arguments=demo.add_arguments,
        run=demo.run,
    ),
    "preflight": Command(
        help="compare the log-probs of a running rollout service with the learner's own",
        description=preflight.DESCRIPTION,
        add_arguments=preflight.add_arguments,
        run=preflight.run,
    ),
    "prepare-data": Command(
        help="turn problem sets into prompts to train on",
        description=prepare_data.DESCRIPTION,
        add_arguments=prepare_data.add_arguments,
        run=prepare_data.run,
    ),
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of `openrlhf-alp` with every command of the table."""
    parser = argparse.ArgumentParser(
        prog="openrlhf-alp",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = importlib.metadata.version("openrlhf-alp")
    parser.add_argument("--version", action="version", version=f"openrlhf-alp {version}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(
            name,
            help=command.help,
            description=command.description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
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

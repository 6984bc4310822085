"""`openrlhf-alp`: one table of commands, each a file of this folder that parses, wires and calls.

Training has a command of its own, `openrlhf_alp.cli.train_ppo_ray`.
"""

import argparse
import importlib
import importlib.metadata
import sys
from collections.abc import Sequence
from typing import Any, Protocol, cast

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


COMMANDS = {
    "convert-batch": "learner",
    "episodes": "learner",
    "evaluate": "evaluate",
    "launch": "learner,demo",
    "metrics": "learner",
    "preflight": "learner",
    "prepare-data": "learner",
    "replay": "learner",
    "report": "learner",
}
"""Command -> the extras of the package that bring what its module imports."""


class _Parser(argparse.ArgumentParser):
    """Takes `--data-dir` and `--data_dir` alike: the trainer writes its flags with the latter."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        given = list(sys.argv[1:] if args is None else args)
        end = given.index("--") if "--" in given else len(given)
        declared = [self._as_declared(one) for one in given[:end]]
        return super().parse_known_args([*declared, *given[end:]], namespace)

    def _as_declared(self, argument: str) -> str:
        name, equals, value = argument.partition("=")
        spelled = (name, f"--{name[2:].replace('-', '_')}", f"--{name[2:].replace('_', '-')}")
        known = [one for one in spelled if one in self._option_string_actions]
        return f"{known[0]}{equals}{value}" if known and name.startswith("--") else argument


class MissingCommand:
    """Stands in for a command whose packages are not installed, as in an image of one service."""

    def __init__(self, name: str, package: str) -> None:
        self.HELP = f"needs {package}: pip install 'openrlhf-alp[{COMMANDS[name]}]'"
        self.DESCRIPTION = f"{name} {self.HELP}"

    def add_arguments(self, parser: argparse.ArgumentParser, /) -> None:
        """None of its options is known; `main` passes over them."""

    def run(self, arguments: argparse.Namespace, /) -> int:
        """Says what to install; returns 2."""
        print(f"openrlhf-alp {self.DESCRIPTION}", file=sys.stderr)
        return 2


def load_command(name: str) -> Command:
    """The module of a command, or what stands in for it where a package is missing."""
    try:
        module = importlib.import_module(f"openrlhf_alp.cli.{name.replace('-', '_')}")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("openrlhf_alp", "services"):
            raise  # a file of ours: no installation would help
        return MissingCommand(name, package)
    return cast(Command, module)


def build_parser() -> argparse.ArgumentParser:
    """The parser of `openrlhf-alp` with every command of the table."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="openrlhf-alp", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=raw
    )
    version = importlib.metadata.version("openrlhf-alp")
    parser.add_argument("--version", action="version", version=f"openrlhf-alp {version}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        command = load_command(name)
        subparser = commands.add_parser(
            name, help=command.HELP, description=command.DESCRIPTION, formatter_class=raw
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run, is_missing=isinstance(command, MissingCommand))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status (2: the command line is wrong, 130: Ctrl-C)."""
    parser = build_parser()
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown and not parsed.is_missing:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if not parsed.is_missing and (problem := _key_problem()):
        print(problem, file=sys.stderr)
        return 2
    try:
        status: int = parsed.run(parsed)
    except KeyboardInterrupt:
        return 130
    return status


def _key_problem() -> str | None:
    """Read the keys that come from files; what is wrong with them."""
    # Here and not above: an environment without any extra has a `--help`, but no pydantic.
    from services.common.wire import read_key_files

    try:
        read_key_files()
    except ValueError as error:
        return str(error)
    return None


if __name__ == "__main__":
    sys.exit(main())

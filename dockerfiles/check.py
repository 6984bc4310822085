"""Build the images, attack the tool image, train through compose.yaml: `make docker-test`.

    python dockerfiles/check.py [--only {tool,stack}] [--base IMAGE] [--torch-index URL]
                                [--pip-conf FILE] [--ca FILE] [--vllm VERSION]
                                [--demo] [--keep]

An engine that answers is used; otherwise one is started on a private socket and ended afterwards
(root only). Exit status 0: every check passed; 1: one failed; 77: something that a check needs is
not on this machine, and the rest passed. It needs the repository's environment.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from check_stack import LEARNER, ROLLOUT, check_stack, require_compose
from check_tool_image import IMAGE, check_tool_image
from engine import CheckError, NotToBeHadError, build, docker, engine_answers, private_engine

SKIPPED = 77
BASE = "openrlhf-alp/base:check"


def main() -> int:
    """Run the checks; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python dockerfiles/check.py", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--only", choices=["tool", "stack"], help="of the two checks, this one")
    parser.add_argument(
        "--base", help="base image, or a tar archive of its files (default: the Dockerfiles')"
    )
    parser.add_argument("--torch-index", help="index of CPU builds of torch")
    parser.add_argument("--pip-conf", type=Path, help="pip's configuration for the build")
    parser.add_argument("--ca", type=Path, help="certificates for the build's downloads")
    parser.add_argument("--vllm", help="of the rollout image, as 0.32.0 (default: the lock's)")
    parser.add_argument(
        "--demo", action="store_true", help="train a step of the demo, too (needs 13 GB of memory)"
    )
    parser.add_argument("--keep", action="store_true", help="keep the images")
    arguments = parser.parse_args()
    try:
        with contextlib.ExitStack() as stack:
            if not engine_answers():
                stack.enter_context(private_engine())
            if arguments.base and Path(arguments.base).is_file():
                arguments.base = stack.enter_context(imported(Path(arguments.base)))
            check(arguments)
    except CheckError as error:
        print(f"docker-test: FAILED: {error}", file=sys.stderr)
        return 1
    except NotToBeHadError as error:
        print(f"docker-test: skipped: {error}", file=sys.stderr)
        return SKIPPED
    print("docker-test: every check passed")
    return 0


@contextlib.contextmanager
def imported(archive: Path) -> Iterator[str]:
    """A base image from an archive, for an engine that reaches no registry."""
    docker("import", archive, BASE)
    try:
        yield BASE
    finally:
        docker("image", "rm", "--force", BASE)


def check(arguments: argparse.Namespace) -> None:
    """Build what is to be checked, check it, remove it."""
    options = build_options(arguments)
    images = [IMAGE] if arguments.only == "tool" else [IMAGE, ROLLOUT, LEARNER]
    try:
        build("tool.Dockerfile", IMAGE, *options)
        if arguments.only != "stack":
            check_tool_image()
        if arguments.only != "tool":
            require_compose()
            index = arguments.torch_index
            options += ["--build-arg", f"TORCH_INDEX={index}"] if index else []
            other = ["--build-arg", f"VLLM={arguments.vllm}"] if arguments.vllm else []
            for image, of_target in (
                (ROLLOUT, ["--target", "rollout", *other]),
                (LEARNER, ["--target", "learner"]),
            ):
                build("stack.Dockerfile", image, *options, *of_target)
            check_stack(demo=arguments.demo)
    finally:
        if not arguments.keep:
            for image in images:
                docker("image", "rm", "--force", image)


def build_options(arguments: argparse.Namespace) -> list[str]:
    """Options of `docker build` for every image."""
    options = ["--build-arg", f"BASE={arguments.base}"] if arguments.base else []
    for name, path in (("pip", arguments.pip_conf), ("ca", arguments.ca)):
        if path:
            options += ["--secret", f"id={name},src={path}"]
    return options


if __name__ == "__main__":
    sys.exit(main())

"""Every wall of the house falls when somebody imports through it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]

# (file that gets the import, import statement, name of the contract that must break)
FORBIDDEN = [
    (
        "openrlhf_alp/alp/noise.py",
        "import openrlhf_alp.objective",
        "alp is pure PyTorch",
    ),
    (
        "openrlhf_alp/objective/ratio.py",
        "import transformers",
        "objective is pure PyTorch",
    ),
    (
        "openrlhf_alp/episodes/records.py",
        "import httpx",
        "episodes are pure Python over Protocols",
    ),
    (
        "openrlhf_alp/replay/pick.py",
        "import datasets",
        "replay is plain PyTorch on recorded files",
    ),
    (
        "openrlhf_alp/rewards/__init__.py",
        "import openrlhf_alp.clients",
        "openrlhf_alp: data flows one way",
    ),
    (
        "openrlhf_alp/clients/__init__.py",
        "import services.rollout.ledger",
        "of the services, openrlhf_alp imports the wire only",
    ),
    (
        "openrlhf_alp/rollouts/__init__.py",
        "def late() -> None:\n    import ray",
        "only the learner touches OpenRLHF, Ray and DeepSpeed",
    ),
    (
        "services/rollout/wire/__init__.py",
        "import fastapi",
        "the wire is plain data",
    ),
    (
        "services/tool/sandbox/inside/__init__.py",
        "import services.tool.sandbox.host",
        "beyond the sandbox's wall: the standard library and the fences",
    ),
    (
        "services/tool/sandbox/inside/__init__.py",
        "import psutil",
        "beyond the sandbox's wall: the standard library and the fences",
    ),
    (
        "services/tool/__init__.py",
        "import services.rollout",
        "services: two islands on common ground",
    ),
    (
        "services/common/wire.py",
        "import openrlhf_alp",
        "services never import the learner's side",
    ),
    (
        "openrlhf_alp/objective/ratio.py",
        "import typing\nif typing.TYPE_CHECKING:\n    import openrlhf_alp.objective.loss",
        "no file imports itself by way of others",
    ),
]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources with their contracts."""
    for name in ("pyproject.toml", "import_contracts.py"):
        shutil.copy(REPOSITORY / name, tmp_path)
    for package in ("openrlhf_alp", "services"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / package, tmp_path / package, ignore=ignore)
    return tmp_path


def lint_imports(tree: Path) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    environment = {"PATH": "/usr/bin:/bin", "COLUMNS": "200", "PYTHONPATH": str(tree)}
    return subprocess.run(
        command, cwd=tree, env=environment, capture_output=True, text=True, timeout=120
    )


def broken(output: str) -> list[str]:
    return [line.removesuffix(" BROKEN") for line in output.splitlines() if "BROKEN" in line]


def test_the_sources_keep_every_contract(tree: Path) -> None:
    result = lint_imports(tree)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(("file", "statement", "contract"), FORBIDDEN)
def test_a_forbidden_import_breaks_its_contract(
    tree: Path, file: str, statement: str, contract: str
) -> None:
    with (tree / file).open("a", encoding="utf-8") as source:
        source.write(f"\n{statement}\n")
    result = lint_imports(tree)
    assert result.returncode == 1, result.stdout
    assert contract in broken(result.stdout)

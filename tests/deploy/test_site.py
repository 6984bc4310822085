"""The generated pages of the documentation site hold every flag and route."""

import argparse
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from openrlhf_alp.cli.main import COMMANDS
from openrlhf_alp.learner.flags.settle import add_arguments
from services.rollout.settings import RolloutSettings
from services.tool.settings import ToolSettings

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    path = REPOSITORY / "docs/_generate.py"
    specification = importlib.util.spec_from_file_location("generate", path)
    module = importlib.util.module_from_spec(specification)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(path.parent))  # as when it runs as a script
        specification.loader.exec_module(module)
    return module


def test_every_flag_has_a_row_with_its_help(generate: ModuleType) -> None:
    lines = list(generate.flags_page())
    rows = {line.split("`")[1]: line for line in "\n".join(lines).splitlines() if "| `" in line}
    trainer = argparse.ArgumentParser(add_help=False)
    add_arguments(trainer)
    flags = {action.option_strings[0] for action in trainer._actions}
    for settings in (RolloutSettings, ToolSettings):
        flags |= {f"--{n.replace('_', '-')}" for n in settings.model_fields if n != "faults"}
    flags |= {f"--faults.{n.replace('_', '-')}" for n in ("kill_after_tokens", "step_s")}
    assert flags <= rows.keys()
    for flag in flags:
        assert rows[flag].count("|") - rows[flag].count("\\|") == 4, rows[flag]
        assert rows[flag].rstrip(" |").split("| ")[-1], rows[flag]
    for name in COMMANDS:
        assert any(f"## `openrlhf-alp {name}`" in line for line in lines)


def test_every_route_and_schema_has_its_place(generate: ModuleType) -> None:
    page = "\n".join(generate.rollout_page())
    for route in (
        "POST /v1/generate",
        "POST /v1/weights/commit",
        "GET /v1/contract",
        "GET /readyz",
    ):
        assert f"`{route}`" in page
    assert "### GenerateRequest" in page and "| `token_ids` |" in page
    assert "`None`" not in page


def test_every_error_has_a_row(generate: ModuleType) -> None:
    page = "\n".join(generate.errors_page())
    for row in (
        # Of a table of a service, of a message with values, and of an answer that a route raises.
        "| 409 | `step_conflict` | `step` | GET the session for the number of the next step. |",
        "| --lr is &#123;lr&#125;; it must be a finite number above 0 | `ValueError` | replay.py |",
        "The service failed while handling this request. Fix: Report the request_id",
    ):
        assert row in page
    assert page.count("\n| ") > 300


def test_the_pages_of_the_site_exist() -> None:
    def pages(entries: list) -> list[str]:
        values = [value for entry in entries for value in entry.values()]
        return [p for v in values for p in (pages(v) if isinstance(v, list) else [v])]

    site = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())
    written = [page for page in pages(site["nav"]) if not page.startswith("reference/")]
    assert len(written) > 8
    for page in written:
        assert (REPOSITORY / "docs" / page).is_file(), page

"""Write the generated pages of the site into docs/reference/: `make docs` calls it.

    flags.md      every flag of the trainer, of the commands and of the services, from their parsers
    rollout.md    routes of the rollout service, from its OpenAPI document
    tool.md       routes of the tool service, likewise
    errors.md     every error, from the source

It needs the repository's environment. No model is loaded: what the rollout service says of its
routes follows from them alone.
"""

import argparse
import asyncio
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from _errors import errors_page
from _markdown import cell
from pydantic_core import PydanticUndefined
from pydantic_settings import BaseSettings

from openrlhf_alp.cli.main import COMMANDS, load_command
from openrlhf_alp.learner.flags.settle import add_arguments
from services.rollout.api.app import create_app as create_rollout_app
from services.rollout.service import RolloutService
from services.rollout.settings import RolloutSettings
from services.tool.api.app import create_app as create_tool_app
from services.tool.service import ToolService
from services.tool.settings import ToolSettings

REFERENCE = Path(__file__).parent / "reference"
GENERATED = "<!-- Made by docs/_generate.py. -->\n"
_METHODS = ("get", "post", "put", "delete")


def main() -> int:
    """Write the pages; return the exit status."""
    REFERENCE.mkdir(exist_ok=True)
    pages = {
        "flags": flags_page(),
        "rollout": rollout_page(),
        "tool": tool_page(),
        "errors": errors_page(),
    }
    for name, lines in pages.items():
        (REFERENCE / f"{name}.md").write_text(GENERATED + "\n".join(lines) + "\n")
    return 0


def flags_page() -> Iterator[str]:
    """Tables of flags by program."""
    yield "# All flags\n"
    yield "What `--help` of each program shows. The trainer takes every flag of OpenRLHF 0.11.2 as"
    yield "well; [Flags](../flags.md) explains how ours work together.\n"
    trainer = argparse.ArgumentParser(add_help=False)
    add_arguments(trainer)
    yield "## `openrlhf_alp.cli.train_ppo_ray`\n"
    yield from flag_table(trainer._actions)
    for name in COMMANDS:
        parser = argparse.ArgumentParser(prog=name, add_help=False)
        command = load_command(name)
        command.add_arguments(parser)
        yield f"\n## `openrlhf-alp {name}`\n\n{sentence(command.HELP)}\n"
        yield from flag_table(parser._actions)
    for title, settings in (("rollout", RolloutSettings), ("tool", ToolSettings)):
        yield f"\n## `python -m services.{title}`\n"
        yield from settings_table(settings)


def flag_table(actions: Iterable[argparse.Action]) -> Iterator[str]:
    """One row for each action of a parser."""
    yield "| flag | default | meaning |\n|---|---|---|"
    for action in actions:
        name = ", ".join(action.option_strings) or str(action.metavar or action.dest)
        meaning = cell(action.help or "").replace("%%", "%")
        if action.choices is not None:
            meaning += f" One of {', '.join(f'`{choice}`' for choice in action.choices)}."
        default = default_cell(action.default)
        # The default has a column of its own.
        yield f"| `{name}` | {default} | {meaning.replace('(default: %(default)s)', '').strip()} |"


def settings_table(settings: type[BaseSettings]) -> Iterator[str]:
    """One row for each setting of a service; nested ones under their own name."""
    prefix = settings.model_config["env_prefix"]
    yield f"Each is also an environment variable: `{prefix}` and the name in capitals.\n"
    yield "| flag | default | meaning |\n|---|---|---|"
    for name, field in settings.model_fields.items():
        kind = field.annotation
        nested = getattr(kind, "model_fields", None)
        for inner, described in (nested or {"": field}).items():
            flag = f"{name}.{inner}" if inner else name
            default = described.get_default(call_default_factory=True)
            meaning = cell(described.description or "")
            yield f"| `--{flag.replace('_', '-')}` | {default_cell(default)} | {meaning} |"


def rollout_page() -> Iterator[str]:
    """Routes of the rollout service, but for vLLM's own."""
    settings = RolloutSettings(model=Path("model"))
    service = cast(RolloutService, None)
    app = create_rollout_app(service, settings, api_key="-", admin_key="-")
    yield from routes_page("Rollout service: HTTP", "../rollout_service.md", app.openapi())


def tool_page() -> Iterator[str]:
    """Routes of the tool service, but for MCP, which has its own schema."""
    document = asyncio.run(tool_document())
    yield from routes_page("Tool service: HTTP", "../tool_service.md", document)


async def tool_document() -> dict[str, Any]:
    """The OpenAPI document of a small service; no program runs in it."""
    settings = ToolSettings(slots=1, launchers=1, presets="numpy")
    async with ToolService.running(settings) as service:
        return create_tool_app(service, settings, api_key="-").openapi()


def routes_page(title: str, explained: str, document: dict[str, Any]) -> Iterator[str]:
    """Every route with its body, answers and the fields of each schema."""
    yield f"# {title}\n"
    yield "Generated from the OpenAPI document, which a running service has at `/openapi.json`."
    yield f"[What the routes do]({explained}) is explained elsewhere.\n\n## Routes\n"
    yield "| route | body | answers | |\n|---|---|---|---|"
    for path, operations in document["paths"].items():
        for method in _METHODS:
            if method in operations:
                yield route_row(method, path, operations[method])
    yield "\n## Schemas"
    for name, schema in document["components"]["schemas"].items():
        yield from schema_section(name, schema)


def route_row(method: str, path: str, operation: dict[str, Any]) -> str:
    contents = operation.get("requestBody", {}).get("content", {})
    body = ", ".join(
        dict.fromkeys(kind_of(content.get("schema", {})) for content in contents.values())
    )
    answers = ", ".join(operation.get("responses", {}))
    what = operation.get("description") or operation.get("summary", "")
    return f"| `{method.upper()} {path}` | {body} | {answers} | {cell(what)} |"


def schema_section(name: str, schema: dict[str, Any]) -> Iterator[str]:
    yield f"\n### {name}\n"
    if "description" in schema:
        yield cell(schema["description"]) + "\n"
    if "properties" not in schema:
        yield f"{kind_of(schema)}"
        return
    yield "| field | type | default | meaning |\n|---|---|---|---|"
    for field, value in schema["properties"].items():
        needed = field in schema.get("required", ())
        default = "required" if needed else default_cell(value.get("default"))
        meaning = cell(value.get("description", ""))
        yield f"| `{field}` | {kind_of(value)} | {default} | {meaning} |"


def kind_of(schema: dict[str, Any]) -> str:
    """A JSON schema in a few words, with links to the sections of other schemas."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return " or ".join(kind_of(one) for one in schema[key])
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"array of {kind_of(schema.get('items', {}))}"
    return str(schema.get("type", "any"))


def default_cell(value: object) -> str:
    if value in (None, "", (), argparse.SUPPRESS) or value is PydanticUndefined:
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{cell(str(value))}`"


def sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


if __name__ == "__main__":
    sys.exit(main())

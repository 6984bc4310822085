"""The page of every error: what the services answer, and every message that the code raises.

The messages are read from the source, so the page cannot lack one. Where a message holds a value,
the page shows the name of that value in braces.
"""

import ast
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from _markdown import cell

from services.common.errors import ErrorSpec, ErrorTable
from services.rollout.errors import SPECS as ROLLOUT_SPECS
from services.tool.errors import ERRORS as TOOL_ERRORS

ROOT = Path(__file__).parent.parent
PACKAGES = ("openrlhf_alp", "services")
_LEAST_WORDS = 3
"""A shorter text is no sentence but a value that the catching side completes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One text that the code raises."""

    path: str
    kind: str
    text: str


def errors_page() -> Iterator[str]:
    """The lines of the page."""
    yield "# All errors\n"
    yield "Every message says the cause, with the value, and the fix. Search this page for a part"
    yield "of the message without its values: `{name}` stands for a value.\n"
    yield "## Answers of the rollout service\n"
    yield from _answers(ROLLOUT_SPECS.values())
    yield "\n## Answers of the tool service\n"
    yield from _answers(_specs(TOOL_ERRORS))
    for folder, messages in itertools.groupby(_messages(), key=lambda m: Path(m.path).parent):
        yield f"\n## Raised in `{folder}`\n"
        yield "| message | class | file |\n|---|---|---|"
        for message in messages:
            name = Path(message.path).name
            yield f"| {_cell(message.text)} | `{message.kind}` | {name} |"


def _specs(table: ErrorTable) -> list[ErrorSpec]:
    return list(dict.fromkeys(entry for entry in table.values() if isinstance(entry, ErrorSpec)))


def _answers(specs: Iterable[ErrorSpec]) -> Iterator[str]:
    yield "| status | code | field | fix |\n|---|---|---|---|"
    for spec in sorted(specs, key=lambda spec: (spec.status, spec.code)):
        field = f"`{spec.field}`" if spec.field else ""
        yield f"| {spec.status} | `{spec.code}` | {field} | {_cell(spec.fix)} |"


def _messages() -> Iterator[Message]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py"), key=lambda p: (p.parent, p.name)):
            yield from _messages_of(path)


def _messages_of(path: Path) -> Iterator[Message]:
    for kind, call in _errors_made(ast.parse(path.read_text())):
        texts = [text for text in map(_text, call.args) if len(text.split()) > _LEAST_WORDS]
        fixes = ["Fix: " + _text(word.value) for word in call.keywords if word.arg == "fix"]
        # The last one: where there are several, the first is a code or a name.
        for text in texts[-1:]:
            whole = " ".join([text, *fixes])
            yield Message(path=str(path.relative_to(ROOT)), kind=kind, text=whole)


def _errors_made(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        match node:
            case ast.Raise(exc=ast.Call(func=ast.Name(id=kind)) as call):
                yield kind, call
            # Handlers of a service return what they answer.
            case ast.Return(value=ast.Call(func=ast.Name(id="ApiError" as kind)) as call):
                yield kind, call


def _text(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(map(_text, parts))
        case ast.FormattedValue(value=value):
            return f"{{{_last_name(value)}}}"
    return ""


def _last_name(node: ast.expr) -> str:
    """A short name of a value: `count` of `self.plan.count`, `join` of `', '.join(names)`."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case ast.Call(func=ast.Attribute(attr="join"), args=[argument]):
            return _last_name(argument)
        case ast.Call(args=[argument, *_]):
            return _last_name(argument)
        case ast.Call(func=function):
            return _last_name(function)
    return "..."


def _cell(text: str) -> str:
    # Braces would be read as the attributes of what stands before them.
    return cell(text).replace("{", "&#123;").replace("}", "&#125;")

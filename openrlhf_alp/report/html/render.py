"""Renders a template of this folder with its style sheet and scripts in one file.

Text of runs and episodes is untrusted: jinja escapes it, and JSON is escaped for `<script>`.
Large parts travel as base64 of gzip, which the browser unpacks.
"""

import base64
import functools
import gzip
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

_TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, **values: Any) -> str:
    """The page that `templates/TEMPLATE` makes of `values`."""
    return _environment().get_template(template).render(values)


def macros(template: str, **values: Any) -> Any:
    """The macros of `templates/TEMPLATE` as functions of that name, which return markup."""
    return _environment().get_template(template).make_module(values)


def packed(content: bytes) -> str:
    """Base64 of gzip, safe inside of HTML. The same content gives the same text."""
    return base64.b64encode(gzip.compress(content, compresslevel=9, mtime=0)).decode("ascii")


def script_json(value: Any) -> Markup:
    """JSON that no value can end the surrounding `<script>` with."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["file"] = _file
    return environment


def _file(name: str) -> Markup:
    """A style sheet or script of the templates, as it is."""
    return Markup((_TEMPLATES / name).read_text(encoding="utf-8"))

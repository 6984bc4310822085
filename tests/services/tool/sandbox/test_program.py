"""Lines of a program's source, as tracebacks show them."""

import linecache
from pathlib import Path

import pytest

from services.tool.sandbox.inside.snippet import program


@pytest.mark.parametrize(
    "code",
    [
        "",
        "a",
        "a\nb\n",
        "a\r\nb",
        "a\rb\n\rc",
        "a\x0cb\nc",
        "a\x0b\x1c\x1d\x1e\x85\u2028b\nc",
        "\n\n",
    ],
)
def test_lines_are_those_that_python_reads_from_a_file(code: str, tmp_path: Path) -> None:
    path = tmp_path / "main.py"
    path.write_bytes(f"{code}\n".encode())
    assert program._lines(code) == linecache.getlines(str(path))

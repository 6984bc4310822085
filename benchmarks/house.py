"""Prints the figures that say whether the code base keeps its shape, beside what is asked of them.

    python benchmarks/house.py [--root DIR] [--repeats]

"Source" is `openrlhf_alp` and `services`. Repeats are counted over source, tests, benchmarks and
examples: two files form a pair when they share six consecutive lines of code that are equal after
names, strings and numbers are replaced by placeholders. Blank lines, comments, docstrings, imports
and lines without a name do not count, nor do runs of fewer than three different lines, such as
lists of fields. `--repeats` also lists the pairs.
"""

import argparse
import ast
import io
import itertools
import keyword
import re
import tokenize
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath

SOURCE = ("openrlhf_alp", "services")
EVERYTHING = (*SOURCE, "tests", "benchmarks", "examples")

MAX_FUNCTION_LINES = 60
RUN_LINES = 6
MIN_DIFFERENT = 3
"""A run with fewer different lines is a list of fields or arguments, not repeated logic."""
MAX_PLACES = 8
"""A run of lines that stands in more places than this is an idiom of the language."""

PRAGMA = re.compile(r"#(!| *(noqa|type:|fmt:|ruff:|mypy:|pragma:|isort:|pylint:))")
TOKEN = re.compile(
    r"""(?P<string>[bfru]{0,2}("(\\.|[^"\\])*"|'(\\.|[^'\\])*'))|(?P<number>\b\d[\w.]*)|\b\w+\b""",
    re.IGNORECASE,
)

Line = tuple[int, str]
"""Line number and content."""


@dataclass(frozen=True, kw_only=True)
class File:
    """One Python file."""

    path: PurePath
    """Relative to the root."""
    text: str

    @cached_property
    def num_lines(self) -> int:
        return len(self.text.splitlines())

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def module(self) -> str:
        """The dotted name; a package has the name of its folder."""
        return ".".join(self.path.with_suffix("").parts).removesuffix(".__init__")

    @cached_property
    def import_lines(self) -> set[int]:
        nodes = (n for n in ast.walk(self.tree) if isinstance(n, ast.Import | ast.ImportFrom))
        return {line for node in nodes for line in _span(node)}

    @cached_property
    def comments(self) -> list[tokenize.TokenInfo]:
        """Every comment, pragmas included."""
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        return [token for token in tokens if token.type == tokenize.COMMENT]

    def code_lines(self) -> list[Line]:
        """The lines that count for repeats, with comments and outer spaces removed."""
        lines = self.text.splitlines()
        for comment in self.comments:
            row, column = comment.start
            lines[row - 1] = lines[row - 1][:column]
        left_out = self.import_lines | set(_docstring_lines(self.tree))
        return [
            (number, line.strip())
            for number, line in enumerate(lines, start=1)
            if number not in left_out and re.search("[a-zA-Z]", shape(line))
        ]


def read_files(root: Path, folders: Sequence[str]) -> list[File]:
    """The Python files below `folders` of `root`, in the order of their paths."""
    paths = sorted(path for folder in folders for path in (root / folder).rglob("*.py"))
    return [File(path=path.relative_to(root), text=path.read_text("utf-8")) for path in paths]


def import_circles(files: Sequence[File]) -> list[set[str]]:
    """Groups of modules that import each other, directly or by others.

    Every import statement counts, also under TYPE_CHECKING and inside functions.
    """
    names = {file.module for file in files}
    graph = {file.module: set(_imported(file, names)) - {file.module} for file in files}
    reached = {name: _reachable(graph, name) for name in graph}
    groups = {
        frozenset(other for other in reached[name] if name in reached[other])
        for name in graph
        if name in reached[name]
    }
    return [set(group) for group in groups]


def _imported(file: File, names: set[str]) -> Iterator[str]:
    """The modules of `names` that `file` imports; `from a import b` means a.b if that is one."""
    package = file.module.split(".")
    if file.path.name != "__init__.py":
        package.pop()
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import):
            yield from names.intersection(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield from {inner} & names or {base} & names


def _reachable(graph: Mapping[str, set[str]], start: str) -> set[str]:
    """All that `start` leads to; `start` itself only through a circle."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph[waiting.pop()] - seen
        seen |= new
        waiting += new
    return seen


def long_functions(files: Iterable[File]) -> list[str]:
    """Where a function stands that has more than MAX_FUNCTION_LINES, decorators not counted."""
    return [
        f"{file.path}:{node.lineno}"
        for file in files
        for node in ast.walk(file.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and len(_span(node)) > MAX_FUNCTION_LINES
    ]


def num_comments(files: Iterable[File]) -> int:
    """Comments that are neither a shebang nor a pragma for a tool."""
    return sum(not PRAGMA.match(comment.string) for file in files for comment in file.comments)


def repeats(files: Sequence[File], normalise: Callable[[str], str]) -> dict[tuple[str, str], Line]:
    """Pairs of files that share a run of lines, each with the place of the first run.

    A pair is counted once however many runs it shares; a file may be paired with itself.

    Args:
        normalise: what a line is compared by.
    """
    places: dict[tuple[str, ...], list[tuple[str, int, int]]] = defaultdict(list)
    for file in files:
        lines = file.code_lines()
        keys = [normalise(line) for _, line in lines]
        for at in range(len(keys) - RUN_LINES + 1):
            # The index is kept beside the line number: overlap is a matter of code lines.
            places[tuple(keys[at : at + RUN_LINES])].append((str(file.path), at, lines[at][0]))
    pairs: dict[tuple[str, str], Line] = {}
    for run, found in places.items():
        if len(found) > MAX_PLACES or len(set(run)) < MIN_DIFFERENT:
            continue
        for (one, at, line), (other, other_at, other_line) in itertools.combinations(found, 2):
            if one != other or other_at - at >= RUN_LINES:
                pairs.setdefault((one, other), (line, f"{other}:{other_line}"))
    return pairs


def shape(line: str) -> str:
    """The line with names as `x`, strings as `"` and numbers as `0`; the rest stays, unspaced."""
    return "".join(TOKEN.sub(_placeholder, line).split())


def _placeholder(token: re.Match[str]) -> str:
    if token["string"]:
        return '"'
    if token["number"]:
        return "0"
    return f"{token[0]}." if keyword.iskeyword(token[0]) else "x"


def _docstring_lines(tree: ast.Module) -> Iterator[int]:
    """Lines of strings that stand alone, which are docstrings of functions, classes and fields."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield from _span(node)


def _span(node: ast.stmt) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def figures(root: Path) -> list[tuple[str, str, str]]:
    """Rows of figure, measured and asked."""
    files = [file for file in read_files(root, SOURCE) if file.num_lines]
    everything = read_files(root, EVERYTHING)
    lines = sum(file.num_lines for file in files)
    all_kilolines = sum(file.num_lines for file in everything) / 1000
    imports = sum(len(file.import_lines) for file in files)
    longest = max(files, key=lambda file: file.num_lines)
    folders = Counter(str(file.path.parent) for file in read_files(root, SOURCE))
    [(folder, count)] = folders.most_common(1)
    alike = len(repeats(everything, shape)) / all_kilolines
    identical = len(repeats(everything, str)) / all_kilolines
    return [
        ("import circles, TYPE_CHECKING included", f"{len(import_circles(files))}", "0"),
        (f"functions over {MAX_FUNCTION_LINES} lines", f"{len(long_functions(files))}", "0"),
        ("longest file", f"{longest.num_lines}  {longest.path}", "<= 400"),
        ("files with a line, per 1,000 lines", f"{1000 * len(files) / lines:.1f}", "<= 6.5"),
        ("import lines", f"{imports / lines:.1%}", "<= 6.0%"),
        ("comments per 1,000 lines", f"{1000 * num_comments(files) / lines:.1f}", "about 20"),
        ("flat folder with the most files", f"{count}  {folder}", "<= 14"),
        ("source lines", f"{lines:,}", "<= 22,500"),
        ("pairs that repeat, per 1,000 lines", f"{alike:.2f}", "<= 1.2"),
        ("identical pairs, per 1,000 lines", f"{identical:.2f}", "<= 0.1"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--repeats", action="store_true", help="list the pairs that repeat")
    arguments = parser.parse_args()
    print(f"{'figure':<40} {'measured':<48} asked")
    for name, measured, asked in figures(arguments.root):
        print(f"{name:<40} {measured:<48} {asked}")
    if arguments.repeats:
        files = read_files(arguments.root, EVERYTHING)
        identical = repeats(files, str)
        for pair, (line, other) in sorted(repeats(files, shape).items()):
            print(f"{pair[0]}:{line} ~ {other}{' identical' if pair in identical else ''}")


if __name__ == "__main__":
    main()

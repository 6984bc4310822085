"""Two kinds of import contract that import-linter does not bring: allow-lists, and no circles.

`pyproject.toml` names them under `contract_types`; `make lint` runs them with the others. Both read
the graph that grimp builds, so imports inside functions and under TYPE_CHECKING count.
"""

import graphlib
import sys
from typing import Any

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output


class AllowListContract(Contract):
    """The importers may import what is listed, themselves and the standard library, nothing else.

    Options:
        importers: packages whose direct imports are checked, descendants included.
        allowed: modules or packages that they may import, descendants included. `services.*.wire`
            means the package `wire` of each service.
        judged: check imports of these packages only (optional). Without it every import is
            checked, also those of third-party packages.
    """

    type_name = "allow_list"

    importers = fields.ListField(subfield=fields.StringField())
    allowed = fields.ListField(subfield=fields.StringField(), required=False, default=[])
    judged = fields.ListField(subfield=fields.StringField(), required=False, default=[])

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        """Collect the imports that no list allows."""
        options: dict[str, list[str]] = {
            "importers": list(self.importers),  # type: ignore[call-overload]
            "allowed": list(self.allowed),  # type: ignore[call-overload]
            "judged": list(self.judged),  # type: ignore[call-overload]
        }
        forbidden = [
            (importer, imported)
            for importer in sorted(graph.modules)
            if _within(importer, options["importers"])
            for imported in sorted(graph.find_modules_directly_imported_by(importer))
            if _is_judged(imported, **options)
        ]
        return ContractCheck(kept=not forbidden, metadata={"forbidden": forbidden})

    def render_broken_contract(self, check: ContractCheck) -> None:
        """Print one line per import, and what would be allowed."""
        forbidden: Any = check.metadata["forbidden"]
        for importer, imported in forbidden:
            output.print_error(f"{importer} imports {imported}", bold=False)
        allowed = ", ".join(self.allowed) or "nothing"  # type: ignore[arg-type]
        output.print(f"Allowed besides the standard library: {allowed}.")


class NoCirclesContract(Contract):
    """No file of the root packages imports itself by way of others.

    import-linter's own `acyclic_siblings` compares folders. Two folders may use each other here
    (an engine reads a checkpoint, the weight store calls the engine); two files may not.
    """

    type_name = "no_circles"

    packages = fields.ListField(subfield=fields.StringField())

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        """Look for one circle; a topological order exists if there is none."""
        packages: list[str] = list(self.packages)  # type: ignore[call-overload]
        modules = {module for module in graph.modules if _within(module, packages)}
        imports = {
            module: graph.find_modules_directly_imported_by(module) & modules for module in modules
        }
        try:
            graphlib.TopologicalSorter(imports).prepare()
        except graphlib.CycleError as error:
            return ContractCheck(kept=False, metadata={"circle": error.args[1]})
        return ContractCheck(kept=True, metadata={})

    def render_broken_contract(self, check: ContractCheck) -> None:
        """Print the circle, each file beside the one that imports it."""
        circle: Any = check.metadata["circle"]
        output.print_error(" is imported by ".join(circle), bold=False)


def _within(module: str, packages: list[str]) -> bool:
    return any(_starts_with(module.split("."), package.split(".")) for package in packages)


def _starts_with(names: list[str], pattern: list[str]) -> bool:
    pairs = zip(names, pattern, strict=False)
    return len(names) >= len(pattern) and all(expected in ("*", name) for name, expected in pairs)


def _is_judged(
    imported: str, *, importers: list[str], allowed: list[str], judged: list[str]
) -> bool:
    """Whether the contract forbids to import this module."""
    if judged and not _within(imported, judged):
        return False
    if imported.split(".")[0] in sys.stdlib_module_names:
        return False
    return not _within(imported, [*importers, *allowed])

"""The order of the modules: who may import whom. The imports are read from the source, those inside functions too."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

SRC = Path(__file__).resolve().parents[1] / "src"

# From the ground up: a module imports from lower levels, and from its own as long as there is no cycle.
LEVELS = (
    {"collecting", "dtypes", "errors", "keys", "limits", "views"},
    {"manifest", "nodes", "report", "tree"},
    {"io", "numerics"},
    {"formats"},
    {"bridge", "memory"},
    {"aligning", "checkpoint", "knowledge", "lazy_tensor", "prefixes", "recipes", "rules"},
    {"ops", "runs"},
    {"doors"},
    {"torch"},
    {"__init__"},
    {"cli"},
    {"__main__"},
)

# Packages that aren't in the standard library, and the parts of the program that may import them.
OUTSIDERS = {
    "accelerate": {"torch"},
    "fsspec": {"io"},
    "gguf": {"formats"},
    "isal": {"io"},
    "lightning": {"torch"},
    "ml_dtypes": {"numerics", "torch"},
    "numpy": {"numerics", "torch"},
    "regex": {"rules"},
    "rich": {"cli", "report"},
    "tomli": {"knowledge", "rules"},
    "tomli_w": {"rules"},
    "tomllib": {"knowledge", "rules"},  # of the standard library from Python 3.11 on
    "torch": {"torch"},
    "transformers": {"torch"},
    "xxhash": {"formats", "io", "ops", "runs", "torch"},
}

# The modules that import by a name that isn't written out, each from a table of its own. A file never supplies it.
BY_TABLE = {"statedict", "statedict.cli.parser", "statedict.formats.constructors"}

# The module that imports what the user names on the command line, by hand.
BY_HAND = {"statedict.cli.factories"}

# What runs, or finds by name, whatever a file says.
EXECUTORS = {"code", "dill", "joblib", "marshal", "pickle", "runpy", "shelve"}


class Import(NamedTuple):
    """One import: the module that has it, the module that it names, and where it stands."""

    importer: str
    target: str
    line: int
    late: bool  # inside a function
    types_only: bool  # under ``if TYPE_CHECKING``

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}"


def module_name(path: Path) -> str:
    """``statedict.io.ranges`` for ``src/statedict/io/ranges.py``, ``statedict.io`` for its ``__init__.py``."""
    return ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(SRC.rglob("*.py"))}


def part(module: str) -> str:
    """The room of the house that a module is in: ``io`` for ``statedict.io.ranges``."""
    return module.split(".")[1] if "." in module else "__init__"


def level(module: str) -> int:
    return next((at for at, parts in enumerate(LEVELS) if part(module) in parts), -1)


def imports_of(module: str, tree: ast.Module) -> Iterator[Import]:
    pending: list[tuple[ast.AST, bool, bool]] = [(tree, False, False)]
    while pending:
        node, late, types_only = pending.pop()
        for target in targets(node):
            yield Import(module, target, getattr(node, "lineno", 0), late, types_only)
        if isinstance(node, ast.If) and "TYPE_CHECKING" == ast.unparse(node.test).rpartition(".")[2]:
            pending += [(child, late, True) for child in node.body]
            pending += [(child, late, types_only) for child in node.orelse]
        else:
            inside = late or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            pending += [(child, inside, types_only) for child in ast.iter_child_nodes(node)]


def targets(node: ast.AST) -> list[str]:
    """The modules that a statement or call imports. Relative imports are refused by the linter."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        return [name if name in MODULES else str(node.module) for name in names]
    if isinstance(node, ast.Call) and called(node) in ("import_module", "__import__"):
        return [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    return []


def called(node: ast.Call) -> str:
    """The last word of what is called: ``import_module`` for ``importlib.import_module(…)``."""
    return ast.unparse(node.func).rpartition(".")[2]


TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
IMPORTS = [found for name, tree in TREES.items() for found in imports_of(name, tree)]
OWN = [found for found in IMPORTS if found.target.split(".")[0] == "statedict"]
FOREIGN = [found for found in IMPORTS if found.target.split(".")[0] not in {"statedict", *sys.stdlib_module_names}]


def is_door(found: Import) -> bool:
    """The late import of ``statedict.torch`` that the bridge, the doors and the command line may have."""
    return part(found.target) == "torch" and found.late and part(found.importer) in ("bridge", "cli", "doors")


def test_every_module_has_a_level() -> None:
    homeless = [name for name in MODULES if level(name) < 0]

    assert [] == homeless


def test_imports_go_downwards() -> None:
    upwards = [str(found) for found in OWN if level(found.target) > level(found.importer) and not is_door(found)]

    assert [] == upwards


def test_the_package_itself_imports_nothing_before_it_is_used() -> None:
    early = [str(found) for found in IMPORTS if found.importer == "statedict" and not (found.late or found.types_only)]

    assert [] == early


def test_modules_of_one_level_do_not_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {name: set() for name in MODULES}
    for found in OWN:
        if found.target != found.importer and not is_door(found):
            graph[found.importer].add(found.target)

    TopologicalSorter(graph).prepare()  # CycleError names the circle


def test_nothing_is_imported_from_outside_but_where_it_belongs() -> None:
    strayed = [
        str(found)
        for found in FOREIGN
        if not found.types_only and part(found.importer) not in OUTSIDERS.get(found.target.split(".")[0], ())
    ]

    assert [] == strayed


def test_the_bridge_and_the_command_line_import_torch_late() -> None:
    early = [
        str(found)
        for found in OWN
        if part(found.target) == "torch" and part(found.importer) != "torch" and not (found.late or found.types_only)
    ]

    assert [] == early


def test_nothing_that_runs_foreign_code_is_imported() -> None:
    executors = [str(found) for found in IMPORTS if found.target.split(".")[0] in EXECUTORS]

    assert [] == executors


def test_names_are_imported_from_tables_only_where_that_is_known() -> None:
    calls = [(name, node) for name, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, ast.Call)]
    computed = {name for name, node in calls if called(node) == "import_module" and not targets(node)}

    assert set() == computed - BY_TABLE - BY_HAND


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_evaluated(name: str) -> None:
    calls = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    evaluated = [f"{name}:{node.lineno}" for node in calls if called(node) in ("__import__", "compile", "eval", "exec")]

    assert [] == evaluated


def test_no_module_bears_the_name_of_a_function_of_the_package() -> None:
    import statedict

    functions = {f"statedict.{name}" for name in statedict.__all__ if callable(getattr(statedict, name))}

    assert set() == functions & set(MODULES)

"""The public names: they exist, they are explained, and the three lists of them agree."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from types import ModuleType

import pytest

import statedict

SRC = Path(statedict.__file__).parent


def is_public(path: Path) -> bool:
    """Whether a module can be imported here and is meant to be: not ``__main__``, and not what needs torch."""
    return path.name != "__main__.py" and path.relative_to(SRC).parts[0] != "torch"


MODULES = [
    ".".join(("statedict", *path.relative_to(SRC).with_suffix("").parts)).removesuffix(".__init__")
    for path in sorted(SRC.rglob("*.py"))
    if is_public(path)
]


def defined(module: ModuleType) -> list[str]:
    """The public functions and classes that a module's own source defines."""
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]


def type_checkers_names() -> list[str]:
    """The names that ``if TYPE_CHECKING`` imports in the package's ``__init__``."""
    tree = ast.parse((SRC / "__init__.py").read_text(encoding="utf-8"))
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    return [alias.name for node in imports for alias in node.names]


@pytest.mark.parametrize("name", statedict.__all__)
def test_every_public_name_can_be_had(name: str) -> None:
    assert getattr(statedict, name) is getattr(statedict, name)


def test_a_type_checker_sees_the_same_names() -> None:
    assert set(statedict.__all__) - {"__version__"} == set(type_checkers_names())


def test_dir_lists_the_public_names() -> None:
    assert sorted(statedict.__all__) == dir(statedict)


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'load_everything'"):
        _ = statedict.load_everything


def test_every_error_of_the_tree_is_public() -> None:
    from statedict import errors

    family = {name for name in errors.__all__ if isinstance(getattr(errors, name), type)}

    assert family <= set(statedict.__all__)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_lists_its_public_names(name: str) -> None:
    """Their order is the linter's rule RUF022."""
    module = importlib.import_module(name)
    listed = getattr(module, "__all__", [])
    unlisted = [own for own in defined(module) if own not in listed]
    absent = [own for own in listed if not hasattr(module, own)]

    assert ([], []) == (unlisted, absent)


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_is_explained(name: str) -> None:
    module = importlib.import_module(name)
    public = {own: getattr(module, own) for own in getattr(module, "__all__", [])}
    functions = [own for own, value in public.items() if callable(value) and getattr(value, "__module__", "") == name]
    silent = [own for own in functions if not (public[own].__doc__ or "").strip()]

    assert ([], True) == (silent, bool(module.__doc__))

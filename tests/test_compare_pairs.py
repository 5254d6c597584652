"""Renames between the real names and shapes of two libraries, with random values: none may be wrong."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from statedict.ops.compare import compare

Array = np.ndarray[Any, Any]

# Source elements of a case: larger ones would only take longer.
MOST_NUMEL = 3_000_000


def made(op: str, sources: list[Array], args: dict[str, Any]) -> Array | None:
    """The target of an operation; None for those of several steps."""
    if {"each", "then", "group"} & set(args) or op == "permute":
        return None
    first = sources[0]
    if op in ("split", "slice"):
        place = [slice(None)] * first.ndim
        place[args["dim"]] = slice(args["start"], args["stop"])
        return first[tuple(place)]
    if op == "unstack":
        return first.take(args["index"], args["dim"])
    if op == "concat":
        return np.concatenate(sources, args["dim"])
    if op == "stack":
        return np.stack(sources, args["dim"])
    return first.swapaxes(*args["dims"]) if op == "transpose" else first


def values(case: dict[str, Any], is_fresh: bool) -> dict[str, Array]:
    """Random values for the source; with ``is_fresh`` vectors are constants, as those of a new model."""
    generator = np.random.default_rng(1)
    found: dict[str, Array] = {}
    for key, shape, dtype in case["source"]:
        if dtype.startswith("int"):
            found[key] = np.arange(np.prod(shape, dtype=int)).reshape(shape)
        elif is_fresh and len(shape) == 1:
            found[key] = np.full(shape, "norm" in key or "ln" in key, np.float32)
        else:
            found[key] = np.asarray(generator.standard_normal(shape), np.float32)
    return found


@pytest.mark.parametrize("is_fresh", [False, True])
def test_no_rename_is_wrong_and_few_are_missed(shared: Path, is_fresh: bool) -> None:
    counts: Counter[str] = Counter()
    wrong = []
    for path in sorted((shared / "data" / "pairs").glob("*.json")):
        case = json.loads(path.read_text(encoding="utf-8"))
        numel = sum(np.prod(shape, dtype=int) for _, shape, _ in case["source"])
        if case["expect"] != "align" or case["kind"] == "noise" or numel > MOST_NUMEL:
            continue
        source, shapes = values(case, is_fresh), {key: shape for key, shape, _ in case["target"]}
        truth = {entry["target"]: entry for entry in case["truth"]}
        target: dict[str, Array] = {}
        for key, entry in truth.items():
            found = made(entry["op"], [source[name] for name in entry["sources"]], entry.get("args") or {})
            if found is not None:
                target[key] = np.ascontiguousarray(found).reshape(shapes[key])
        result = compare(source, target)
        counts["missed"] += sum(truth[key]["op"] != "copy" or key not in source for key in result.only_in_b)
        for rename in result.renamed:
            a, b = ([keys] if isinstance(keys := rename[side], str) else list(keys) for side in "ab")
            for key in b:
                wanted = truth[key]["sources"]
                counts["found"] += 1
                equal = len(a) == len(wanted) and all(np.array_equal(source[x], source[y]) for x, y in zip(a, wanted))
                if wanted != a and not (equal and rename["proof"] != "same structure"):
                    wrong.append((case["name"], rename, wanted))

    assert [] == wrong
    assert counts["found"] > (5 if is_fresh else 50) * counts["missed"]

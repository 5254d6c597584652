"""How many names each way aligns rightly and wrongly, and what 10,000 names cost.

    python benchmarks/aligning.py [FOLDER of pairs]

The folder (default ../shared/data/pairs) holds cases with their truth, and ``score.py``, which judges them and has the baselines.
``hungarian`` needs scipy and is left out where that isn't there.
"""

from __future__ import annotations

import collections
import importlib.util
import json
import statistics
import sys
import time
import zlib
from pathlib import Path
from types import ModuleType

from statedict.aligning import Side, align
from statedict.aligning.alignment import Spec

DEFAULT = Path(__file__).resolve().parents[2] / "shared" / "data" / "pairs"
BASELINES = ("exact", "suffix", "difflib", "hungarian")
FOLDS = 5
REPEATS = 5


def scorer(folder: Path) -> ModuleType:
    """``score.py`` of the folder."""
    spec = importlib.util.spec_from_file_location("score", folder / "score.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def side(entries: list[tuple[str, list[int], str]]) -> Side:
    """The names and shapes of one side of a case."""
    return Side({key: Spec(tuple(shape), dtype) for key, shape, dtype in entries})


def plan(case: dict) -> list[dict]:
    """Our answer to a case, as ``score.py`` takes it."""
    found = align(side(case["source"]), side(case["target"]))
    return [
        {"target": m.target, "op": m.op, "sources": list(m.sources), "tier": m.tier, "args": dict(m.args)}
        for m in found.mapped
    ]


def row(name: str, count: collections.Counter, seconds: float | None = None) -> str:
    recall, changed = (100 * count[p + "right"] / max(1, count[p + "keys"]) for p in ("", "changed "))
    took = f"  {seconds:6.1f} s" if seconds is not None else ""
    refused = f"{count['refused']} of {count['controls']}"
    return f"{name:12} {count['right']:6} {count['wrong']:6}  {recall:5.1f} %  {changed:5.1f} %  {refused}{took}"


def compare(folder: Path) -> None:
    """The table of ours and the baselines; ours by kind, and by fold of families."""
    score = scorer(folder)
    cases = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    print(f"{'':12} {'right':>6} {'wrong':>6}   recall  changed  refused")
    parts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for method in ("statedict", *BASELINES):
        if method == "hungarian" and importlib.util.find_spec("scipy") is None:
            continue
        total: collections.Counter = collections.Counter()
        start = time.perf_counter()
        for case in cases:
            count, _ = score.score(case, plan(case) if method == "statedict" else score.baseline(case, method))
            total += count
            if method == "statedict":
                parts[case["kind"]] += count
                parts[f"fold {zlib.crc32(case['family'].encode()) % FOLDS}"] += count
        print(row(method, total, time.perf_counter() - start))
    for name, count in sorted(parts.items()):
        print(row(name, count))


def layers(count: int, *, renamed: bool) -> Side:
    """A network of so many blocks of 100 tensors each, with experts, under the names of one of two libraries."""
    inner = {
        "attention.wq": ("self_attn.query", (32, 32)),
        "attention.wk": ("self_attn.key", (32, 32)),
        "attention.wv": ("self_attn.value", (16, 32)),
        "attention.wo": ("self_attn.o_proj", (32, 32)),
        "feed_forward.w1": ("mlp.gate_proj", (96, 32)),
        "feed_forward.w2": ("mlp.down_proj", (32, 96)),
        "feed_forward.w3": ("mlp.up_proj", (96, 32)),
        "attention_norm": ("input_layernorm", (32,)),
        "ffn_norm": ("post_attention_layernorm", (32,)),
        "moe.gate": ("mlp.router", (30, 32)),
    }
    for n in range(30):
        inner[f"moe.experts.{n}.w1"] = (f"mlp.experts.{n}.gate_proj", (64, 32))
        inner[f"moe.experts.{n}.w2"] = (f"mlp.experts.{n}.down_proj", (32, 64))
        inner[f"moe.experts.{n}.w3"] = (f"mlp.experts.{n}.up_proj", (64, 32))
    prefix = "model.layers" if renamed else "layers"
    return Side(
        {
            f"{prefix}.{layer}.{other if renamed else name}.weight": Spec(shape, "float32")
            for layer in range(count)
            for name, (other, shape) in inner.items()
        }
    )


def measure() -> None:
    """Seconds for networks of more and more names: median of a few runs."""
    for count in (25, 50, 100):
        source, target = layers(count, renamed=False), layers(count, renamed=True)
        seconds = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            found = align(source, target)
            seconds.append(time.perf_counter() - start)
        claims = sum(mapped.is_claim for mapped in found.mapped)
        print(
            f"{len(target.tensors):6} names, {claims:6} claimed: {statistics.median(seconds):.2f} s (of {REPEATS}, min {min(seconds):.2f})"
        )


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT
    if folder.is_dir():
        compare(folder)
    measure()


if __name__ == "__main__":
    main()

"""Whatever torch holds in memory comes back from shards of any size, as it does from one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import statedict
from statedict.ops.shards import plan_shards, shard_target, write_shards
from statedict.ops.sources import source_of
from statedict.ops.writing import Tree

torch = pytest.importorskip("torch")

import saved_trees  # noqa: E402
import saved_values  # noqa: E402

# torch says of complex32 that it is experimental.
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support")


def without_strides(facts: Any) -> Any:
    """The plain form of a value without the strides: gaps between elements are left out of a file."""
    if isinstance(facts, tuple) and facts[:1] == ("tensor",) and len(facts) == 7:
        return (*facts[:3], *facts[4:])
    if type(facts) in (list, tuple):
        return type(facts)(without_strides(item) for item in facts)
    return facts


def written(value: Any, path: str, most: int) -> Path:
    """The index that is written of a value, with its shards; without waiting for the disk."""
    target = shard_target(path, most)
    assert target is not None
    with statedict.open({"value": value}) as checkpoint:
        tree = Tree(checkpoint.manifest.structure, {}, lambda entry: source_of(entry, checkpoint))
        write_shards(plan_shards(tree, target, digests=True), target, overwrite=False, durable=False)
    return Path(path)


@settings(max_examples=80)
@given(saved_trees.trees(), st.sampled_from([1, 40, 200, 1000]))
def test_a_tree_comes_back_from_shards(tmp_path_factory: pytest.TempPathFactory, value: Any, most: int) -> None:
    path = written(value, str(tmp_path_factory.mktemp("shards") / "m.safetensors.index.json"), most)
    found = statedict.load(path)["value"]

    assert without_strides(saved_values.facts(value)) == without_strides(saved_values.facts(found))
    assert saved_trees.memory_overlaps(value) == saved_trees.memory_overlaps(found)


@settings(max_examples=40)
@given(st.lists(st.integers(0, 30), max_size=12), st.integers(1, 60))
def test_no_shard_is_larger_than_it_may_be(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], most: int
) -> None:
    value = {f"t{at}": torch.full((size,), at, dtype=torch.uint8) for at, size in enumerate(sizes)}
    path = written(value, str(tmp_path_factory.mktemp("shards") / "m.safetensors.index.json"), most)
    shards = sorted(path.parent.glob("m-*.safetensors"))
    parts = [[checkpoint[key].nbytes for key in checkpoint] for checkpoint in map(statedict.open, shards)]

    assert sorted(sizes) == sorted(size for part in parts for size in part)
    assert all(sum(part) <= most or len(part) == 1 for part in parts)
    assert {f"value.{key}": item.tolist() for key, item in value.items()} == {
        f"value.{key}": item.tolist() for key, item in statedict.load(path)["value"].items()
    }

"""Mappings and modules in memory are checkpoints: nothing of them is copied, and what is shared is seen as shared."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, namedtuple
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import statedict
from statedict import Unsupported
from statedict.errors import CorruptFile


def test_arrays_are_seen_as_they_lie_in_memory() -> None:
    base = np.arange(24.0).reshape(4, 6)
    value = {"base": base, "columns": base[:, 1::2], "t": base.T, "one": base[2], "f": np.asfortranarray(base)}
    with statedict.open(value) as found:
        read = {key: found[key].numpy() for key in found}
        storages = {found[key].entry.view.storage.id for key in ("base", "columns", "t", "one")}  # type: ignore[union-attr]

    assert all(np.array_equal(value[key], read[key]) for key in value)
    assert 1 == len(storages)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(5)[::-1],
        np.arange(3, dtype=">i4"),
        np.array(2.5, np.float32),
        np.zeros((0, 3)),
        np.array([True, False]),
        np.array([1 + 2j], np.complex64),
        np.ones(3, ml_dtypes.bfloat16),
        np.ones(3, ml_dtypes.float8_e4m3fn),
        np.broadcast_to(np.arange(3), (2, 3)),
    ],
    ids=lambda array: f"{array.dtype}{list(array.shape)}",
)
def test_every_array_is_read_back(array: np.ndarray) -> None:  # type: ignore[type-arg]
    with statedict.open({"x": array}) as found:
        read = found["x"].numpy()

    assert array.shape == read.shape
    assert array.astype(read.dtype).tobytes() == read.tobytes()


def test_no_byte_is_copied() -> None:
    array = np.zeros(10)
    with statedict.open({"x": array}) as found:
        array[3] = 7

        assert 7 == found["x"].numpy()[3]


def test_an_array_becomes_a_file(tmp_path: Path) -> None:
    value = {"a": np.arange(3.0, dtype=np.float32), "b": {"c": np.ones(2, np.int8)}, "epoch": 3}
    statedict.convert(value, tmp_path / "m.safetensors")

    assert {"a", "b.c"} == set(load_file(tmp_path / "m.safetensors"))
    with statedict.open(tmp_path / "m.safetensors") as found:
        assert {"epoch": 3} == found.objects


def test_lazy_tensors_of_several_files_make_one(tmp_path: Path) -> None:
    save_file({"x": np.arange(3.0)}, tmp_path / "1.safetensors")
    save_file({"x": np.arange(5.0)}, tmp_path / "2.safetensors")
    with statedict.open(tmp_path / "1.safetensors") as one, statedict.open(tmp_path / "2.safetensors") as two:
        statedict.convert({"a": one["x"], "b": two["x"][1:3], "again": one["x"]}, tmp_path / "both.safetensors")

        with statedict.open({"a": one["x"]}) as inner:
            pass
        assert [0, 1, 2] == one["x"].numpy().tolist(), inner
    with statedict.open(tmp_path / "both.safetensors") as found:
        assert {"a": [0, 1, 2], "b": [1, 2], "again": [0, 1, 2]} == {k: found[k].numpy().tolist() for k in found}
        assert ("again",) == found["a"].tied_with


@dataclasses.dataclass
class Record:
    """Stands for an object of a user's own class."""

    name: str
    weight: object


Point = namedtuple("Point", "x y")


def test_objects_become_inert_records() -> None:
    with statedict.open({"r": Record("n", np.ones(2)), "p": Point(1, 2), "f": len, "c": Record}) as found:
        tree = found.tree()

        assert ["r.weight"] == list(found)
        assert (f"{__name__}.Record", "n") == (tree["r"].type, tree["r"].state["name"])
        assert (1, 2) == tree["p"].args
        assert "builtins.len" == tree["f"].type


def test_the_order_and_metadata_of_an_ordered_dict_are_kept() -> None:
    value = OrderedDict(b=np.ones(1), a=np.ones(1))
    value._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    with statedict.open(value) as found:
        tree = found.tree()

    assert ["b", "a"] == list(tree)
    assert OrderedDict({"": {"version": 1}}) == tree._metadata


def test_a_container_that_contains_itself_is_an_error() -> None:
    value: dict[str, object] = {}
    value["self"] = value

    with pytest.raises(CorruptFile, match="contains itself"):
        statedict.open(value)


@pytest.mark.parametrize("value", [3, [1], object()])
def test_what_is_no_source_is_refused(value: object) -> None:
    with pytest.raises(Unsupported, match="Give a path"):
        statedict.open(value)

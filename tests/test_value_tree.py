"""Odd values that torch saves, and values made to harm, become trees or one of our errors; no tensor goes unseen."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest

import statedict
from statedict.errors import CorruptFile, LimitExceeded, StateDictError

torch = pytest.importorskip("torch")

import numpy as np  # noqa: E402
from saved_values import packed, saved  # noqa: E402

STORAGES = "ignore:.*TypedStorage is deprecated"


def tagged(**attributes: Any) -> Any:
    tensor = torch.arange(3.0)
    for name, value in attributes.items():
        setattr(tensor, name, value)
    return tensor


def test_a_tensor_with_a_tensor_as_attribute_has_its_own_values(tmp_path: Path) -> None:
    tensor = tagged(mask=torch.zeros(2))
    with statedict.open(saved({"a": tensor}, tmp_path / "m.pt")) as checkpoint:
        found = checkpoint["a"]

        assert (12, packed(tensor)) == (found.nbytes, bytes(found.read()))
        assert [0.0, 0.0] == found.parts["mask"].numpy().tolist()


@pytest.mark.parametrize(
    "attribute",
    [
        torch.eye(2).to_sparse(),
        {torch.zeros(2)},
        {torch.zeros(2): 1},
        [torch.zeros(2)],
        tagged(inner=torch.zeros(1)),
        tagged(inner=tagged(inner=torch.zeros(1))),
    ],
    ids=["sparse", "set of tensors", "tensor as key", "list", "one level", "two levels"],
)
def test_any_attribute_of_a_tensor_opens(attribute: Any, tmp_path: Path) -> None:
    tensor = tagged(odd=attribute)
    with statedict.open(saved({"a": tensor}, tmp_path / "m.pt")) as checkpoint:
        assert packed(tensor) == bytes(checkpoint["a"].read())


def test_an_attribute_called_like_a_part_does_not_replace_it(tmp_path: Path) -> None:
    tensor = torch.eye(3).to_sparse()
    tensor.values_ = torch.zeros(1)
    stream = saved(tensor, tmp_path / "m.pt")
    with zipfile.ZipFile(stream) as archive:
        entries = [
            (entry.filename, archive.read(entry).replace(b"values_", b"indices")) for entry in archive.infolist()
        ]
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in entries:
            archive.writestr(name, data)
    with statedict.open(stream) as checkpoint:
        assert (2, 3) == checkpoint[()].parts["indices"].shape


def test_tensors_as_keys_get_names_that_are_the_same_each_time(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    path = saved(optimizer, tmp_path / "m.pt")
    with statedict.open(path) as first, statedict.open(path) as second:
        moments = [key for key in first if key.endswith(".exp_avg")]
        first.tree()

        assert (list(first), 2) == (list(second), len(moments))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("kind", ["meta", "quantised"])
def test_strides_are_kept_where_there_is_no_view(kind: str, tmp_path: Path) -> None:
    meta = torch.empty(3, 4, device="meta")
    tensor = meta.t() if kind == "meta" else torch.quantize_per_tensor(torch.randn(3, 4), 0.1, 0, torch.qint8).t()
    with statedict.open(saved(tensor, tmp_path / "m.pt")) as checkpoint:
        assert tensor.stride() == checkpoint[()].stride


@pytest.mark.filterwarnings(STORAGES)
def test_a_storage_that_stands_for_itself_is_readable(tmp_path: Path) -> None:
    tensor = torch.arange(3.0)
    path = saved({"s": tensor.storage(), "u": torch.arange(3.0).untyped_storage(), "t": tensor}, tmp_path / "m.pt")
    with statedict.open(path) as checkpoint:
        assert (packed(tensor),) * 2 == (bytes(checkpoint["s"].read()), bytes(checkpoint["u"].read()))
        assert ("t",) == checkpoint["s"].tied_with
        assert ("Storage", "float32", (3,)) == (
            checkpoint["s"].entry.kind,
            checkpoint["s"].dtype,
            checkpoint["s"].shape,
        )


def test_arrays_of_one_byte_are_not_tied(tmp_path: Path) -> None:
    value = {"a": np.array([5], dtype=np.uint8), "b": np.array([5], dtype=np.uint8)}
    with statedict.open(saved(value, tmp_path / "m.pt")) as checkpoint:
        assert () == checkpoint["a"].tied_with


def test_tensors_in_an_array_of_objects_are_reachable(tmp_path: Path) -> None:
    array = np.empty(2, dtype=object)
    array[0] = torch.arange(2.0)
    with statedict.open(saved({"a": array}, tmp_path / "m.pt")) as checkpoint:
        assert [[0.0, 1.0]] == [checkpoint[key].numpy().tolist() for key in checkpoint]


def test_a_big_endian_dtype_says_so(tmp_path: Path) -> None:
    with statedict.open(saved([np.dtype(">f4"), np.dtype("f4"), None], tmp_path / "m.pt")) as checkpoint:
        assert [(">f4",), ("f4",)] == [each.args for each in checkpoint.tree()[:2]]


class Node:
    """Stands for any object that knows its parent."""

    parent: Any = None
    children: Any = None


def test_objects_that_know_their_parents_open(tmp_path: Path) -> None:
    parent, child = Node(), Node()
    parent.children, child.parent = [child], parent
    child.weight = torch.ones(2)  # type: ignore[attr-defined]
    with statedict.open(saved({"a": parent}, tmp_path / "m.pt")) as checkpoint:
        assert ["a.children.0.weight"] == list(checkpoint)
        assert "builtins.reference" == checkpoint.objects["a.children.0.parent"].type  # type: ignore[attr-defined]


# ------------------------------------------------------------------------- made to harm


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def put(at: int) -> bytes:
    return b"q" + bytes([at])


def get(at: int) -> bytes:
    return b"h" + bytes([at])


# Sixty lists, each of which holds the one before it twice.
DOUBLING = b"]" + b"".join(put(i) + b"0](" + get(i) + get(i) + b"e" for i in range(60))
# The same with objects that are filled as mappings.
OBJECTS = b"N" + b"".join(
    put(i) + b"0" + name("a", "B") + b")\x81(K\x01" + get(i) + b"K\x02" + get(i) + b"u" for i in range(60)
)


def nested(depth: int, keys: list[bytes]) -> bytes:
    return b"N" if depth == 0 else b"}(" + b"".join(key + nested(depth - 1, keys) for key in keys) + b"u"


def long1(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


BAD: dict[str, tuple[bytes, type[StateDictError]]] = {
    "lists that double": (DOUBLING, LimitExceeded),
    "objects that double": (OBJECTS, LimitExceeded),
    "an attribute that doubles": (
        name("collections", "OrderedDict") + b")R" + text("k") + b"Ns}" + text("x") + DOUBLING + b"sb",
        LimitExceeded,
    ),
    "a list in itself": (b"]q\x00h\x00a", CorruptFile),
    "a dict in itself": (b"}q\x00K\x01h\x00s", CorruptFile),
    "paths of one hash: -1 and -2": (nested(14, [long1(-1), long1(-2)]), CorruptFile),
    "paths of one hash: large": (nested(3, [long1((2**61 - 1) * i) for i in range(1, 31)]), CorruptFile),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_tree_made_to_harm_is_refused(kind: str, tmp_path: Path) -> None:
    stream, error = BAD[kind]
    (tmp_path / "m.pkl").write_bytes(b"\x80\x02" + stream + b".")

    with pytest.raises(error):
        statedict.open(tmp_path / "m.pkl")


def test_a_chain_of_attributes_ends_in_one_of_our_errors(tmp_path: Path) -> None:
    tensor = name("torch._utils", "_rebuild_meta_tensor_no_storage") + b"(" + name("torch", "float32") + b"))\x89tR"
    stream = b"\x80\x02N" + b"".join(put(0) + b"0" + tensor + b"}" + text("a") + get(0) + b"sb" for _ in range(3000))
    (tmp_path / "m.pkl").write_bytes(stream + b".")

    with pytest.raises(LimitExceeded):
        statedict.open(tmp_path / "m.pkl")


def test_negative_keys_are_ordinary(tmp_path: Path) -> None:
    value = {key: {other: torch.ones(1) for other in range(-20, 20)} for key in range(-20, 20)}
    with statedict.open(saved(value, tmp_path / "m.pt")) as checkpoint:
        assert 1600 == len(checkpoint)

"""Every kind of leaf that torch can save, as torch itself loads it, or as an inert record of what nobody builds."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import random
import types
import uuid
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import pytest

import statedict
from statedict.manifest import Opaque

torch = pytest.importorskip("torch")

from saved_values import facts, found_facts, packed, saved  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(beta state|TypedStorage is deprecated|quantiz|ComplexHalf support|prototype stage).*"
)


def tree(value: object, tmp_path: Path, *, zipped: bool = True) -> Any:
    """What a file of torch's with that value shows."""
    with statedict.open(saved({"x": value}, tmp_path / "m.pt", zipped=zipped)) as checkpoint:
        made = checkpoint.tree()["x"]
        return (
            made
            if not isinstance(made, statedict.LazyTensor)
            else (made, bytes(made.read()) if made.entry.view else b"")
        )


DTYPES = [
    "float16", "float32", "float64", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
    "float8_e8m0fnu", "float4_e2m1fn_x2", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool",
    "complex32", "complex64", "complex128", "bits8", "bits16", "bits4x2",
]  # fmt: skip


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype(name: str, tmp_path: Path) -> None:
    dtype = getattr(torch, name)
    values = torch.arange(48, dtype=torch.uint8).view(dtype)
    if name == "bool":
        values = torch.arange(48) % 3 == 0
    tensor, content = tree(values, tmp_path)

    assert (name, tuple(values.shape)) == (tensor.dtype, tensor.shape)
    assert packed(values) == content


BASE = torch.arange(60.0).reshape(5, 12)
VIEWS = {
    "0-d": torch.tensor(3.5),
    "empty": torch.zeros(3, 0, 2),
    "a scalar of a storage": BASE[2, 3],
    "strided": BASE[::2, 1::3],
    "transposed": BASE.t(),
    "permuted": torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
    "channels last": torch.arange(120.0).reshape(1, 2, 3, 20).to(memory_format=torch.channels_last),
    "expanded": torch.arange(4.0).expand(3, 4),
    "an offset": BASE[3:],
    "windows": torch.arange(10.0).as_strided((8, 3), (1, 1)),
    "conjugate": torch.arange(6).to(torch.complex64).mul(1 + 2j).conj(),
    "negative": torch.arange(6).to(torch.complex64).mul(1 + 2j).conj().imag,
    "many dimensions": torch.arange(64.0).reshape(2, 2, 2, 2, 2, 2),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", VIEWS)
def test_every_kind_of_view(kind: str, zipped: bool, tmp_path: Path) -> None:
    value = VIEWS[kind]
    tensor, content = tree(value, tmp_path, zipped=zipped)

    assert (tuple(value.shape), value.stride()) == (tensor.shape, tensor.stride)
    assert packed(value) == content


def test_what_a_tensor_is_beside_its_values(tmp_path: Path) -> None:
    tagged = torch.ones(2)
    tagged.tag, tagged.mask = "hello", torch.zeros(3)
    value = {
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "frozen": torch.nn.Parameter(torch.ones(2), requires_grad=False),
        "buffer": torch.nn.Buffer(torch.ones(2)),
        "grad": torch.ones(2, requires_grad=True),
        "tagged": tagged,
        "meta": torch.ones(2, 3, device="meta"),
    }
    with statedict.open(saved(value, tmp_path / "m.pt")) as found:
        kinds = {key: found[key].entry.kind for key in found}
        grads = {key: found[key].requires_grad for key in found}

        assert "hello" == found["tagged"].entry.attributes["tag"]
        assert [0, 0, 0] == found["tagged"].parts["mask"].numpy().tolist()
        assert ("meta", (2, 3)) == (found["meta"].device, found["meta"].shape)
    assert ("Parameter", "Parameter", "Tensor") == (kinds["parameter"], kinds["frozen"], kinds["grad"])
    assert (True, False, True) == (grads["parameter"], grads["frozen"], grads["grad"])


class Tagged(torch.Tensor):  # type: ignore[misc]
    """Stands for a subclass that the reader hasn't."""


def test_a_subclass_is_inert_and_readable(tmp_path: Path) -> None:
    tensor, content = tree(torch.arange(4.0).as_subclass(Tagged), tmp_path)

    assert f"{__name__}.Tagged" == tensor.entry.kind
    assert np.arange(4.0, dtype=np.float32).tobytes() == content


@pytest.mark.parametrize("layout", ["coo", "csr", "csc", "bsr", "bsc"])
def test_every_sparse_layout(layout: str, tmp_path: Path) -> None:
    dense = torch.eye(4)
    dense[1, 2] = 5
    made = getattr(dense, "to_sparse" if layout == "coo" else f"to_sparse_{layout}")
    value = made((2, 2)) if layout in ("bsr", "bsc") else made()
    with statedict.open(saved({"x": value}, tmp_path / "m.pt")) as found:
        assert (f"sparse_{layout}", (4, 4)) == (found["x"].layout, found["x"].shape)
        assert facts(value)[3] == found_facts(found["x"])[3]  # type: ignore[index]
        assert torch.equal(dense, found["x"].torch().to_dense())


@pytest.mark.parametrize("name", ["qint8", "quint8", "qint32"])
def test_quantised_tensors(name: str, tmp_path: Path) -> None:
    dtype, values = getattr(torch, name), torch.linspace(-1, 1, 12).reshape(3, 4)
    whole = torch.quantize_per_tensor(values, 0.1, 2, dtype)
    rows = torch.quantize_per_channel(values, torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0, 1, 2]), 0, dtype)
    with statedict.open(saved({"whole": whole, "rows": rows}, tmp_path / "m.pt")) as found:
        assert {"qint8": "qint8"}.get(name, name) == found["whole"].dtype
        assert (0.1, 2) == tuple(found["whole"].entry.attributes[key] for key in ("scale", "zero_point"))
        assert torch.equal(whole.dequantize(), found["whole"].torch().dequantize())
        assert torch.equal(rows.dequantize(), found["rows"].torch().dequantize())


def test_nested_tensors_show_their_parts(tmp_path: Path) -> None:
    value = torch.nested.nested_tensor([torch.ones(2, 3), torch.zeros(1, 3)])
    with statedict.open(saved({"x": value}, tmp_path / "m.pt")) as found:
        assert "nested" == found["x"].layout
        assert [[2, 3], [1, 3]] == found["x"].parts["sizes"].numpy().tolist()
        assert 9 == found["x"].parts["buffer"].numel


VALUES: dict[str, object] = {
    "numbers": [0, -1, 2**31, 2**70, -(2**200), 1.5, float("nan"), float("-inf"), -0.0, True, None, 3 - 4j],
    "texts": ["", "ü𝄞", "a.b", "\ud800", "\x00"],
    "bytes": [b"", b"\x00\xff", b"x" * 300, bytearray(b"ab"), bytearray()],
    "containers": [[], (), {}, set(), frozenset(), OrderedDict(), [[1], (2,), {3}, frozenset({4})], {(1, "a"): {None: 5}}],
    "mappings": [OrderedDict(b=1, a=2), Counter("abca"), {1: "int", "1": "text", False: "bool", b"k": "bytes", 1.5: "float"}],
    "of torch's": [
        torch.float32, torch.float8_e5m2, torch.Size([1, 2]), torch.device("cuda:1"), torch.device("cpu"), torch.strided,
        torch.sparse_csr, torch.per_tensor_affine,
    ],
    "slices": [slice(1, None, 2), slice(None), range(1, 10, 3), Ellipsis, NotImplemented],
    "dates": [
        datetime.datetime(2026, 1, 2, 3, 4, 5, 6), datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc),
        datetime.date(2026, 1, 2), datetime.time(1, 2, 3), datetime.timedelta(1, 2, 3),
        datetime.timezone(datetime.timedelta(hours=2)),
    ],
    "decimals": [decimal.Decimal("1.50"), decimal.Decimal("NaN")],
    "numpy numbers": [np.float32(1.5), np.float64(2.5), np.int64(-3), np.uint8(4), np.bool_(True), np.complex64(1 + 2j)],
    "arrays": [
        np.arange(6).reshape(2, 3), np.arange(6.0).reshape(2, 3).T, np.arange(3, dtype=">i4"), np.array(5.0),
        np.zeros((0, 2)), np.array([True, False]), np.arange(4)[::2],
    ],
    "random states": [random.getstate(), np.random.RandomState(3).get_state(legacy=False)],
}  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("kind", VALUES)
def test_values_are_those_that_torch_loads(kind: str, protocol: int, tmp_path: Path) -> None:
    path = saved({"x": VALUES[kind]}, tmp_path / "m.pt", pickle_protocol=protocol)
    expected = torch.load(path, weights_only=False)
    with statedict.open(path) as found:
        assert repr(facts(expected)) == repr(found_facts(found.tree()))


def test_paths_come_back_as_pure_ones(tmp_path: Path) -> None:
    assert PurePosixPath("/a/b") == tree(Path("/a/b"), tmp_path)
    assert PureWindowsPath("c:/a") == tree(PureWindowsPath("c:/a"), tmp_path)


@pytest.mark.parametrize("cls", [Namespace, types.SimpleNamespace])
def test_a_namespace_keeps_its_names(cls: Any, tmp_path: Path) -> None:
    found = tree(cls(lr=0.1, weights=torch.ones(2)), tmp_path)

    assert (0.1, (2,)) == (found.lr, found.weights.shape)


def test_a_default_dict_is_one_without_its_factory(tmp_path: Path) -> None:
    found = tree(defaultdict(list, {"a": [1]}), tmp_path)

    assert (defaultdict, None, {"a": [1]}) == (type(found), found.default_factory, dict(found))


def test_random_states_of_torch_are_bytes(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    tensor, content = tree(state, tmp_path)

    assert ("uint8", state.numpy().tobytes()) == (tensor.dtype, content)


Point = namedtuple("Point", "x y")


@dataclasses.dataclass
class Record:
    """Stands for a dataclass of the user's."""

    name: str
    weight: Any


class Color(enum.Enum):
    """Stands for an enum of the user's."""

    RED = 1


class Slotted:
    """Stands for a class with slots."""

    __slots__ = ("w",)

    def __init__(self) -> None:
        self.w = torch.ones(3)


class Listed(list):  # type: ignore[type-arg]
    """Stands for a list of the user's own class."""


class Mapped(dict):  # type: ignore[type-arg]
    """Stands for a dict of the user's own class."""


W = torch.ones(2)
OBJECTS: dict[str, tuple[object, str, list[str]]] = {
    "a named tuple": (Point(1, W), "Point", ["x.args.1"]),
    "a dataclass": (Record("n", W), "Record", ["x.weight"]),
    "an enum": (Color.RED, "Color", []),
    "an object with slots": (Slotted(), "Slotted", ["x.state.1.w"]),
    "a list of a class": (Listed([1, W]), "Listed", ["x.items.1"]),
    "a dict of a class": (Mapped(a=W), "Mapped", ["x.pairs.0.1"]),
    "a partial": (functools.partial(torch.add, W), "functools.partial", ["x.state.1.0"]),
    "a class": (Record, "Record", []),
    "a function": (saved, "saved_values.saved", []),
    "a module of torch's": (torch.nn.ReLU, "torch.nn.modules.activation.ReLU", []),
    "a fraction": (fractions.Fraction(1, 3), "fractions.Fraction", []),
    "a UUID": (uuid.UUID(int=5), "uuid.UUID", []),
    "a deque with tensors": (deque([W]), "collections.deque", ["x.items.0"]),
    "a chain map": (collections.ChainMap({"a": W}), "collections.ChainMap", ["x.maps.0.a"]),
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_objects_that_nobody_builds_are_records_with_their_tensors(kind: str, tmp_path: Path) -> None:
    value, name, keys = OBJECTS[kind]
    with statedict.open(saved({"x": value}, tmp_path / "m.pt")) as found:
        record = found.tree()["x"]
        reachable = list(found)

        assert isinstance(record, Opaque)
        assert record.type.endswith(name)
        assert len(keys) <= len(reachable)
        assert all([1.0] * found[key].numel == found[key].numpy().tolist() for key in reachable)


def test_an_optimizer_and_a_scheduler(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.named_parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    scheduler.step()
    value = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    path = saved(value, tmp_path / "m.pt")
    with statedict.open(path) as found:
        assert facts(torch.load(path, weights_only=False)) == found_facts(found.tree())
        assert 0.01 == found.objects["optimizer.param_groups.0.lr"]
        assert (2, 3) == found["optimizer.state.0.exp_avg"].shape


def test_keys_that_read_alike_are_told_apart(tmp_path: Path) -> None:
    value = {"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}, "": torch.ones(2), 0: torch.ones(3), "0": torch.ones(4)}
    with statedict.open(saved(value, tmp_path / "m.pt")) as found:
        assert [r"a\.b", ".a.b", "", ".0", r"\0"] == list(found)
        assert [1, 1, 2, 3, 4] == [tensor.numel for tensor in found.values()]
        assert (0.0, 1.0) == (found[("a.b",)].numpy()[0], found["a", "b"].numpy()[0])
        assert ((3,), (4,)) == (found[(0,)].shape, found[("0",)].shape)
        with pytest.raises(statedict.KeyNotFound, match="could mean several"):
            found["0"]
        with pytest.raises(statedict.KeyNotFound, match=r"Say which: a\\.b, \.a\.b"):
            found["a.b"]
        assert (1,) == found.at(".a")["b"].shape

"""Streams that torch wrote before 1.6, Python 2's among them, are read as torch reads them."""

from __future__ import annotations

import collections
import pickle
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import statedict
from statedict.errors import CorruptFile, StateDictError
from statedict.io.ranges import LocalFile

torch = pytest.importorskip("torch")

from saved_values import facts, found, found_sharing, packed, saved, sharing  # noqa: E402

HEADER = b"".join(
    pickle.dumps(value, protocol=2)
    for value in (
        0x1950A86A20F9469CFC6C,
        1001,
        {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}},
    )
)


# ------------------------------------------------------------------------- streams by hand: what torch no longer writes


def text(value: str) -> bytes:
    """A text as Python 2 wrote it (SHORT_BINSTRING)."""
    raw = value.encode("latin-1")
    return b"U" + bytes([len(raw)]) + raw


def number(value: int) -> bytes:
    """LONG1: the storage keys of Python 2 are addresses."""
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def storage(key: int, numel: int, *, kind: str = "FloatStorage", device: str = "cpu", view: bytes = b"N") -> bytes:
    fields = text("storage") + name("torch", kind) + number(key) + text(device) + b"K" + bytes([numel]) + view
    return b"(" + fields + b"tQ"


def geometry(*items: int) -> bytes:
    return b"(" + b"".join(b"K" + bytes([item]) for item in items) + b"t"


def tensor_v1(of: bytes, offset: int, shape: bytes, stride: bytes) -> bytes:
    """``_rebuild_tensor``, as torch 0.3 and before wrote it."""
    return name("torch._utils", "_rebuild_tensor") + b"(" + of + b"K" + bytes([offset]) + shape + stride + b"tR"


def tensor_v2(of: bytes, offset: int, shape: bytes, stride: bytes, hooks: bytes = b"N", grad: bytes = b"\x89") -> bytes:
    """``_rebuild_tensor_v2``; torch 0.4 on Python 2 wrote None for the hooks."""
    inner = of + b"K" + bytes([offset]) + shape + stride + grad + hooks
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + inner + b"tR"


def ordered(*pairs: tuple[str, bytes]) -> bytes:
    """An OrderedDict as Python 2 wrote it: called with a list of two-element lists."""
    items = b"".join(b"](" + text(key) + value + b"e" for key, value in pairs)
    return name("collections", "OrderedDict") + b"](" + items + b"e\x85R"


def stream(value: bytes, storages: dict[int, list[float]], rest: bytes = b"") -> bytes:
    keys = b"\x80\x02](" + b"".join(number(key) for key in storages) + b"e."
    raw = b"".join(struct.pack("<q", len(v)) + struct.pack(f"<{len(v)}f", *v) for v in storages.values())
    return HEADER + b"\x80\x02" + value + b"." + keys + raw + rest


A, B = 0x7F00DEADBEEF, 140_000
SIX = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
PLAIN = tensor_v1(storage(A, 6), 0, geometry(2, 3), geometry(3, 1))
NEWER = tensor_v2(storage(A, 6), 0, geometry(2, 3), geometry(3, 1))


def view(key: int, offset: int, size: int) -> bytes:
    """What torch 0.3 wrote of a storage that is a part of another one: (key, offset, size) in elements."""
    return b"(" + number(key) + b"K" + bytes([offset]) + b"K" + bytes([size]) + b"t"


STREAMS = {
    "one tensor of torch 0.3": stream(PLAIN, {A: SIX}),
    "no hooks": stream(NEWER, {A: SIX}),
    "requires grad": stream(tensor_v2(storage(A, 6), 1, geometry(2), geometry(2), grad=b"\x88"), {A: SIX}),
    "a state dict of Python 2": stream(
        ordered(("fc.weight", PLAIN), ("fc.bias", tensor_v1(storage(B, 2), 0, geometry(2), geometry(1)))),
        {B: [7.0, 8.0], A: SIX},
    ),
    "a storage inside a storage": stream(
        ordered(
            ("whole", tensor_v1(storage(A, 6), 0, geometry(6), geometry(1))),
            ("part", tensor_v1(storage(A, 6, view=view(B, 2, 3)), 1, geometry(2), geometry(1))),
            ("same", tensor_v1(storage(A, 6, view=view(B, 2, 3)), 0, geometry(3), geometry(1))),
        ),
        {A: SIX},
    ),
    "only a part of a storage": stream(
        tensor_v1(storage(A, 6, view=view(B, 2, 3)), 0, geometry(3), geometry(1)), {A: SIX}
    ),
    "the class of the storage is CUDA's": stream(
        tensor_v1(storage(A, 6).replace(b"ctorch\n", b"ctorch.cuda\n"), 0, geometry(6), geometry(1)), {A: SIX}
    ),
    "bytes behind the end": stream(PLAIN, {A: SIX}, b"trailing"),
    "a tensor that BUILD fills": stream(
        name("torch", "FloatTensor") + b")R(" + storage(A, 6) + b"K\x01" + geometry(2, 2) + geometry(2, 1) + b"tb",
        {A: SIX},
    ),
    "a parameter of torch 0.3": stream(
        name("torch.nn.parameter", "Parameter") + PLAIN + b"\x85\x81\x89\x89" + name("collections", "OrderedDict")
        + b")R\x87b",
        {A: SIX},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", STREAMS)
def test_a_stream_of_an_old_writer_is_read_as_torch_reads_it(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    path.write_bytes(STREAMS[kind])
    expected = torch.load(path, weights_only=False)
    with statedict.open(path) as checkpoint:
        tree = checkpoint.tree()

        assert facts(expected) == found(path)
        assert sharing(expected) == found_sharing(tree)


def test_a_tensor_that_build_fills_is_the_same_wherever_it_stands(tmp_path: Path) -> None:
    filled = b")Rq\x05(" + storage(A, 6) + b"K\x01" + geometry(2, 2) + geometry(2, 1) + b"tb"
    path = tmp_path / "m.pth"
    path.write_bytes(stream(b"](" + name("torch", "FloatTensor") + filled + b"h\x05e", {A: SIX}))

    assert facts(torch.load(path, weights_only=False)) == found(path)


def test_devices_are_shown_as_the_file_has_them(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    path.write_bytes(stream(tensor_v1(storage(A, 6, device="cuda:0"), 0, geometry(6), geometry(1)), {A: SIX}))
    with statedict.open(path) as checkpoint:
        assert ("cuda:0", SIX) == (checkpoint[()].device, checkpoint[()].numpy().tolist())


def test_a_python_2_text_that_is_no_utf_8_stays_bytes(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    path.write_bytes(stream(b"}(" + b"U\x02\xff\xfe" + PLAIN + text("n") + b"K\x07u", {A: SIX}))
    with statedict.open(path) as checkpoint:
        assert [b"\xff\xfe", "n"] == list(checkpoint.tree())


# ------------------------------------------------------------------------- streams that torch writes


class Inner(torch.nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(3, 2)
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("left", torch.zeros(2), persistent=False)


STATES: dict[str, Any] = {
    "a state dict": torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).state_dict(),
    "nested": {"step": 3, "list": [torch.ones(2), (torch.zeros(1), None)], "od": collections.OrderedDict(a=1.5)},
    "one tensor": torch.arange(4.0),
    "no tensor": {"a": [1, "b"]},
    "an empty tensor": {"a": torch.zeros(0, 3), "b": torch.ones(1)},
    "0-d and strided": {"s": torch.tensor(2.5), "t": torch.arange(6.0).reshape(2, 3).t()},
    "every width": {str(d): torch.ones(3, dtype=d) for d in (torch.int8, torch.int16, torch.int64, torch.bool)},
    "half": {"h": torch.ones(3, dtype=torch.float16), "b": torch.ones(3, dtype=torch.bfloat16)},
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", STATES)
def test_a_stream_of_todays_torch_is_read_as_torch_reads_it(kind: str, protocol: int, tmp_path: Path) -> None:
    path = saved(STATES[kind], tmp_path / "m.pth", zipped=False, pickle_protocol=protocol)

    assert facts(torch.load(path, weights_only=False)) == found(path)


def test_ties_are_those_of_torch(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    state = {"a": base, "b": base, "c": base[3:], "d": base.reshape(3, 4).t(), "e": base.clone()}
    path = saved(state, tmp_path / "m.pth", zipped=False)
    with statedict.open(path) as checkpoint:
        assert sharing(torch.load(path)) == found_sharing(checkpoint.tree())
        assert ("b",) == checkpoint["a"].tied_with


@pytest.mark.parametrize("name", ["float8_e4m3fn", "uint16", "uint64", "float4_e2m1fn_x2", "bits8"])
def test_what_torch_writes_and_cannot_read_is_read(name: str, tmp_path: Path) -> None:
    values = torch.arange(8, dtype=torch.uint8).view(getattr(torch, name))
    path = saved({"a": values}, tmp_path / "m.pth", zipped=False)
    with pytest.raises(AttributeError):
        torch.load(path)
    with statedict.open(path) as checkpoint:
        assert (name, packed(values)) == (checkpoint["a"].dtype, bytes(checkpoint["a"].read()))


def test_the_sources_that_a_stream_carries_are_searched_and_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "their_model.py"
    source.write_text(
        "import torch\n"
        "class Theirs(torch.nn.Linear):\n"
        "    def state_dict(self, *args, **kwargs):\n"
        "        return super().state_dict(*args, **kwargs)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import their_model  # type: ignore[import-not-found]

    path = saved(their_model.Theirs(2, 3), tmp_path / "m.pth", zipped=False)
    monkeypatch.delitem(sys.modules, "their_model")
    source.unlink()
    with statedict.open(path) as checkpoint:
        notes = {note.code for note in checkpoint.manifest.notes}

        assert ["weight", "bias"] == list(checkpoint)
        assert {"whole-module", "custom-state-dict"} <= notes


# ------------------------------------------------------------------------- damaged streams, and how much is read

BAD = {
    "the magic number": stream(PLAIN, {A: SIX})[1:],
    "a storage missing from the list": stream(PLAIN, {}),
    "a storage listed that nothing uses": stream(PLAIN, {A: SIX, B: SIX}),
    "a storage of another length": stream(PLAIN, {A: SIX[:5]}),
    "the last byte": stream(PLAIN, {A: SIX})[:-1],
    "a shape beyond its storage": stream(tensor_v1(storage(A, 6), 1, geometry(2, 3), geometry(3, 1)), {A: SIX}),
    "a view beyond its storage": stream(
        tensor_v1(storage(A, 6, view=view(B, 5, 3)), 0, geometry(3), geometry(1)), {A: SIX}
    ),
    "a view that is none": stream(tensor_v1(storage(A, 6, view=b"K\x01"), 0, geometry(3), geometry(1)), {A: SIX}),
    "an unknown class of storage": stream(
        tensor_v1(storage(A, 6, kind="OddStorage"), 0, geometry(6), geometry(1)), {A: SIX}
    ),
    "a length of 2**50": stream(PLAIN.replace(b"K\x06N", number(2**50) + b"N"), {A: SIX}),
}


@pytest.mark.parametrize("defect", BAD)
def test_a_damaged_stream_is_refused(defect: str, tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    path.write_bytes(BAD[defect])
    with pytest.raises(StateDictError) as caught:
        statedict.open(path)

    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_a_stream_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = STREAMS["a state dict of Python 2"]
    path = tmp_path / "cut.pth"
    opened = []
    for nbytes in range(len(whole)):
        path.write_bytes(whole[:nbytes])
        try:
            statedict.open(path).close()
            opened.append(nbytes)
        except StateDictError:
            continue

    assert [] == opened


WIDE = [2**63, 2**64, 2**70, -1]


@pytest.mark.parametrize("value", WIDE)
@pytest.mark.parametrize("where", ["offset", "shape", "stride", "length"])
def test_a_number_that_is_no_int64_is_refused(where: str, value: int, tmp_path: Path) -> None:
    # An empty view reaches nowhere, so that only the numbers themselves are wrong.
    parts = {"offset": b"K\x00", "shape": b"(K\x00K\x01t", "stride": b"(K\x01K\x01t"}
    wide = {
        "offset": number(value),
        "shape": b"(K\x00" + number(value) + b"t",
        "stride": b"(" + number(value) + b"K\x01t",
    }
    parts[where] = wide.get(where, b"")
    of = storage(A, 6) if where != "length" else storage(A, 6).replace(b"K\x06N", number(value) + b"N")
    order = of + parts["offset"] + parts["shape"] + parts["stride"]
    path = tmp_path / "m.pth"
    path.write_bytes(stream(name("torch._utils", "_rebuild_tensor") + b"(" + order + b"tR", {A: SIX}))

    with pytest.raises(CorruptFile):
        statedict.open(path)


def test_opening_reads_little_more_than_the_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = SimpleNamespace(nbytes=0)
    read = LocalFile.read

    def counting(self: LocalFile, offset: int, nbytes: int) -> bytes:
        counted.nbytes += nbytes
        return read(self, offset, nbytes)

    path = saved({"a": torch.zeros(1 << 20), "b": torch.zeros(1 << 20)}, tmp_path / "m.pth", zipped=False)
    monkeypatch.setattr(LocalFile, "read", counting)
    statedict.open(path).close()

    assert counted.nbytes < 100_000

"""What a conversion writes: torch and the safetensors library read it, and nothing of the source is lost."""

from __future__ import annotations

import json
import os
import stat
import struct
import zipfile
from collections import Counter, OrderedDict
from datetime import datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from xxhash import xxh3_128

import statedict
from statedict import FileError, LimitExceeded, TargetExists, UnsafeContent, Unsupported

torch = pytest.importorskip("torch")

from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from saved_values import facts, saved, sharing  # noqa: E402
from torch.utils.serialization import config  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*(beta state|TypedStorage is deprecated|quantiz).*")


def rich() -> dict[object, Any]:
    """Everything that torch's weights-only reader takes, in one tree."""
    base = torch.arange(60.0).reshape(6, 10)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    weight = model[0].weight
    return {
        "model": model.state_dict(),
        "epoch": 3,
        "numbers": (0.1, float("nan"), float("inf"), -0.0, 2**100, True, None, 1 + 2j),
        "list": [torch.ones(2), [1, 2, {"k": torch.zeros(3, dtype=torch.int8)}]],
        "of torch's": [torch.bfloat16, torch.device("cuda:1"), torch.Size([1, 2]), torch.sparse_csr],
        "bytes": b"\x00\xff",
        "texts": ["ü", "a.b", "\ud800", ""],
        "transposed": base.t(),
        "rows": base[2:4],
        "columns": base[:, 3:5],
        "the same rows": base[2:4],
        "tied to the model": weight,
        "tied again": weight,
        "complex128": torch.randn(3, dtype=torch.complex128),
        "conjugate": torch.randn(2, 3, dtype=torch.complex64).conj().resolve_conj(),
        "bfloat16": torch.randn(5).bfloat16(),
        "float8": torch.randn(4).to(torch.float8_e4m3fn),
        "float4": torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        "expanded": torch.ones(1, 4).expand(3, 4),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3.5),
        "bool": torch.tensor([True, False]),
        "coo": torch.eye(3).to_sparse(),
        "csr": torch.eye(3).to_sparse_csr(),
        "bsr": torch.eye(4).to_sparse_bsr((2, 2)),
        "quantized": torch.quantize_per_tensor(torch.randn(4), 0.1, 3, torch.qint8),
        "per channel": torch.quantize_per_channel(
            torch.randn(2, 3), torch.tensor([0.1, 0.2]), torch.tensor([0, 1]), 0, torch.quint8
        ),
        "uint16": torch.tensor([1, 2], dtype=torch.uint16),
        "state": {0: {"exp_avg": torch.ones(2)}, 1: torch.ones(1)},
        (1, 2): "a tuple as a key",
        "set": {1, 2, 3},
        "a.b": torch.ones(1),
        "a": {"b": torch.ones(2)},
        "parameter": torch.nn.Parameter(torch.ones(2, 2)),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "meta": torch.ones(3, device="meta"),
        "requires grad": torch.ones(2, requires_grad=True),
        "windows": torch.arange(10.0).as_strided((8, 3), (1, 1)),
        "counter": Counter("abca"),
        "nothing": [{}, [], (), OrderedDict()],
        "__metadata__": torch.ones(1),
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file of torch's with everything in it."""
    return saved(rich(), tmp_path / "source.pth")


def load(path: Path, **options: Any) -> Any:
    return torch.load(path, weights_only=True, **options)


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("through", [None, "between.safetensors"])
def test_torch_reads_back_what_it_had_written(through: str | None, mmap: bool, source: Path, tmp_path: Path) -> None:
    start = source
    if through is not None:
        start = tmp_path / through
        statedict.convert(source, start)
    statedict.convert(start, tmp_path / "target.pth")

    expected, found = load(source), load(tmp_path / "target.pth", mmap=mmap)
    assert facts(expected) == facts(found)
    assert sharing(expected) == sharing(found)


def test_torch_may_compute_where_the_storages_lie(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    statedict.convert(source, tmp_path / "target.pth")
    # With the variable, torch compares each offset that it computes with the one in the archive's directory.
    monkeypatch.setenv("TORCH_SERIALIZATION_DEBUG", "1")
    with config.patch({"load.calculate_storage_offsets": True}):
        found = load(tmp_path / "target.pth", mmap=True)

    assert facts(load(source)) == facts(found)


def test_the_archive_is_sound_and_aligned(source: Path, tmp_path: Path) -> None:
    statedict.convert(source, tmp_path / "target.pth")
    with zipfile.ZipFile(tmp_path / "target.pth") as archive:
        damaged = archive.testzip()
        names = [info.filename for info in archive.infolist()]
    with open(tmp_path / "target.pth", "rb") as file:
        starts = []
        for info in zipfile.ZipFile(tmp_path / "target.pth").infolist():
            file.seek(info.header_offset + 26)
            name, extra = struct.unpack("<HH", file.read(4))
            starts.append((info.header_offset + 30 + name + extra) % 64)

    assert None is damaged
    assert {0} == set(starts)
    assert ["archive/data.pkl", "archive/.format_version", "archive/.storage_alignment"] == names[:3]


def test_the_safetensors_library_reads_every_tensor_that_has_a_dtype_there(source: Path, tmp_path: Path) -> None:
    statedict.convert(source, tmp_path / "target.safetensors")
    expected, found = load(source), load_file(tmp_path / "target.safetensors")
    for key in (
        "bfloat16",
        "scalar",
        "bool",
        "transposed",
        "rows",
        "columns",
        "expanded",
        "uint16",
        "windows",
        "float8",
    ):
        assert facts(expected[key].contiguous()) == facts(found[key]), key

    assert torch.equal(expected["model"]["0.weight"], found["model.0.weight"])
    assert torch.equal(torch.view_as_real(expected["complex128"]), found["complex128#complex128"])
    assert torch.equal(expected["coo"]._indices(), found["coo#indices"])
    assert facts(expected["float4"]) == facts(found["float4"])


def test_a_flat_state_dict_is_an_ordinary_safetensors_file(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    saved(model.state_dict(), tmp_path / "model.pth")
    statedict.convert(tmp_path / "model.pth", tmp_path / "model.safetensors")

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(model.state_dict()) == set(file.keys())
        assert "pt" == file.metadata()["format"]
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))


def test_a_tied_tensor_is_written_once_and_its_alias_is_named(tmp_path: Path) -> None:
    weight = torch.randn(100, 10)
    saved({"embed.weight": weight, "head.weight": weight}, tmp_path / "m.pth")
    result = statedict.convert(tmp_path / "m.pth", tmp_path / "m.safetensors")

    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert ["embed.weight"] == list(file.keys())
        assert "embed.weight" == file.metadata()["head.weight"]
    with statedict.open(tmp_path / "m.safetensors") as found:
        assert ("head.weight",) == found["embed.weight"].tied_with
        assert {"format": "pt"} == dict(found.metadata)
    assert ["aliases"] == [finding.code for finding in result.findings]


def test_bytes_that_no_tensor_shows_are_left_out_unless_they_are_to_stay(tmp_path: Path) -> None:
    saved({"x": torch.randn(100_000)[:10]}, tmp_path / "m.pth")
    small = statedict.convert(tmp_path / "m.pth", tmp_path / "small.pth")
    large = statedict.convert(tmp_path / "m.pth", tmp_path / "large.pth", keep_storages=True)

    assert (399_960, 0) == (small.removed_nbytes, large.removed_nbytes)
    assert 40 == load(tmp_path / "small.pth")["x"].untyped_storage().nbytes()
    assert 400_000 == load(tmp_path / "large.pth")["x"].untyped_storage().nbytes()


def test_safetensors_can_not_keep_storages(tmp_path: Path) -> None:
    saved({"x": torch.ones(3)}, tmp_path / "m.pth")

    with pytest.raises(Unsupported, match="--keep-storages"):
        statedict.convert(tmp_path / "m.pth", tmp_path / "m.safetensors", keep_storages=True)


@pytest.mark.parametrize("name", ["b.pth", "b.safetensors"])
def test_the_same_input_gives_the_same_bytes(name: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    first, second = tmp_path / name, tmp_path / "elsewhere" / f"other{name}"
    statedict.convert(source, first)
    statedict.convert(source, second)

    assert first.read_bytes() == second.read_bytes()


def test_a_file_of_ours_becomes_the_same_file_again(source: Path, tmp_path: Path) -> None:
    statedict.convert(source, tmp_path / "1.safetensors")
    statedict.convert(tmp_path / "1.safetensors", tmp_path / "2.pth")
    statedict.convert(tmp_path / "2.pth", tmp_path / "3.safetensors")

    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "3.safetensors").read_bytes()


def test_a_digest_is_that_of_the_bytes(tmp_path: Path) -> None:
    values = torch.randn(1000)
    saved({"x": values}, tmp_path / "m.pth")
    expected = f"xxh3-128:{xxh3_128(values.numpy().tobytes()).hexdigest()}"
    for name in ("m.safetensors", "copy.pth"):
        statedict.convert(tmp_path / "m.pth", tmp_path / name)
        with statedict.open(tmp_path / name) as found:
            view = found["x"].entry.view
            assert view is not None
            assert expected == view.storage.digest


def test_without_digests_none_is_recorded(tmp_path: Path) -> None:
    save_file({"x": torch.ones(3)}, tmp_path / "m.safetensors")
    statedict.convert(tmp_path / "m.safetensors", tmp_path / "copy.safetensors", digests=False)

    with safe_open(tmp_path / "copy.safetensors", "pt") as file:
        assert {"format": "pt"} == file.metadata()


def test_texts_of_the_metadata_are_kept_in_both_formats(tmp_path: Path) -> None:
    save_file({"x": torch.ones(3)}, tmp_path / "a.safetensors", metadata={"format": "pt", "license": "MIT"})
    statedict.convert(tmp_path / "a.safetensors", tmp_path / "b.pth")
    statedict.convert(tmp_path / "b.pth", tmp_path / "c.safetensors")

    with safe_open(tmp_path / "c.safetensors", "pt") as file:
        assert "MIT" == file.metadata()["license"]


def test_notes_about_other_tensors_are_left_aside(tmp_path: Path) -> None:
    saved({"model": {"x": torch.ones(3)}}, tmp_path / "m.pth")
    statedict.convert(tmp_path / "m.pth", tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        metadata = file.metadata()
    save_file({"y": torch.ones(4)}, tmp_path / "other.safetensors", metadata=metadata)
    found = statedict.inspect(tmp_path / "other.safetensors")

    assert ["y"] == [tensor.key for tensor in found.tensors]
    assert ["stale-notes"] == [finding.code for finding in found.findings]


def test_damaged_notes_leave_the_tensors_of_the_header(tmp_path: Path) -> None:
    for notes in (
        "",
        "[]",
        "{",
        '{"version":1}',
        '{"version":99}',
        "[" * 10_000,
        '{"version":1,"names":0,"tree":[[]]}',
    ):
        save_file({"x": torch.ones(3)}, tmp_path / "m.safetensors", metadata={"statedict": notes})
        found = statedict.inspect(tmp_path / "m.safetensors")

        assert (["x"], ["stale-notes"]) == ([t.key for t in found.tensors], [f.code for f in found.findings])


def test_notes_that_name_each_other_without_end_are_left_aside(tmp_path: Path) -> None:
    from statedict.formats.safetensors_notes import fingerprint

    names = [f"t{at}" for at in range(60)]
    for how in ("parts", "attributes"):
        ways = [{"a": name, "b": name} if how == "parts" else {"a": [{"tensor": name}] * 2} for name in names[1:]]
        notes = {
            "version": 1,
            "names": fingerprint(dict.fromkeys(names, ("F32", (1,)))),
            "tree": {"tensor": "t0"},
            "tensors": {name: {how: way} for name, way in zip(names, ways)},
        }
        save_file(
            {name: torch.ones(1) for name in names},
            tmp_path / "m.safetensors",
            metadata={"statedict": json.dumps(notes)},
        )
        found = statedict.inspect(tmp_path / "m.safetensors")

        assert (60, ["stale-notes"]) == (len(found.tensors), [finding.code for finding in found.findings])


def test_inert_records_travel_in_safetensors(tmp_path: Path) -> None:
    when = datetime(2026, 1, 2, 3, 4, 5, 6, timezone.utc)
    value = {"w": torch.ones(2), "when": when, "price": Decimal("1.50"), "path": Path("/x/y"), "s": slice(1, None, 2)}
    saved(value, tmp_path / "m.pth")
    statedict.convert(tmp_path / "m.pth", tmp_path / "m.safetensors")

    with statedict.open(tmp_path / "m.pth") as before, statedict.open(tmp_path / "m.safetensors") as after:
        assert before.objects == after.objects
        assert when == after.objects["when"]


class Unknown:
    """Stands for a class that the reader hasn't."""

    def __init__(self) -> None:
        self.weight = torch.ones(2)
        self.name = "u"


def test_objects_of_unknown_classes_are_refused_in_a_pth_and_kept_in_safetensors(tmp_path: Path) -> None:
    saved({"x": torch.ones(2), "extra": Unknown()}, tmp_path / "m.pth")

    with pytest.raises(UnsafeContent, match=r"extra.*Unknown"):
        statedict.convert(tmp_path / "m.pth", tmp_path / "target.pth")
    statedict.convert(tmp_path / "m.pth", tmp_path / "target.safetensors")
    with statedict.open(tmp_path / "target.safetensors") as found:
        assert ["x", "extra.weight"] == list(found)
        assert f"{__name__}.Unknown" == found.tree()["extra"].type
    assert not (tmp_path / "target.pth").exists()


def test_values_that_torch_refuses_are_all_named(tmp_path: Path) -> None:
    saved({"when": datetime(2026, 1, 1), "price": Decimal(1), "x": torch.ones(1)}, tmp_path / "m.pth")

    with pytest.raises(Unsupported, match=r"'when' \(datetime\), 'price' \(Decimal\)"):
        statedict.convert(tmp_path / "m.pth", tmp_path / "target.pth")
    assert ["m.pth"] == os.listdir(tmp_path)


def test_a_view_that_claims_more_than_is_allowed_is_not_unfolded(tmp_path: Path) -> None:
    saved({"bomb": torch.ones(1).expand(10**12)}, tmp_path / "m.pth")

    with pytest.raises(LimitExceeded, match="expanded_bytes"):
        statedict.convert(tmp_path / "m.pth", tmp_path / "m.safetensors")
    statedict.convert(tmp_path / "m.pth", tmp_path / "copy.pth")
    assert (10**12,) == tuple(load(tmp_path / "copy.pth")["bomb"].shape)
    assert ["copy.pth", "m.pth"] == sorted(os.listdir(tmp_path))


def test_a_dry_run_writes_nothing(source: Path, tmp_path: Path) -> None:
    result = statedict.convert(source, tmp_path / "target.safetensors", dry_run=True)
    real = statedict.convert(source, tmp_path / "real.safetensors")

    assert ["real.safetensors", "source.pth"] == sorted(os.listdir(tmp_path))
    assert result.nbytes == real.nbytes == (tmp_path / "real.safetensors").stat().st_size
    assert (True, False) == (result.to_dict()["dry_run"], real.to_dict()["dry_run"])


def test_an_existing_file_is_replaced_only_when_that_is_allowed(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target.pth"
    target.write_bytes(b"precious")

    with pytest.raises(TargetExists):
        statedict.convert(source, target)
    assert b"precious" == target.read_bytes()
    statedict.convert(source, target, overwrite=True)
    assert facts(load(source)) == facts(load(target))


def test_a_file_is_never_converted_in_its_own_place(source: Path, tmp_path: Path) -> None:
    before = source.read_bytes()
    (tmp_path / "link.pth").symlink_to(source)

    for target in (source, tmp_path / "link.pth"):
        with pytest.raises(FileError, match="its own place"):
            statedict.convert(source, target, overwrite=True)
    assert before == source.read_bytes()


@pytest.mark.parametrize("name", ["model", "model.txt", "model.pth.gz"])
def test_a_suffix_that_says_no_format_is_refused(name: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"\.safetensors"):
        statedict.convert(source, tmp_path / name)


def test_the_mode_follows_the_umask(source: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        statedict.convert(source, tmp_path / "t.safetensors")
    finally:
        os.umask(before)

    assert 0o640 == stat.S_IMODE((tmp_path / "t.safetensors").stat().st_mode)


def test_a_part_is_converted_alone(source: Path, tmp_path: Path) -> None:
    statedict.convert(source, tmp_path / "part.pth", at="model")
    found = load(tmp_path / "part.pth")

    assert facts(load(source)["model"]) == facts(found)
    assert "_metadata" in vars(found)


@pytest.mark.parametrize("kind", ["deflated", "big-endian", "legacy"])
def test_storages_that_must_be_unwrapped_or_turned_are(kind: str, tmp_path: Path) -> None:
    value = {
        "x": torch.randn(50, 7),
        "t": torch.arange(12).reshape(3, 4).t(),
        "c": torch.randn(3, dtype=torch.complex64),
    }
    source = saved(value, tmp_path / "m.pth", zipped=kind != "legacy")
    if kind != "legacy":
        source = rewritten(source, tmp_path / "odd.pth", kind)
    statedict.convert(source, tmp_path / "out.pth")
    statedict.convert(source, tmp_path / "out.safetensors")

    assert facts(value) == facts(load(tmp_path / "out.pth"))
    assert facts({k: v.contiguous() for k, v in value.items()}) == facts(
        {key: load_file(tmp_path / "out.safetensors")[key] for key in value}
    )


def rewritten(source: Path, target: Path, kind: str) -> Path:
    """The archive with its records deflated, or with its storages in the other byte order."""
    sizes = {"data/0": 4, "data/1": 8, "data/2": 4}
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            data, name = old.read(info), info.filename.partition("/")[2]
            if kind == "big-endian":
                if name == "byteorder":
                    data = b"big"
                if name in sizes:
                    step = sizes[name]
                    data = b"".join(data[i : i + step][::-1] for i in range(0, len(data), step))
            new.writestr(info.filename, data, zipfile.ZIP_DEFLATED if kind == "deflated" else zipfile.ZIP_STORED)
    return target


def test_a_result_says_what_was_done(source: Path, tmp_path: Path) -> None:
    result = statedict.convert(source, tmp_path / "t.safetensors")
    shown = result.to_dict()

    assert "statedict.conversion/1" == shown["schema"]
    assert ("torch-zip", "safetensors") == (shown["source_format"], shown["target_format"])
    assert {"carried", "aliases", "shared-copies"} == {finding.code for finding in result.findings}
    assert json.dumps(shown)
    assert "read back and compared" in str(result)
    assert "<html" in result.to_html()


def test_every_real_file_becomes_safetensors_and_comes_back(shared: Path, tmp_path: Path) -> None:
    count = 0
    for path in sorted((shared / "data" / "real").iterdir()):
        if path.suffix not in (".pth", ".pt", ".th", ".bin"):
            continue
        statedict.convert(path, tmp_path / f"{path.name}.safetensors")
        statedict.convert(tmp_path / f"{path.name}.safetensors", tmp_path / f"{path.name}.pth")
        expected, found = load(path, map_location="cpu"), load(tmp_path / f"{path.name}.pth", map_location="cpu")

        assert facts(expected) == facts(found), path.name
        count += 1
    assert count > 8

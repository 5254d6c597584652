"""What an inspection says, on manifests made by hand: no file is read."""

from __future__ import annotations

import datetime
import json
from math import inf, nan, prod
from pathlib import Path
from typing import Any

import pytest

from statedict.dtypes import BY_CODE, DType
from statedict.manifest import (
    Container,
    Extent,
    FileFact,
    Finding,
    Manifest,
    NumpyScalar,
    ObjectEntry,
    Opaque,
    Storage,
    StorageView,
    TensorEntry,
    TorchValue,
)
from statedict.ops.inspect import Inspection, inspection_of
from statedict.ops.values import brief, json_value
from statedict.views import packed_stride

F32, F16, I64 = BY_CODE["F32"], BY_CODE["F16"], BY_CODE["I64"]


class Builder:
    """A manifest in the making."""

    def __init__(self) -> None:
        self.storages: list[Storage] = []
        self.tensors: dict[Any, TensorEntry] = {}
        self.objects: dict[Any, ObjectEntry] = {}

    def storage(self, nbytes: int, crc: int | None = None) -> Storage:
        made = Storage(len(self.storages), nbytes, Extent(0, 0, nbytes), crc=crc, name=f"data/{len(self.storages)}")
        self.storages.append(made)
        return made

    def tensor(
        self,
        *path: str | int,
        shape: tuple[int, ...] = (4, 2),
        dtype: DType = F32,
        storage: Storage | None = None,
        offset: int = 0,
        stride: tuple[int, ...] | None = None,
        crc: int | None = None,
        **facts: Any,
    ) -> TensorEntry:
        held = storage or self.storage(dtype.nbytes(prod(shape)), crc)
        view = StorageView(held, offset, packed_stride(shape) if stride is None else stride)
        self.tensors[path] = TensorEntry(path, dtype, shape, view, **facts)
        return self.tensors[path]

    def value(self, *path: str | int, value: object) -> None:
        self.objects[path] = ObjectEntry(path, type(value).__name__, value)

    def inspection(self, **stats: Any) -> Inspection:
        files = (FileFact("model.pth", sum(storage.nbytes for storage in self.storages) + 100),)
        top = Container("dict", [], [])
        manifest = Manifest("torch-zip", files, tuple(self.storages), self.tensors, self.objects, top)
        return inspection_of(manifest, "model.pth", **stats)


def codes(inspection: Inspection) -> list[str]:
    return [finding.code for finding in inspection.findings]


def message(inspection: Inspection, code: str) -> str:
    return next(finding.message for finding in inspection.findings if finding.code == code)


def optimizer(made: Builder, *at: str | int, names: list[str] | None = None) -> None:
    """The state of Adam for every float tensor under ``model``."""
    weights = [(path, entry) for path, entry in made.tensors.items() if path[0] == "model"]
    for number, (_, entry) in enumerate(weights):
        made.tensor(*at, "state", number, "step", shape=())
        made.tensor(*at, "state", number, "exp_avg", shape=entry.shape)
    for number in range(len(weights)):
        made.value(*at, "param_groups", 0, "params", number, value=number)
        if names:
            made.value(*at, "param_groups", 0, "param_names", number, value=names[number])
    made.value(*at, "param_groups", 0, "lr", value=0.001)


def training(names: list[str] | None = None) -> Builder:
    made = Builder()
    made.tensor("model", "fc.weight", shape=(8, 4))
    made.tensor("model", "fc.bias", shape=(8,))
    optimizer(made, "optimizer", names=names)
    made.value("epoch", value=3)
    return made


def test_a_plain_state_dict_is_given_as_the_contract_says() -> None:
    made = Builder()
    made.tensor("fc1.weight", shape=(8, 4), requires_grad=False)
    made.value("epoch", value=3)

    assert {
        "schema": "statedict.inspection/1",
        "source": "model.pth",
        "format": "torch-zip",
        "tensors": [
            {
                "key": "fc1.weight",
                "path": ["fc1.weight"],
                "shape": [8, 4],
                "dtype": "float32",
                "numel": 32,
                "nbytes": 128,
                "device": "cpu",
                "requires_grad": False,
            }
        ],
        "objects": [{"key": "epoch", "type": "int", "value": 3}],
        "totals": {
            "tensors": 1,
            "parameters": 32,
            "buffers": 0,
            "nbytes": 128,
            "storage_nbytes": 128,
            "file_nbytes": 228,
            "by_dtype": {"float32": {"tensors": 1, "parameters": 32, "nbytes": 128}},
        },
        "tied": [],
        "metadata": {},
        "findings": [],
    } == made.inspection().to_dict()


def test_a_transposed_tensor_has_its_strides_and_a_packed_one_has_none() -> None:
    made = Builder()
    made.tensor("a", shape=(4, 2), stride=(1, 4))
    made.tensor("b", shape=(4, 2))
    first, second = made.inspection().to_dict()["tensors"]  # type: ignore[misc, attr-defined]

    assert ([1, 4], None) == (first["stride"], second.get("stride"))


def test_ties_are_named_both_ways_and_their_storage_counts_once() -> None:
    made = Builder()
    embedding = made.tensor("embed.weight", shape=(10, 4))
    assert embedding.view is not None
    made.tensor("head.weight", shape=(10, 4), storage=embedding.view.storage)
    found = made.inspection()

    assert [["embed.weight", "head.weight"]] == found.to_dict()["tied"]
    assert [("head.weight",), ("embed.weight",)] == [tensor.tied_with for tensor in found.tensors]
    assert (320, 160) == (found.totals.nbytes, found.totals.storage_nbytes)
    assert ["tied"] == codes(found)


def test_ties_of_many_are_not_written_in_pairs() -> None:
    made = Builder()
    storage = made.storage(32)
    for i in range(2000):
        made.tensor(f"w{i}", storage=storage)
    found = made.inspection()

    assert 32 == max(len(tensor.tied_with) for tensor in found.tensors)
    assert [2000] == [len(group) for group in found.tied]


def test_buffers_are_the_statistics_of_batch_norms_and_what_the_file_calls_so() -> None:
    made = Builder()
    for name in ("running_mean", "running_var", "weight"):
        made.tensor("net", f"bn.{name}", shape=(6,))
    made.tensor("net", "bn.num_batches_tracked", shape=(), dtype=I64)
    made.tensor("net", "other.running_mean", shape=(5,))
    made.tensor("net", "mask", shape=(3,), kind="Buffer")

    assert 6 + 6 + 1 + 3 == made.inspection().totals.buffers


def test_a_small_view_of_a_large_storage_is_a_finding_with_the_command() -> None:
    made = Builder()
    made.tensor("row", shape=(10,), storage=made.storage(4_000_000), offset=10)
    found = made.inspection()

    assert ["view-bloat"] == codes(found)
    assert ("row",) == found.findings[0].keys
    assert "storage of 4.00 MB, but shows 40 B" in found.findings[0].message
    assert "`statedict convert model.pth TARGET.pth`" in found.findings[0].message


def test_views_that_fill_their_storage_together_are_no_bloat() -> None:
    made = Builder()
    storage = made.storage(4000)
    made.tensor("a", shape=(500,), storage=storage)
    made.tensor("b", shape=(500,), storage=storage, offset=500)

    assert [] == codes(made.inspection())


def test_views_that_overlap_share_a_storage() -> None:
    made = Builder()
    storage = made.storage(4000)
    made.tensor("qkv", shape=(1000,), storage=storage)
    made.tensor("q", shape=(300,), storage=storage)
    made.tensor("alone", shape=(10,))
    found = made.inspection()

    assert ["shared-storage"] == codes(found)
    assert ("qkv", "q") == found.findings[0].keys


def test_equal_check_sums_and_sizes_are_probably_one_tensor_twice() -> None:
    made = Builder()
    made.tensor("a", shape=(100,), crc=7)
    made.tensor("b", shape=(100,), crc=7)
    made.tensor("c", shape=(100,), crc=8)
    made.tensor("small", shape=(4,), crc=9)
    made.tensor("small2", shape=(4,), crc=9)
    made.tensor("unknown", shape=(100,))
    made.tensor("unknown2", shape=(100,))
    found = made.inspection()

    assert ["duplicate-tensors"] == codes(found)
    assert ("a", "b") == found.findings[0].keys


def test_a_view_that_repeats_its_elements_is_shown_for_what_it_is() -> None:
    made = Builder()
    made.tensor("big", shape=(10**12,), storage=made.storage(16), stride=(0,))
    found = made.inspection()

    assert ["expanded-view"] == codes(found)
    assert "Shown are 4.00 TB, stored 16 B" in found.findings[0].message


def test_tensors_without_elements_are_named() -> None:
    made = Builder()
    made.tensor("empty", shape=(0, 4))

    assert "1 tensor has no elements: 'empty'" == message(made.inspection(), "zero-elements")


def test_notes_of_the_manifest_are_findings_and_the_gravest_come_first() -> None:
    made = Builder()
    made.tensor("empty", shape=(0,))
    note = Finding("extension", "warning", "the name lies")
    manifest = Manifest("npz", (), (), made.tensors, {}, Container("dict", [], []), notes=(note,))

    assert ["extension", "zero-elements"] == codes(inspection_of(manifest, "x"))


def test_statistics_are_given_as_json_and_as_columns() -> None:
    made = Builder()
    for i in range(2):
        made.tensor("layers", i, "w", shape=(4,))
    low: dict[str, object] = {"min": -1.0, "max": 1.0, "mean": 0.0, "std": 1.0, "zeros": 1, "nan": 0, "inf": 0}
    high: dict[str, object] = {"min": nan, "max": inf, "mean": nan, "std": None, "zeros": 0, "nan": 3, "inf": 1}
    found = made.inspection(stats={("layers", 0, "w"): low, ("layers", 1, "w"): high})
    second = found.to_dict()["tensors"][1]["stats"]  # type: ignore[index]

    assert ("nan", "inf", None, 3) == (second["min"], second["max"], second["std"], second["nan"])
    assert ["non-finite", "non-finite"] == codes(found)
    assert "Mean" in str(found)


def test_a_training_checkpoint_says_where_the_weights_are_and_how_far_it_is() -> None:
    found = training().inspection()
    text = message(found, "training-checkpoint")

    assert "(epoch 3, lr 0.001)" in text
    assert "The weights are under 'model', 2 tensors of 160 B: `statedict inspect model.pth --at model`" in text
    assert "under 'optimizer', 4 tensors of 168 B, 51% of all" in text


def test_optimizer_state_is_named_by_shapes_where_they_agree() -> None:
    found = training().inspection()
    owners = {tensor.key: tensor.parameter for tensor in found.tensors}

    assert owners["optimizer.state.0.exp_avg"] == "fc.weight"
    assert owners["optimizer.state.1.step"] == "fc.bias"
    assert owners["model.fc.weight"] is None
    assert "shapes" == found.training.optimizers[0].proof


def test_optimizer_state_is_named_by_the_file_where_it_says() -> None:
    found = training(["fc.bias", "fc.weight"]).inspection()

    assert ("param_names", "fc.bias") == (found.training.optimizers[0].proof, found.tensors[2].parameter)


def test_lists_of_ids_and_names_may_be_one_value() -> None:
    made = training()
    made.objects = {path: entry for path, entry in made.objects.items() if "params" not in path}
    made.value("optimizer", "param_groups", 0, "params", value=[0, 1])
    by_shapes = made.inspection()
    made.value("optimizer", "param_groups", 0, "param_names", value=["fc.bias", "fc.weight"])
    by_names = made.inspection()

    assert ("shapes", "fc.weight") == (by_shapes.training.optimizers[0].proof, by_shapes.tensors[2].parameter)
    assert ("param_names", "fc.bias") == (by_names.training.optimizers[0].proof, by_names.tensors[2].parameter)


def test_groups_that_make_no_sense_are_no_error() -> None:
    made = training()
    for value in (3, [[1], {}], [bytearray(2)], None):
        made.value("optimizer", "param_groups", 0, "params", value=value)
        made.value("optimizer", "param_groups", 1, "param_names", value=value)
        made.value("optimizer", "param_groups", 1, "lr", value=value)
        made.value("optimizer", "param_groups", value=value)

        assert "shapes" != made.inspection().training.optimizers[0].proof


def test_optimizer_state_is_not_named_where_shapes_disagree() -> None:
    made = training()
    made.tensor("optimizer", "state", 0, "exp_avg", shape=(3, 3))
    found = made.inspection()

    assert [None] * 6 == [tensor.parameter for tensor in found.tensors]


def test_optimizer_state_under_parameter_names_is_named_by_them() -> None:
    made = Builder()
    made.tensor("model", "w")
    made.tensor("optim", "state", "w", "exp_avg")
    made.value("optim", "param_groups", 0, "params", 0, value="w")

    assert [None, "w"] == [tensor.parameter for tensor in made.inspection().tensors]


def test_tied_weights_and_buffers_are_no_parameters_of_an_optimizer() -> None:
    made = Builder()
    entry = made.tensor("model", "embed.weight", shape=(10, 4))
    optimizer(made, "optimizer")
    assert entry.view is not None
    made.tensor("model", "head.weight", shape=(10, 4), storage=entry.view.storage)
    for name in ("running_mean", "running_var"):
        made.tensor("model", f"bn.{name}", shape=(4,))

    assert "shapes" == made.inspection().training.optimizers[0].proof


def test_a_wrapped_state_dict_says_where_the_weights_are() -> None:
    made = Builder()
    made.tensor("state_dict", "fc.weight")

    assert "--at state_dict" in message(made.inspection(), "nested-weights")


def test_a_plain_state_dict_is_no_training_checkpoint() -> None:
    made = Builder()
    made.tensor("model.fc.weight")
    made.value("epoch", value=1)

    assert [] == codes(made.inspection())


def test_the_folded_view_is_one_line_per_kind_of_layer() -> None:
    made = Builder()
    for i in range(32):
        made.tensor(f"layers.{i}.mlp.weight", shape=(4096, 11008), dtype=BY_CODE["BF16"])

    assert "  layers.{0…31}.mlp.weight  [4096, 11008]  bfloat16  ×32    2.89 GB" in str(made.inspection()).splitlines()


def test_the_views_list_the_same_tensors() -> None:
    found = training().inspection()
    flat, tree = (str(found.document(view)) for view in ("flat", "tree"))

    assert all(tensor.key in flat for tensor in found.tensors)
    assert "└─ " in tree
    assert "optimizer.state.0.exp_avg" not in str(found)
    assert "exp_avg" in str(found)


def test_a_glob_selects_keys_and_their_totals() -> None:
    found = training().inspection().matching("model.*")

    assert ["model.fc.weight", "model.fc.bias"] == [tensor.key for tensor in found.tensors]
    assert (2, 160, []) == (found.totals.tensors, found.totals.nbytes, found.objects)
    assert "model.*" == found.to_dict()["match"]


def test_paths_that_read_alike_are_shown_escaped() -> None:
    made = Builder()
    made.tensor("a.b")
    made.tensor("a", "b")

    assert ["a\\.b", ".a.b"] == [tensor.key for tensor in made.inspection().tensors]


HOSTILE = ["a\x1b[2J\nb", "<script>", "|`\\", "", " ", "x" * 10_000, "\udc80", ".".join(["0"] * 3000)]


def test_hostile_keys_are_shown_everywhere_without_an_error() -> None:
    made = Builder()
    for key in HOSTILE:
        made.tensor(key, shape=(0,))
        made.value(key, value=key)
    found = made.inspection()
    shown = [str(found), found.to_markdown(), found.to_html(), found._repr_html_(), str(found.document("tree"))]

    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["tensors"][0]["key"] == HOSTILE[0]
    assert all("\x1b" not in text for text in shown[:4])


def test_absurd_shapes_are_counted_without_an_error() -> None:
    made = Builder()
    huge = (10**2000,) * 3
    made.tensors["meta",] = TensorEntry(("meta",), F32, huge, None, device="meta")
    found = made.inspection()

    assert "over 999,999 T" in str(found)
    assert json.dumps(found.to_dict())


def test_ten_thousand_tensors_are_less_than_a_megabyte_of_html() -> None:
    made = Builder()
    for i in range(10_000):
        made.tensor(f"model.layers.{i // 100}.experts.{i % 100}.down_proj.weight", shape=(4096, 11008), dtype=F16)

    assert len(made.inspection().to_html().encode()) < 1_000_000


VALUES: list[tuple[object, object]] = [
    (nan, "nan"),
    (-inf, "-inf"),
    (1 + 2j, {"complex": [1.0, 2.0]}),
    (b"\x00\xff", {"bytes": "00ff", "nbytes": 2}),
    (bytes(100), {"bytes": "00" * 32 + "…", "nbytes": 100}),
    ("x" * 3000, {"text": "x" * 2000, "characters": 3000}),
    ((1, [2.5, None]), [1, [2.5, None]]),
    ({1: "a"}, {"pairs": [[1, "a"]]}),
    ({"a": {2}}, {"a": {"set": [2]}}),
    (list(range(1001)), [*range(1000), {"cut": 1}]),
    (TorchValue("dtype", "bfloat16"), "torch.bfloat16"),
    (TorchValue("device", "cuda:0"), "cuda:0"),
    (TorchValue("Size", (2, 3)), {"torch.Size": [2, 3]}),
    (NumpyScalar("f8", bytes(8), 0.0), 0.0),
    (Opaque("my.pkg", "Config", (1,)), {"opaque": "my.pkg.Config", "args": [1]}),
    (datetime.datetime(2026, 1, 2, 3, 4), "2026-01-02T03:04:00"),
    (datetime.timedelta(days=1), "1 day, 0:00:00"),
    (slice(1, None), {"slice": [1, None, None]}),
    (..., "..."),
    (object(), {"type": "object"}),
    (2**10_000, {"integer": "0x8000000000000000…", "bits": 10_001}),
]


@pytest.mark.parametrize(("value", "expected"), VALUES, ids=lambda each: type(each).__name__)
def test_values_become_json(value: object, expected: object) -> None:
    assert expected == json_value(value)
    assert json.dumps(json_value(value), allow_nan=False)
    assert len(brief(value)) <= 60


def test_a_value_inside_itself_ends() -> None:
    value: list[object] = []
    value.append(value)
    record = Opaque("m", "C")
    record.state = {"self": record, "wide": [[record] * 90] * 90}

    assert json.dumps(json_value(value))
    assert len(json.dumps(json_value(record))) < 1_000_000


def test_values_are_brief_in_a_table() -> None:
    assert "39 items: 0, 1, 2, …" == brief(list(range(39)))
    assert "(0.9, 0.999)" == brief((0.9, 0.999))
    assert "my.Config(…)" == brief(Opaque("my", "Config"))
    assert "1,000 bytes" == brief(bytes(1000))
    assert "'epoch'" == brief("epoch")


@pytest.mark.parametrize("named", [False, True])
def test_the_state_of_a_torch_optimizer_is_shown_by_parameter(named: bool, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from statedict.formats.torch_zip import read_manifest
    from statedict.io.ranges import LocalFile

    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
    adam = torch.optim.AdamW(model.named_parameters() if named else model.parameters(), lr=0.01)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    adam.step()
    path = tmp_path / "run.pth"
    torch.save({"model_state_dict": model.state_dict(), "optimizer_state_dict": adam.state_dict(), "epoch": 7}, path)
    file = LocalFile(str(path))
    found = inspection_of(read_manifest([file]), "run.pth")
    file.close()
    owners = {tensor.parameter: tensor.entry.shape for tensor in found.tensors if tensor.key.endswith("exp_avg")}

    assert {name: tuple(parameter.shape) for name, parameter in model.named_parameters()} == owners
    assert ("param_names" if named else "shapes") == found.training.optimizers[0].proof
    assert 3 + 3 + 1 == found.totals.buffers
    assert "(epoch 7, lr 0.01)" in message(found, "training-checkpoint")

"""The figures of values, against those of numpy in float64."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save_file

import statedict
from statedict.cli import main

Array = np.ndarray[Any, Any]

FLOATS = ["float16", "float32", "float64", "bfloat16"]
EIGHT_BITS = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"]


def figures_of(value: object, key: str = "x") -> dict[str, Any]:
    """The figures of one tensor of a source."""
    found = {tensor.key: tensor for tensor in statedict.inspect(value, stats=True).tensors}
    stats = found[key].stats
    assert stats is not None
    return dict(stats)


def expected(array: Array) -> dict[str, Any]:
    """The same by numpy, in float64."""
    values = array.astype(np.float64).reshape(-1)
    known, finite = values[~np.isnan(values)], values[np.isfinite(values)]
    return {
        "min": known.min() if known.size else None,
        "max": known.max() if known.size else None,
        "mean": finite.mean() if finite.size else None,
        "std": finite.std() if finite.size else None,
        "zeros": int((values == 0).sum()),
        "nan": int(np.isnan(values).sum()),
        "inf": int(np.isinf(values).sum()),
    }


def close(found: dict[str, Any], wanted: dict[str, Any], rel: float = 2e-6) -> bool:
    """Whether counts and extremes are equal, and the mean and spread near enough, measured by the values' own size."""
    exact = all(found[name] == wanted[name] for name in ("min", "max", "zeros", "nan", "inf"))
    if wanted["mean"] is None:
        return exact and found["mean"] is None and found["std"] is None
    scale = max(abs(wanted["mean"]), wanted["std"])
    near = math.isclose(found["mean"], wanted["mean"], rel_tol=rel, abs_tol=rel * scale)
    return exact and near and math.isclose(found["std"], wanted["std"], rel_tol=rel, abs_tol=1e-12 * scale)


def random(seed: int, count: int = 300_000) -> Array:
    values: Array = np.random.default_rng(seed).standard_normal(count)
    return values


@pytest.mark.parametrize("name", FLOATS + EIGHT_BITS)
def test_every_kind_of_float(name: str) -> None:
    values = random(1).astype(getattr(ml_dtypes, name, name))

    assert close(figures_of({"x": values}), expected(values), rel=2e-6 if name in FLOATS else 1e-5)


@pytest.mark.parametrize("name", FLOATS)
def test_values_that_are_not_finite_are_counted_apart(name: str) -> None:
    values = random(2).astype(getattr(ml_dtypes, name, name))
    values[::1000], values[1::1000], values[2::1000], values[3::500], values[4] = np.nan, np.inf, -np.inf, 0.0, -0.0

    assert close(figures_of({"x": values}), expected(values))


@pytest.mark.parametrize("fill", [np.nan, np.inf, -np.inf, 0.0, -0.0, 1.5])
def test_values_that_are_all_one(fill: float) -> None:
    values = np.full(70_000, fill, np.float32)

    assert close(figures_of({"x": values}), expected(values))


@pytest.mark.parametrize(
    ("mean", "spread"),
    [(1e4, 1e-1), (1e4, 1e-3), (-3e7, 2.0), (1e20, 1e18), (1e-20, 1e-22), (0, 1e30), (0, 1e-30), (5, 0)],
)
def test_the_spread_is_right_wherever_the_mean_is(mean: float, spread: float) -> None:
    values = (random(3) * spread + mean).astype(np.float32)

    assert close(figures_of({"x": values}), expected(values))


def test_one_value_apart_from_all_others() -> None:
    values = np.full(257, 3.5e-11, np.float32)
    values[0] = 0

    assert close(figures_of({"x": values}), expected(values))


def test_the_mean_may_wander() -> None:
    values = np.concatenate([random(4, 100_000) + shift for shift in (0, 1000, -50, 1e6)]).astype(np.float32)

    assert close(figures_of({"x": values}), expected(values))


def test_float64_keeps_its_precision() -> None:
    values = 1e9 + random(5)

    assert close(figures_of({"x": values}), expected(values), rel=1e-9)


@pytest.mark.parametrize("name", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
def test_integers_are_exact_at_their_ends(name: str) -> None:
    limits = np.iinfo(name)
    values = np.array([limits.min, limits.max, 0, 1, 1, 7] * 30_000, name)
    found, wanted = figures_of({"x": values}), expected(values)

    assert (int(limits.min), int(limits.max)) == (found["min"], found["max"])
    assert close(found, {**wanted, "min": int(limits.min), "max": int(limits.max)})


def test_truth_values_are_counted() -> None:
    values = np.arange(100_000) % 4 == 0
    found = figures_of({"x": values})

    assert (0, 1, 0.25, 75_000) == (found["min"], found["max"], found["mean"], found["zeros"])
    assert math.isclose(found["std"], values.std())


@pytest.mark.parametrize("name", ["complex64", "complex128"])
def test_complex_numbers_have_no_extremes(name: str) -> None:
    values = (random(6, 50_000) + 1j * random(7, 50_000)).astype(name)
    values[0], values[1], values[2] = 0, complex(np.nan, 1), complex(1, np.inf)
    found, finite = figures_of({"x": values}), np.delete(values, [1, 2]).astype(np.complex128)

    assert (None, None, 1, 1, 1) == (found["min"], found["max"], found["zeros"], found["nan"], found["inf"])
    assert abs(found["mean"] - finite.mean()) < 1e-9
    assert math.isclose(found["std"], finite.std(), rel_tol=1e-9)


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2)])
def test_no_value_has_no_figures(shape: tuple[int, ...]) -> None:
    assert {"min": None, "max": None, "mean": None, "std": None, "zeros": 0, "nan": 0, "inf": 0} == figures_of(
        {"x": np.zeros(shape, np.float32)}
    )


def test_views_are_counted_as_they_show() -> None:
    base = random(8, 10_000).astype(np.float32).reshape(100, 100)
    base[3, 4] = 0
    for view in (base.T, base[:, ::3], base[10:20], np.broadcast_to(base[3], (50, 100)), base[5, 6]):
        assert close(figures_of({"x": np.asarray(view)}), expected(np.asarray(view)))


def test_a_view_that_claims_a_terabyte_costs_what_it_holds() -> None:
    found = figures_of({"x": np.broadcast_to(np.array([0.0, 2.0]), (10**12, 2))})

    assert (0, 2, 1, 1, 10**12) == (found["min"], found["max"], found["mean"], found["std"], found["zeros"])


@given(hnp.arrays(np.float32, st.integers(0, 300), elements=st.floats(width=32, allow_subnormal=True)))
def test_whatever_the_values_are(values: Array) -> None:
    with np.errstate(all="ignore"):
        wanted = expected(values)

    assert close(figures_of({"x": values}), wanted, rel=1e-5)


def test_tied_tensors_have_the_same_figures_and_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = random(9, 100_000).astype(np.float32)
    statedict.convert({"a": values, "b": values}, tmp_path / "m.safetensors")
    read: list[int] = []
    from statedict.io.ranges import LocalFile

    whole = LocalFile.read_into

    def watched(self: LocalFile, offset: int, buffer: memoryview) -> None:
        read.append(len(buffer))
        whole(self, offset, buffer)

    monkeypatch.setattr(LocalFile, "read_into", watched)
    found = statedict.inspect(tmp_path / "m.safetensors", stats=True)

    assert found.tensors[0].stats == found.tensors[1].stats
    assert values.nbytes == sum(read)


def test_many_tensors_of_every_size_are_all_counted(tmp_path: Path) -> None:
    sizes = [1, 2, 100, 16_384, 16_385, 70_000, 3_000_000] * 20
    value = {f"t{at}": np.full(size, at, np.float32) for at, size in enumerate(sizes[:120])}
    save_file(value, tmp_path / "m.safetensors")
    found = statedict.inspect(tmp_path / "m.safetensors", stats=True)

    assert {key: (array[0], 0.0) for key, array in value.items()} == {
        tensor.key: (tensor.stats["mean"], tensor.stats["std"]) for tensor in found.tensors if tensor.stats
    }


def test_figures_do_not_depend_on_the_threads(tmp_path: Path) -> None:
    save_file({"x": random(10, 20_000_000).astype(np.float32)}, tmp_path / "m.safetensors")

    assert 1 == len({repr(figures_of(tmp_path / "m.safetensors")) for _ in range(4)})


def test_an_error_of_the_file_ends_all_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    path = tmp_path / "m.safetensors"
    save_file({"x": np.zeros(30_000_000, np.float32)}, path)
    with statedict.open(path) as checkpoint:
        os.truncate(path, 50_000_000)

        with pytest.raises(statedict.CorruptFile, match="ends too early"):
            statedict.inspect(checkpoint, stats=True)


def test_the_command_line_shows_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"x": np.array([1, np.nan, np.inf, 0], np.float32)}, tmp_path / "m.safetensors")
    code = main(["inspect", str(tmp_path / "m.safetensors"), "--stats", "--format", "json"])
    found = json.loads(capsys.readouterr().out)
    text = main(["inspect", str(tmp_path / "m.safetensors"), "--stats"]), capsys.readouterr().out

    assert 0 == code == text[0]
    assert {"min": 0.0, "max": "inf", "mean": 0.5, "std": 0.5, "zeros": 1, "nan": 1, "inf": 1} == found["tensors"][0][
        "stats"
    ]
    assert ["non-finite", "non-finite"] == [finding["code"] for finding in found["findings"]]
    assert all(word in text[1] for word in ("Min", "Mean", "NaN"))


@pytest.mark.filterwarnings("ignore:.*quantiz")
def test_torch_tensors_of_every_layout(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    values = torch.randn(40, 30)
    quantized = torch.quantize_per_tensor(values, 0.05, 3, torch.qint8)
    value = {
        "q": quantized,
        "conj": torch.randn(50, dtype=torch.complex64).conj(),
        "bf": values.bfloat16().t(),
        "half4": torch.tensor([0x21, 0xF0], dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        "meta": torch.ones(3, device="meta"),
        "coo": values.relu().to_sparse(),
    }
    torch.save(value, tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "m.pt") as old, zipfile.ZipFile(tmp_path / "packed.pt", "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info), zipfile.ZIP_DEFLATED)
    for name in ("m.pt", "packed.pt"):
        found = statedict.inspect(tmp_path / name, stats=True)
        stats = {tensor.key: tensor.stats for tensor in found.tensors}

        wanted = quantized.dequantize().double()
        q: Any = stats["q"]
        assert math.isclose(q["mean"], wanted.mean().item(), rel_tol=1e-5, abs_tol=1e-7)
        assert math.isclose(q["std"], wanted.std(unbiased=False).item(), rel_tol=1e-5)
        assert (wanted == 0).sum().item() == q["zeros"]
        conj: Any = stats["conj"]
        assert abs(conj["mean"] - value["conj"].resolve_conj().mean().item()) < 1e-6
        bf: Any = stats["bf"]
        assert math.isclose(bf["mean"], value["bf"].double().mean().item(), rel_tol=1e-5, abs_tol=1e-7)
        four: Any = stats["half4"]
        assert (-6, 1, 1) == (four["min"], four["max"], four["zeros"])
        assert {"meta": None, "coo": None} == {key: stats[key] for key in ("meta", "coo")}
        assert {("meta",), ("coo",)} == {finding.keys for finding in found.findings if finding.code == "no-stats"}


# -------------------------------------------------------------------- where the figures are hard to count


@pytest.mark.parametrize("values", [[1e200, -1e200, 3e200], [1.7e308, -1.7e308, 1.6e308], [1e-200, -1e-200, 3e-200]])
def test_numbers_whose_squares_float64_lacks(values: list[float]) -> None:
    found = figures_of({"x": np.array(values)})
    unit = max(values)
    scaled = np.array([value / unit for value in values])

    assert math.isclose(found["mean"] / unit, scaled.mean(), rel_tol=1e-12)
    assert math.isclose(found["std"] / unit, scaled.std(), rel_tol=1e-12)


def test_large_complex_numbers() -> None:
    found = figures_of({"x": np.array([1e300 + 1e300j, -1e300 + 1e300j])})

    assert 0 == found["mean"].real and math.isclose(found["mean"].imag, 1e300)
    assert math.isclose(found["std"], 1e300)


@pytest.mark.parametrize("count", [1, 1001, 300_001])
@pytest.mark.parametrize("name", EIGHT_BITS)
def test_every_byte_of_an_eight_bit_float_is_counted(name: str, count: int) -> None:
    values = np.random.default_rng(11).integers(0, 256, count).astype(np.uint8).view(getattr(ml_dtypes, name))

    assert close(figures_of({"x": values}), expected(values), rel=1e-12)


def test_pairs_of_four_bit_numbers(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    raw = np.random.default_rng(12).integers(0, 256, 200_001).astype(np.uint8)
    torch.save({"x": torch.from_numpy(raw).view(torch.float4_e2m1fn_x2)}, tmp_path / "m.pt")
    values = np.concatenate([raw & 15, raw >> 4]).view(ml_dtypes.float4_e2m1fn)

    assert close(figures_of(tmp_path / "m.pt"), expected(values), rel=1e-12)


def test_elements_in_any_order_and_with_gaps() -> None:
    base = random(13, 600_000).astype(np.float32).reshape(60, 100, 100)
    for view in (base.transpose(2, 0, 1), base[::2, :, 3:50].T, base[:, 7:8, ::-1][:, :, ::-1], base[:, ::99]):
        assert close(figures_of({"x": view}), expected(view))


def test_windows_that_overlap_are_counted_as_often_as_they_show() -> None:
    base = random(14, 40_000).astype(np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(base, 100)

    assert close(figures_of({"x": windows}), expected(windows))


def test_a_view_beyond_the_limit_has_no_figures_and_the_others_have(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"windows": torch.zeros(1000).unfold(0, 100, 1), "x": torch.ones(3)}, tmp_path / "m.pt")
    found = statedict.inspect(tmp_path / "m.pt", stats=True, limits=statedict.Limits(expanded_bytes=1000))
    (without,) = [finding for finding in found.findings if finding.code == "no-stats"]

    assert [None, 1.0] == [tensor.stats and tensor.stats["mean"] for tensor in found.tensors]
    assert ("windows",) == without.keys and "expanded_bytes" in without.message


@pytest.mark.parametrize("count", [1000, 100_000])
def test_big_endian_values_are_turned(count: int, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    values = random(15, count)
    turned = torch.from_numpy(values.byteswap())
    torch.save({"x": turned, "part": turned[1::3]}, tmp_path / "little.pt")
    with zipfile.ZipFile(tmp_path / "little.pt") as old, zipfile.ZipFile(tmp_path / "m.pt", "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, b"big" if info.filename.endswith("byteorder") else old.read(info))

    assert close(figures_of(tmp_path / "m.pt"), expected(values))
    assert close(figures_of(tmp_path / "m.pt", "part"), expected(values[1::3]))


def test_a_compressed_record_is_unwrapped_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(8_000_000) % 1000
    np.savez_compressed(tmp_path / "m.npz", x=values, y=values[::-1])
    from statedict.io.ranges import LocalFile

    read: list[int] = []
    whole = LocalFile.read

    def watched(self: LocalFile, offset: int, nbytes: int) -> bytes:
        read.append(nbytes)
        return whole(self, offset, nbytes)

    monkeypatch.setattr(LocalFile, "read", watched)
    found = statedict.inspect(tmp_path / "m.npz", stats=True)

    assert all(close(dict(tensor.stats or {}), expected(values)) for tensor in found.tensors)
    assert sum(read) < 1.5 * (tmp_path / "m.npz").stat().st_size + 1_000_000


@pytest.mark.filterwarnings("ignore:.*quantiz")
@pytest.mark.parametrize("scale", [-1.0, 0.0, math.inf, math.nan])
def test_an_impossible_scale_gives_no_figures(scale: float, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    whole = torch.arange(4, dtype=torch.int8)
    torch.save({"q": torch._make_per_tensor_quantized_tensor(whole, scale, 0)}, tmp_path / "m.pt")
    found = statedict.inspect(tmp_path / "m.pt", stats=True)

    assert found.tensors[0].stats is None
    assert "no-stats" in [finding.code for finding in found.findings]

"""The options of convert, each against the same thing done in torch; the results are read by torch and the safetensors library."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import statedict
from statedict import Checkpoint, RuleError, rules
from statedict.cli import main

torch = pytest.importorskip("torch")

from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from saved_values import facts, saved, sharing  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*(TypedStorage is deprecated|beta state|quantiz).*")

State = dict[str, Any]
FLOATS = ("float64", "float32", "float16", "bfloat16")


def state() -> State:
    torch.manual_seed(0)
    return {
        "module.layers.0.weight": torch.randn(4, 3),
        "module.layers.0.bias": torch.randn(4),
        "module.layers.1.weight": torch.randn(2, 4),
        "module.layers.1.bias": torch.randn(2),
        "module.steps": torch.tensor(7),
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return saved(state(), tmp_path / "source.pth")


def converted(source: Path, *options: str) -> State:
    """What the safetensors library reads of what the command line wrote."""
    target = source.with_name("target.safetensors")

    assert 0 == main(["-q", "convert", str(source), str(target), "--overwrite", *options])
    return load_file(target)


def same(expected: State, found: State) -> bool:
    return expected.keys() == found.keys() and all(facts(expected[name]) == facts(found[name]) for name in expected)


CHANGES: dict[str, Any] = {
    "--strip-prefix module.": lambda s: {name.removeprefix("module."): value for name, value in s.items()},
    "--add-prefix net.": lambda s: {f"net.{name}": value for name, value in s.items()},
    r"--rename \.layers\.(\d+)\.=.blocks.\1.": lambda s: {
        re.sub(r"\.layers\.(\d+)\.", r".blocks.\1.", name): value for name, value in s.items()
    },
    "--rename module.layers.{n}.weight=l.{n+1}.w": lambda s: {
        re.sub(r"^module\.layers\.(\d+)\.weight$", lambda m: f"l.{int(m[1]) + 1}.w", name): value
        for name, value in s.items()
    },
    "--drop *.bias": lambda s: {name: value for name, value in s.items() if not name.endswith(".bias")},
    "--keep *.layers.0.*": lambda s: {name: value for name, value in s.items() if ".layers.0." in name},
    "--transpose *.weight": lambda s: {
        name: value.t().contiguous() if name.endswith(".weight") else value for name, value in s.items()
    },
    "--dtype bf16": lambda s: {
        name: value.bfloat16() if value.is_floating_point() else value for name, value in s.items()
    },
}


@pytest.mark.parametrize("option", CHANGES)
def test_each_option_does_what_torch_would(option: str, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = converted(source, *option.split(" "))

    assert same(CHANGES[option](state()), found)


def test_all_of_them_together(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = state()
    order = [option for option in CHANGES if not option.startswith(("--rename module", "--keep"))]
    for option in order:
        expected = CHANGES[option](expected)
    found = converted(source, *[word for option in order for word in option.split(" ")])

    assert same(expected, found)


def test_rules_are_applied_in_the_order_of_the_command_line(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = converted(source, "--add-prefix", "a.", "--rename", "^a.module=b", "--add-prefix", "a.")
    second = converted(source, "--add-prefix", "a.", "--add-prefix", "a.", "--rename", "^a.a.module=c")

    assert {"a.b"} == {".".join(name.split(".")[:2]) for name in first}
    assert {"c"} == {name.split(".")[0] for name in second}


def test_a_file_of_rules_stands_in_the_same_order(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules.Rules([rules.rename(r"^x\.", "y."), rules.drop("*.bias")]).to_file(source.with_name("rules.toml"))
    found = converted(
        source, "--strip-prefix", "module.", "--add-prefix", "x.", "--rules", str(source.with_name("rules.toml"))
    )

    assert {"y.layers.0.weight", "y.layers.1.weight", "y.steps"} == set(found)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (r"a=b", ("a", "b")),
        (r"a=", ("a", "")),
        (r"a=b=c", ("a", "b=c")),
        (r"a\=b=c", (r"a\=b", "c")),
        (r"a(?=b)=c", (r"a(?=b)", "c")),
        (r"(?<=a)b=c", (r"(?<=a)b", "c")),
        (r"[=]=c", (r"[=]", "c")),
        (r"[]=]=c", (r"[]=]", "c")),
        (r"[^]=]=c", (r"[^]=]", "c")),
        (r"\(=c", (r"\(", "c")),
        (r"abc", ("abc", None)),
        (r"(a=b", ("(a=b", None)),
    ],
)
def test_the_first_equals_sign_outside_of_brackets_parts_regex_and_replacement(typed: str, expected: object) -> None:
    from statedict.cli.convert import _parted

    assert expected == _parted(typed)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--strip-prefix", "modul."], "matches nothing"),
        (["--drop", "nothing.*"], "matches nothing"),
        (["--rename", r"layers\.\d+=layers.0"], "one name"),
        (["--rename", "abc"], "--rename has no '='"),
        (["--rename", "(=x)"], "--rename has no '='"),
        (["--rename", "[=x"], "--rename has no '='"),
        (["--transpose", "*.bias"], "module.layers.0.bias"),
        (["--dtype", "float99"], "float99"),
        (["--dtype", "complex64"], "only floats are cast"),
        (["--rules", "missing.toml"], "missing.toml"),
        (["--ema"], "no averaged weights"),
    ],
)
def test_what_can_not_be_is_one_line_and_leaves_nothing(
    options: list[str], said: str, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["convert", str(source), str(source.with_name("target.safetensors")), *options])
    streams = capsys.readouterr()

    assert (2, "", 1) == (code, streams.out, len(streams.err.splitlines()))
    assert said in streams.err
    assert ["source.pth"] == [path.name for path in source.parent.iterdir()]


def test_the_result_says_which_rules_and_what_they_met(source: Path) -> None:
    target = source.with_name("t.safetensors")
    chosen = [rules.strip_prefix("module."), rules.drop("*.bias")]
    result = statedict.convert(source, target, rules=chosen, dry_run=True)
    shown = result.to_dict()
    coverage = shown["coverage"]
    assert isinstance(coverage, dict)

    assert ["strip_prefix('module.')", "drop('*.bias')"] == result.rules
    assert [5, 2] == [each["matched"] for each in coverage["rules"]]
    assert not target.exists()
    assert json.dumps(shown)
    assert "strip_prefix('module.')" in str(result)


def test_every_format_takes_the_same_rules(tmp_path: Path) -> None:
    value = {"model": state(), "epoch": 3}
    source = saved(value, tmp_path / "source.pth")
    chosen = [rules.rename(r"\.module\.", "."), rules.cast("*.weight", "float16"), rules.drop("*steps")]
    statedict.convert(source, tmp_path / "a.pth", rules=chosen)
    statedict.convert(source, tmp_path / "b.safetensors", rules=chosen)
    statedict.convert(tmp_path / "b.safetensors", tmp_path / "b.pth")
    expected = {
        "model": {
            name.removeprefix("module."): tensor.half() if name.endswith("weight") else tensor
            for name, tensor in state().items()
            if name != "module.steps"
        },
        "epoch": 3,
    }

    for name in ("a.pth", "b.pth"):
        assert facts(expected) == facts(torch.load(tmp_path / name, weights_only=True)), name


# ---------------------------------------------------------------- the cast


def values(dtype: str) -> Any:
    numbers = [0.0, -0.0, 1.0, -1.5, 3.14159, 1e-3, 6e-8, 1e-30, 65504.0, math.inf, -math.inf, math.nan]
    return torch.cat([torch.tensor(numbers), torch.randn(5000), torch.randn(100) * 1e-6]).to(getattr(torch, dtype))


@pytest.mark.parametrize("after", FLOATS)
@pytest.mark.parametrize("before", FLOATS)
def test_a_cast_is_torchs_and_its_report_is_true(before: str, after: str, tmp_path: Path) -> None:
    tensor = values(before)
    source = saved({"w": tensor.reshape(8, -1), "n": torch.arange(3), "mask": torch.tensor([True])}, tmp_path / "s.pth")
    result = statedict.convert(source, tmp_path / "t.safetensors", dtype=after, allow_overflow=True)
    found = load_file(tmp_path / "t.safetensors")
    expected = tensor.to(getattr(torch, after)).reshape(8, -1)
    there = expected.double().reshape(-1)
    old = tensor.double()
    both = torch.isfinite(old) & torch.isfinite(there)
    apart = (old - there)[both].abs()

    assert torch.equal(expected.nan_to_num(9.0), found["w"].nan_to_num(9.0))
    assert (torch.int64, torch.bool) == (found["n"].dtype, found["mask"].dtype)
    assert (["w"] if before != after else []) == [each.key for each in result.casts]
    for each in result.casts:
        assert int((torch.isfinite(old) & torch.isinf(there)).sum()) == each.overflowed
        assert int(((old != 0) & (there == 0)).sum()) == each.underflowed
        assert float(apart.max()) == pytest.approx(each.max_abs)
        assert float((apart / old[both].abs())[old[both] != 0].max()) == pytest.approx(each.max_rel, rel=1e-5)


def test_a_number_that_would_become_inf_is_refused_with_its_tensor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {"small": torch.ones(3), "layers.0.large": torch.tensor([1.0, 1e6, -1e9]), "inf": torch.tensor([math.inf])}
    source = saved(state, tmp_path / "s.pth")
    words = ["convert", str(source), str(tmp_path / "t.safetensors"), "--dtype", "float16", "--format", "json"]
    code = main(words)
    said = capsys.readouterr().err

    assert (2, 1) == (code, len(said.splitlines()))
    assert "'layers.0.large' (2)" in said
    assert "--allow-overflow" in said
    assert ["s.pth"] == [path.name for path in tmp_path.iterdir()]
    assert 0 == main([*words, "--allow-overflow"])
    shown = {each["key"]: each["overflowed"] for each in json.loads(capsys.readouterr().out)["casts"]}
    assert {"small": 0, "layers.0.large": 2, "inf": 0} == shown
    assert torch.isinf(load_file(tmp_path / "t.safetensors")["layers.0.large"][1:]).all()


def test_a_dry_run_reports_the_same_and_writes_nothing(source: Path) -> None:
    target = source.with_name("t.safetensors")
    planned = statedict.convert(source, target, dtype="float16", dry_run=True)
    assert not target.exists()
    written = statedict.convert(source, target, dtype="float16")

    assert planned.to_dict()["casts"] == written.to_dict()["casts"]
    assert planned.nbytes == target.stat().st_size


def test_a_cast_that_loses_nothing_reads_nothing_before(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from statedict.ops import casting

    def fail(*_: object) -> None:
        raise AssertionError("the values were read")

    monkeypatch.setattr(casting, "_pieces", fail)
    result = statedict.convert(source, source.with_name("t.safetensors"), dtype="float64")

    assert [(0, 0, 0.0)] * 4 == [(each.overflowed, each.underflowed, each.max_abs) for each in result.casts]


def test_a_tied_tensor_is_cast_once_and_stays_tied(tmp_path: Path) -> None:
    weight = torch.randn(5, 3)
    source = saved({"embed": weight, "head": weight, "transposed": weight.t()}, tmp_path / "s.pth")
    statedict.convert(source, tmp_path / "t.pth", dtype="bfloat16")
    found = torch.load(tmp_path / "t.pth", weights_only=True)

    assert {frozenset({("embed",), ("head",)}), frozenset({("transposed",)})} == sharing(found)
    assert torch.equal(weight.t().bfloat16(), found["transposed"])


def test_a_cast_keeps_strides_as_torch_does(tmp_path: Path) -> None:
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    value = {"image": image, "row": torch.randn(8, 4)[:, :2], "expanded": torch.ones(1, 4).expand(3, 4)}
    source = saved(value, tmp_path / "s.pth")
    statedict.convert(source, tmp_path / "t.pth", dtype="float16")
    found = torch.load(tmp_path / "t.pth", weights_only=True)

    assert image.half().stride() == found["image"].stride()
    for name, tensor in value.items():
        assert torch.equal(tensor.half(), found[name]), name


def test_what_is_no_plain_float_is_left_alone_and_said(tmp_path: Path) -> None:
    value = {
        "sparse": torch.eye(3).to_sparse(),
        "quantized": torch.quantize_per_tensor(torch.randn(4), 0.1, 3, torch.qint8),
        "complex": torch.randn(2, dtype=torch.complex64),
        "float8.weight": torch.randn(4).to(torch.float8_e4m3fn),
        "float8.weight_scale_inv": torch.ones(1),
        "int8.weight": torch.ones(2, 2, dtype=torch.int8),
        "int8.SCB": torch.ones(2),
        "gptq.qweight": torch.ones(2, 2, dtype=torch.int32),
        "gptq.scales": torch.ones(2).half(),
        "norm.weight": torch.ones(2),
    }
    source = saved(value, tmp_path / "s.pth")
    result = statedict.convert(source, tmp_path / "t.pth", dtype="bfloat16")
    found = torch.load(tmp_path / "t.pth", weights_only=True)

    assert ["norm.weight"] == [each.key for each in result.casts]
    assert torch.bfloat16 == found.pop("norm.weight").dtype
    del value["norm.weight"]
    assert facts(value) == facts(found)
    said = {key for finding in result.findings if finding.code == "cast-left-alone" for key in finding.keys}
    assert set(value) == said


def test_the_steps_of_an_optimizer_are_no_numbers_to_round(tmp_path: Path) -> None:
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    run = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    run["optimizer"]["state"][0]["step"] = torch.tensor(1_000_001.0)
    source = saved(run, tmp_path / "s.pth")
    result = statedict.convert(source, tmp_path / "t.pth", dtype="bfloat16")
    found = torch.load(tmp_path / "t.pth", weights_only=True)

    assert 1_000_001.0 == found["optimizer"]["state"][0]["step"].item()
    assert torch.bfloat16 == found["optimizer"]["state"][0]["exp_avg"].dtype
    assert ["warning"] == [finding.level for finding in result.findings if finding.code == "cast-optimizer"]


def test_the_table_of_casts_folds_layers_and_begins_with_the_worst(tmp_path: Path) -> None:
    layers = {f"layers.{at}.w": torch.randn(3) for at in range(12)}
    source = saved({**layers, "bad": torch.tensor([1e9])}, tmp_path / "s.pth")
    result = statedict.convert(source, tmp_path / "t.pth", dtype="fp16", allow_overflow=True, dry_run=True)
    lines = str(result).splitlines()
    table = lines[lines.index("Cast to float16") :]

    assert table[2].split()[:3] == ["bad", "float32", "1"]
    assert table[3].split()[:3] == ["layers.{0…11}.w", "float32", "×12"]


def test_a_cast_of_meta_tensors_needs_no_values(tmp_path: Path) -> None:
    source = saved({"x": torch.ones(3, device="meta")}, tmp_path / "s.pth")
    statedict.convert(source, tmp_path / "t.pth", dtype="float16")
    found = torch.load(tmp_path / "t.pth", weights_only=True)["x"]

    assert (torch.float16, "meta") == (found.dtype, found.device.type)


def test_progress_goes_up_to_all_bytes(source: Path) -> None:
    seen: list[tuple[int, int]] = []
    statedict.convert(
        source, source.with_name("t.pth"), dtype="bf16", on_progress=lambda done, total: seen.append((done, total))
    )

    assert 1 == len({total for _, total in seen})
    assert sorted(seen) == seen
    assert seen[-1][0] == seen[-1][1]


def test_bytes_of_a_derived_tensor_that_come_back_otherwise_leave_nothing(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from statedict.io.durable import DurableFile

    whole = DurableFile.reopened

    def flipped(self: DurableFile) -> Any:
        self.write_at(self.nbytes - 1, [b"\x55"])
        return whole(self)

    monkeypatch.setattr(DurableFile, "reopened", flipped)
    target = source.with_name("t.safetensors")

    with pytest.raises(statedict.CorruptFile, match="the disk gives back other bytes"):
        statedict.convert(source, target, rules=[rules.drop("*steps")], dtype="float16")
    assert ["source.pth"] == [path.name for path in source.parent.iterdir()]


def test_a_checkpoint_that_is_handed_in_stays_open(source: Path) -> None:
    with statedict.open(source) as checkpoint:
        statedict.convert(checkpoint, source.with_name("t.pth"), rules=[rules.drop("*.bias")], dtype="float16")

        assert isinstance(checkpoint, Checkpoint)
        assert torch.equal(state()["module.steps"], checkpoint["module.steps"].torch())


def test_an_error_of_a_rule_names_the_file(source: Path) -> None:
    with pytest.raises(RuleError, match=r"source\.pth: strip_prefix\('x\.'\) matches nothing"):
        statedict.convert(source, source.with_name("t.pth"), rules=rules.strip_prefix("x."))


# ---------------------------------------------------------------- there and back


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=4),
    dtype=st.sampled_from(["float32", "float16", "bfloat16", "int8"]),
)
def test_rules_and_their_inverse_give_the_same_file(shapes: list[list[int]], dtype: str, tmp_path: Path) -> None:
    kind = getattr(torch, dtype)
    state = {
        f"layers.{at}.w": torch.arange(math.prod(shape)).reshape(shape).to(kind) for at, shape in enumerate(shapes)
    }
    save_file(state, tmp_path / "a.safetensors")
    there = rules.Rules([rules.rename("layers.{n}.w", "blocks.{n+3}.weight"), rules.add_prefix("net.")])
    back = there.inverse()
    assert back is not None
    for source, target, chosen in (("a", "b", there), ("b", "c", back), ("a", "d", ())):
        statedict.convert(
            tmp_path / f"{source}.safetensors", tmp_path / f"{target}.safetensors", rules=chosen, overwrite=True
        )

    assert (tmp_path / "d.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert {f"net.blocks.{at + 3}.weight" for at in range(len(shapes))} == set(file.keys())


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bits=st.lists(st.integers(0, 65535), min_size=1, max_size=300), narrow=st.sampled_from(["float16", "bfloat16"]))
def test_a_wider_dtype_and_back_gives_the_same_numbers(bits: list[int], narrow: str, tmp_path: Path) -> None:
    tensor = torch.tensor(bits, dtype=torch.uint16).view(getattr(torch, narrow))
    tensor = tensor.nan_to_num(1.0, math.inf, -math.inf)
    save_file({"x": tensor}, tmp_path / "a.safetensors")
    statedict.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", dtype="float32", overwrite=True)
    statedict.convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", dtype=narrow, overwrite=True)

    assert torch.equal(tensor.float(), load_file(tmp_path / "b.safetensors")["x"])
    assert torch.equal(tensor.view(torch.int16), load_file(tmp_path / "c.safetensors")["x"].view(torch.int16))


def test_a_cast_among_the_rules_is_examined_too(tmp_path: Path) -> None:
    torch.save({"a": torch.tensor([1.0, 1e6]), "b": torch.tensor([2.0]), "n": torch.tensor([3])}, tmp_path / "a.pth")
    wanted = [rules.cast("a", "float16"), rules.rename("a", "c")]
    with pytest.raises(RuleError, match=r"float16 doesn't reach 1 number of 1 tensor.*'a' \(1\)"):
        statedict.convert(tmp_path / "a.pth", tmp_path / "b.safetensors", rules=wanted)
    assert not (tmp_path / "b.safetensors").exists()

    result = statedict.convert(tmp_path / "a.pth", tmp_path / "b.safetensors", rules=wanted, allow_overflow=True)

    assert [("a", 1)] == [(each.key, each.overflowed) for each in result.casts]
    assert torch.isinf(load_file(tmp_path / "b.safetensors")["c"][1])

"""``load_into`` against torch's ``load_state_dict``: what fits is loaded as torch loads it, what doesn't changes nothing."""

from __future__ import annotations

import copy
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import statedict
from statedict import CorruptFile, KeyMismatch, SpecMismatch, StateDictError, rules

torch = pytest.importorskip("torch")
nn = torch.nn


def net(width: int = 4) -> Any:
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Sequential(nn.Linear(width, 2, bias=False)))


def trained(module: Any) -> Any:
    """The module with other numbers in every parameter and buffer."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for value in [*module.parameters(), *module.buffers()]:
            value.copy_(torch.randn(value.shape, generator=generator).mul(10).to(value.dtype))
    return module


def same(one: Any, other: Any) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return list(first) == list(second) and all(
        torch.equal(first[key], second[key]) if isinstance(first[key], torch.Tensor) else first[key] == second[key]
        for key in first
    )


@contextmanager
def unchanged(module: Any) -> Iterator[None]:
    """Nothing of the module may be another afterwards: no value, no object, no bit."""
    before = {key: (value, value.detach().clone()) for key, value in module.state_dict(keep_vars=True).items()}
    yield
    after = module.state_dict(keep_vars=True)
    assert list(before) == list(after)
    for key, (value, copied) in before.items():
        assert value is after[key] and torch.equal(copied, after[key])


@pytest.fixture(params=["pth", "safetensors", "memory"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """The state dict of a trained net: of torch's file, of ours, and in memory."""
    state = trained(net()).state_dict()
    if request.param == "memory":
        return state
    path = tmp_path / f"net.{request.param}"
    torch.save(state, path) if request.param == "pth" else statedict.save(state, path)
    return path


@pytest.mark.parametrize("check", ["before", "while", False])
@pytest.mark.parametrize("assign", [False, True])
def test_values_arrive_and_parameters_stay_the_same_objects(source: Any, check: Any, assign: bool) -> None:
    module = net()
    before = list(module.parameters())
    report = statedict.load_into(module, source, check=check, assign=assign)

    assert same(trained(net()), module)
    assert assign != all(one is other for one, other in zip(before, module.parameters()))
    assert list(module.state_dict()) == list(report.loaded) and (1.0, 1.0, 1.0) == report.coverage
    assert ((), (), (), (), ()) == (report.missing, report.unexpected, report.mismatched, report.cast, report.rules)
    assert all(each.requires_grad for each in module.parameters())


@pytest.mark.parametrize("check", ["before", "while", False])
def test_a_model_on_the_meta_device_is_made_from_the_file(source: Any, check: Any) -> None:
    with torch.device("meta"):
        module = net()
    statedict.load_into(module, source, check=check)

    assert same(trained(net()), module) and {"cpu"} == {str(each.device) for each in module.parameters()}
    assert all(type(each) is nn.Parameter and each.requires_grad for each in module.parameters())


def test_a_meta_model_gets_the_dtype_that_was_asked_for(tmp_path: Path) -> None:
    torch.save(trained(net()).state_dict(), tmp_path / "x.pth")
    with torch.device("meta"):
        module = net()
    report = statedict.load_into(module, tmp_path / "x.pth", dtype=torch.bfloat16)

    assert same(trained(net()).bfloat16(), module) and torch.int64 == module[1].num_batches_tracked.dtype
    assert "float32 → bfloat16" == report.details["0.weight"] and "1.num_batches_tracked" not in report.cast
    with pytest.raises(StateDictError, match="there already"):
        statedict.load_into(net(), tmp_path / "x.pth", dtype="bfloat16")


def test_everything_that_does_not_fit_is_said_at_once(tmp_path: Path) -> None:
    state = trained(net(5)).state_dict()
    state["extra.weight"] = torch.ones(1)
    del state["2.0.weight"]
    torch.save(state, tmp_path / "x.pth")
    module = net()
    with pytest.raises(RuntimeError) as theirs:
        net().load_state_dict(state)
    with unchanged(module), pytest.raises(KeyMismatch) as ours:
        statedict.load_into(module, tmp_path / "x.pth")
    said = str(ours.value)

    assert (("2.0.weight",), ("extra.weight",)) == (ours.value.missing, ours.value.unexpected)
    assert "\n" not in said and str(tmp_path / "x.pth") in said
    for key, expected, found in re.findall(
        r"size mismatch for (\S+):.*?Size\((.*?)\).*?Size\((.*?)\)", str(theirs.value)
    ):
        assert f"'{key}' is {found} in the model and {expected} in the file" in said


def test_numbered_siblings_are_said_once() -> None:
    module = nn.Sequential(*[nn.Linear(2, 2) for _ in range(32)])
    with pytest.raises(KeyMismatch, match=re.escape("{0…31}.weight")) as caught:
        statedict.load_into(module, {"x": torch.ones(1)})

    assert 64 == len(caught.value.missing)


def test_one_size_that_differs_gives_key_and_sizes(tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 4).state_dict(), tmp_path / "x.pth")
    module = nn.Linear(3, 5)
    with unchanged(module), pytest.raises(SpecMismatch) as caught:
        statedict.load_into(module, tmp_path / "x.pth")

    assert ("weight", "[5, 3]", "[4, 3]") == (caught.value.key, caught.value.expected, caught.value.found)


def test_without_strict_what_fits_is_loaded_even_across_sizes(source: Any) -> None:
    module = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 3, bias=False)), nn.Linear(1, 1)
    )
    before = module[2][0].weight.detach().clone()
    report = statedict.load_into(module, source, strict=False)

    assert torch.equal(trained(net())[0].weight, module[0].weight) and torch.equal(before, module[2][0].weight)
    assert (("2.0.weight",), ("3.weight", "3.bias"), ()) == (report.mismatched, report.missing, report.unexpected)
    assert {"2.0.weight", "3.weight", "3.bias"} == set(report.untouched)
    assert 7 / 10 == report.coverage.keys and 0 < report.coverage.bytes < 1
    assert "[2, 4] in the file, [3, 4] here" == report.details["2.0.weight"]


def test_nothing_loaded_is_an_error_unless_it_is_permitted() -> None:
    module = nn.Linear(2, 2)
    with unchanged(module), pytest.raises(KeyMismatch):
        statedict.load_into(module, {"other": torch.ones(2)}, strict=False)
    report = statedict.load_into(module, {"other": torch.ones(2)}, strict=False, allow_empty=True)

    assert ((), 0.0) == (report.loaded, report.coverage.keys)


@pytest.mark.parametrize("how", ["pth", "safetensors"])
@pytest.mark.parametrize("meta", [False, True])
def test_damaged_bytes_are_found_before_anything_changes(how: str, meta: bool, tmp_path: Path) -> None:
    path = tmp_path / f"x.{how}"
    statedict.save(trained(net()), path)
    raw = bytearray(path.read_bytes())
    raw[raw.index(trained(net())[2][0].weight.detach().numpy().tobytes()) + 5] ^= 16
    path.write_bytes(raw)
    with torch.device("meta" if meta else "cpu"):
        module = net()
    with pytest.raises(CorruptFile) as caught:
        if meta:
            statedict.load_into(module, path)
        else:
            with unchanged(module):
                statedict.load_into(module, path)

    assert "2.0.weight" == caught.value.key and meta == module[0].weight.is_meta
    with pytest.raises(CorruptFile):
        statedict.load_into(net(), path, check="while")
    statedict.load_into(module, path, check=False)


# -------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", "int32"])
def test_a_cast_is_reported(dtype: str, tmp_path: Path) -> None:
    state = {"weight": torch.arange(6.0).view(2, 3).to(getattr(torch, dtype)), "bias": torch.ones(2)}
    torch.save(state, tmp_path / "x.pth")
    module, expected = nn.Linear(3, 2), nn.Linear(3, 2)
    expected.load_state_dict(state)
    report = statedict.load_into(module, tmp_path / "x.pth")

    assert same(expected, module) and ("weight",) == report.cast
    assert f"{dtype} → float32" == report.details["weight"]


@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        ("complex64", "imaginary"),
        ("int8", "quantised"),
        ("uint8", "quantised"),
        ("float8_e4m3fn", "scale"),
        ("float8_e5m2", "scale"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_a_cast_that_destroys_the_meaning_is_refused(dtype: str, words: str, strict: bool, tmp_path: Path) -> None:
    state = {"weight": torch.ones(2, 3).to(getattr(torch, dtype)), "weight_scale": torch.ones(1), "bias": torch.ones(2)}
    torch.save(state, tmp_path / "x.pth")
    module = nn.Linear(3, 2)
    with unchanged(module), pytest.raises(StateDictError, match=words) as caught:
        statedict.load_into(module, tmp_path / "x.pth", strict=strict)

    assert dtype in str(caught.value) and ("imaginary" == words or "weight_scale" in str(caught.value))


def test_integer_buffers_stay_exact() -> None:
    class Counter(nn.Module):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.tensor(0))
            self.register_buffer("mask", torch.zeros(3, dtype=torch.bool))
            self.register_buffer("cache", torch.ones(2), persistent=False)

    module = Counter()
    report = statedict.load_into(module, {"steps": torch.tensor(2**60 + 1), "mask": torch.tensor([True, False, True])})

    assert 2**60 + 1 == module.steps.item() and [True, False, True] == module.mask.tolist()
    assert ("steps", "mask") == report.loaded


# -------------------------------------------------------------------- ties


class Tied(nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("left_out", [[], ["head.weight"], ["embed.weight"]])
@pytest.mark.parametrize("how", ["real", "meta", "assign"])
def test_tied_weights_stay_tied_and_one_name_is_enough(left_out: list[str], how: str, tmp_path: Path) -> None:
    state = trained(Tied()).state_dict()
    for key in left_out:
        del state[key]
    statedict.save(dict(state), tmp_path / "x.safetensors")
    with torch.device("meta" if how == "meta" else "cpu"):
        module = Tied()
    report = statedict.load_into(module, tmp_path / "x.safetensors", assign=how == "assign")

    assert module.head.weight is module.embed.weight and torch.equal(trained(Tied()).embed.weight, module.embed.weight)
    assert ("embed.weight", "head.weight") == report.tied and () == report.missing and 1.0 == report.coverage.keys


def test_two_different_tensors_for_one_parameter_are_refused() -> None:
    module = Tied()
    with unchanged(module), pytest.raises(SpecMismatch, match="one tensor"):
        statedict.load_into(module, {"embed.weight": torch.ones(5, 3), "head.weight": torch.zeros(5, 3)})
    statedict.load_into(module, {"embed.weight": torch.ones(5, 3), "head.weight": torch.ones(5, 3)})

    assert 15 == module.head.weight.sum()


def test_parameters_that_share_bytes_only_in_the_file_do_not_share_them_in_the_model(tmp_path: Path) -> None:
    base = torch.ones(2, 2)
    torch.save({"0.weight": base, "1.weight": base}, tmp_path / "x.pth")
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    statedict.load_into(module, tmp_path / "x.pth")
    with torch.no_grad():
        module[0].weight.zero_()

    assert 4 == module[1].weight.sum()


# -------------------------------------------------------------------- the module's own loading


def test_old_batch_norm_files_load_as_with_torch() -> None:
    state = trained(net()).state_dict()
    del state["1.num_batches_tracked"]
    without = OrderedDict(state)
    module = net()
    with unchanged(module), pytest.raises(KeyMismatch, match="num_batches_tracked"):
        statedict.load_into(module, state)
    report = statedict.load_into(module, without)

    assert ("1.num_batches_tracked",) == report.untouched and () == report.missing


def test_the_caller_s_state_dict_is_never_modified() -> None:
    state = trained(net()).state_dict()
    before, versions = list(state), copy.deepcopy(state._metadata)
    statedict.load_into(net(), state, assign=True)
    statedict.load_into(net(), state)

    assert (before, versions) == (list(state), state._metadata)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_weight_norm_of_the_old_kind_loads_into_the_new(tmp_path: Path) -> None:
    old = trained(torch.nn.utils.weight_norm(nn.Linear(3, 4)))
    torch.save(old.state_dict(), tmp_path / "x.pth")
    expected = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    module = copy.deepcopy(expected)
    expected.load_state_dict(torch.load(tmp_path / "x.pth"))
    report = statedict.load_into(module, tmp_path / "x.pth")

    assert same(expected, module) and () == report.missing == report.unexpected
    assert set(module.state_dict()) == set(report.loaded)


@pytest.mark.parametrize("kind", ["spectral", "orthogonal"])
def test_parametrized_modules_load(kind: str, tmp_path: Path) -> None:
    wrap = {
        "spectral": torch.nn.utils.parametrizations.spectral_norm,
        "orthogonal": torch.nn.utils.parametrizations.orthogonal,
    }
    one, other = wrap[kind](nn.Linear(3, 3)), wrap[kind](nn.Linear(3, 3))
    torch.save(one.state_dict(), tmp_path / "x.pth")
    statedict.load_into(other, tmp_path / "x.pth")

    assert same(one, other) and torch.equal(one.eval().weight, other.eval().weight)


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_modules_take_their_shapes_from_the_file(tmp_path: Path) -> None:
    torch.save(trained(net()).state_dict(), tmp_path / "x.pth")
    module = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Sequential(nn.LazyLinear(2, bias=False)))
    statedict.load_into(module, tmp_path / "x.pth")

    assert same(trained(net()), module)


class Extra(nn.Linear):  # type: ignore[misc, name-defined]
    state: Any = None

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        if state == "bad":
            raise ValueError("no such state")
        self.state = state


@pytest.mark.parametrize("state", [{"table": [1, (2, "x")], "t": 3}, 7, {}, "text"])
def test_extra_state_arrives_whole(state: Any, tmp_path: Path) -> None:
    one = nn.Sequential(Extra(2, 2))
    one[0].state = state
    torch.save(one.state_dict(), tmp_path / "x.pth")
    other = nn.Sequential(Extra(2, 2))
    report = statedict.load_into(other, tmp_path / "x.pth")

    assert state == other[0].state and "0._extra_state" in report.loaded


def test_extra_state_that_is_refused_changes_nothing(tmp_path: Path) -> None:
    one = nn.Sequential(nn.Linear(2, 2), Extra(2, 2))
    one[1].state = "bad"
    torch.save(one.state_dict(), tmp_path / "x.pth")
    other = nn.Sequential(nn.Linear(2, 2), Extra(2, 2))
    before = [value.detach().clone() for value in other.parameters()]
    with pytest.raises(StateDictError, match="no such state"):
        statedict.load_into(other, tmp_path / "x.pth")

    assert all(torch.equal(one, two) for one, two in zip(before, other.parameters()))


def test_hooks_of_the_module_run(tmp_path: Path) -> None:
    module = net()
    calls: list[str] = []

    def rename(state: Any, prefix: str, *rest: Any) -> None:
        calls.append("before")
        for key in [key for key in state if key.startswith("old.")]:
            state[key[4:]] = state.pop(key)

    def after(module: Any, keys: Any) -> None:
        calls.append("after" if torch.equal(module[0].weight, trained(net())[0].weight) else "too early")

    module._register_load_state_dict_pre_hook(rename)
    module.register_load_state_dict_post_hook(after)
    torch.save({f"old.{key}": value for key, value in trained(net()).state_dict().items()}, tmp_path / "x.pth")
    statedict.load_into(module, tmp_path / "x.pth")

    assert same(trained(net()), module) and ["before", "after"] == calls[-2:]


def test_state_dict_hooks_decide_the_names(tmp_path: Path) -> None:
    module = net()
    module._register_state_dict_hook(
        lambda module, state, prefix, local: OrderedDict((f"x.{key}", value) for key, value in state.items())
    )
    module._register_load_state_dict_pre_hook(
        lambda state, *rest: [state.__setitem__(key[2:], state.pop(key)) for key in list(state) if key.startswith("x.")]
    )
    torch.save({f"x.{key}": value for key, value in trained(net()).state_dict().items()}, tmp_path / "x.pth")
    report = statedict.load_into(module, tmp_path / "x.pth")

    assert torch.equal(trained(net())[0].weight, module[0].weight) and () == report.missing == report.unexpected


def test_a_class_that_loads_in_its_own_way_is_let_to(tmp_path: Path) -> None:
    class Own(nn.Linear):  # type: ignore[name-defined, misc]
        def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
            state[f"{prefix}weight"] = state.pop(f"{prefix}half") * 2
            super()._load_from_state_dict(state, prefix, *rest)

    module = nn.Sequential(Own(2, 2, bias=False))
    torch.save({"0.half": torch.ones(2, 2)}, tmp_path / "x.pth")
    statedict.load_into(module, tmp_path / "x.pth")

    assert 8 == module[0].weight.sum()


def test_what_no_state_dict_holds_is_said_to_be_without_memory(tmp_path: Path) -> None:
    class Rotary(nn.Module):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))
            self.register_buffer("freq", torch.ones(2), persistent=False)

    torch.save(Rotary().state_dict(), tmp_path / "x.pth")
    with torch.device("meta"):
        module = Rotary()
    report = statedict.load_into(module, tmp_path / "x.pth")

    assert [("left-on-meta", ("freq",))] == [
        (each.code, each.keys) for each in report.findings if each.level == "warning"
    ]


# -------------------------------------------------------------------- wrappers and parts


def wrapped(state: Any, prefix: str) -> dict[str, Any]:
    return {f"{prefix}{key}": value for key, value in state.items()}


@pytest.mark.parametrize(
    "make",
    [
        lambda state: wrapped(state, "module."),
        lambda state: wrapped(state, "_orig_mod."),
        lambda state: wrapped(state, "module._orig_mod."),
        lambda state: {
            key.replace("2.0.", "2._orig_mod.0._checkpoint_wrapped_module."): each for key, each in state.items()
        },
        lambda state: {"n_averaged": torch.tensor(3), **wrapped(state, "module.")},
        lambda state: {
            "state_dict": wrapped(state, "model."),
            "epoch": 3,
            "optimizer_states": [{"state": {0: torch.ones(4, 3)}}],
        },
        lambda state: {"model_state_dict": state, "ema": {key: value * 0 for key, value in state.items()}},
        lambda state: {"run": {"weights": wrapped(state, "_orig_mod.module.")}},
    ],
)
def test_wrappers_and_parts_are_seen_through_when_that_is_asked_for(make: Any, tmp_path: Path) -> None:
    state = trained(net()).state_dict()
    torch.save(make(state), tmp_path / "x.pth")
    module = net()
    with unchanged(module), pytest.raises(KeyMismatch, match=r'pass (rules="auto"|at=)'):
        statedict.load_into(module, tmp_path / "x.pth")
    report = statedict.load_into(module, tmp_path / "x.pth", rules="auto")

    assert same(trained(net()), module) and len(report.rules) > 0
    again = net()
    statedict.load_into(again, tmp_path / "x.pth", rules=report.rules)
    assert same(module, again)


def test_a_wrapped_model_takes_the_plain_file(source: Any) -> None:
    module = nn.DataParallel(net())
    report = statedict.load_into(module, source, rules="auto")

    assert same(trained(net()), module.module) and ["add_prefix('module.')"] == [str(rule) for rule in report.rules]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*")
def test_a_compiled_model_and_compiled_parts_take_the_plain_file(source: Any) -> None:
    whole, part = torch.compile(net()), net()
    part[2] = torch.compile(part[2])
    for module in (whole, part):
        statedict.load_into(module, source, rules="auto")

        assert [torch.equal(one, two) for one, two in zip(trained(net()).parameters(), module.parameters())] == [
            True
        ] * 5


def test_a_real_submodule_called_module_is_left_alone(tmp_path: Path) -> None:
    class Own(nn.Module):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)

    torch.save(wrapped(trained(Own()).state_dict(), "module."), tmp_path / "x.pth")
    torch.save(trained(Own()).state_dict(), tmp_path / "y.pth")
    for name, count in (("x.pth", 1), ("y.pth", 0)):
        module = Own()
        report = statedict.load_into(module, tmp_path / name, rules="auto")

        assert same(trained(Own()), module) and count == len(report.rules)


def test_several_parts_that_fit_are_a_question(tmp_path: Path) -> None:
    state = trained(net()).state_dict()
    torch.save({"student": state, "teacher": state}, tmp_path / "x.pth")
    module = net()
    with unchanged(module), pytest.raises(KeyMismatch, match="at='student'"):
        statedict.load_into(module, tmp_path / "x.pth", rules="auto")
    statedict.load_into(module, tmp_path / "x.pth", at="teacher")

    assert same(trained(net()), module)


def test_another_architecture_is_not_mapped(tmp_path: Path) -> None:
    torch.save({"encoder.0.w": torch.ones(3), "encoder.1.w": torch.ones(3)}, tmp_path / "x.pth")
    module = net()
    with unchanged(module), pytest.raises(KeyMismatch):
        statedict.load_into(module, tmp_path / "x.pth", rules="auto")


def test_rules_are_applied_before_names_are_compared(tmp_path: Path) -> None:
    torch.save({"model": wrapped(trained(net()).state_dict(), "net."), "epoch": 1}, tmp_path / "x.pth")
    module = net()
    statedict.load_into(module, tmp_path / "x.pth", rules=[rules.select("model"), rules.strip_prefix("net.")])

    assert same(trained(net()), module)
    assert same(trained(net()), module)
    loaded = statedict.load(tmp_path / "x.pth", rules=[rules.select("model"), rules.strip_prefix("net.")])
    assert list(net().state_dict()) == list(loaded)


def test_rules_are_there_where_the_message_says() -> None:
    import subprocess
    import sys

    code = "import statedict; print(statedict.rules.strip_prefix('module.'))"

    assert (
        b"strip_prefix('module.')" == subprocess.run([sys.executable, "-c", code], capture_output=True).stdout.strip()
    )


def test_a_whole_saved_model_is_a_source(tmp_path: Path) -> None:
    torch.save(trained(net()), tmp_path / "x.pth")
    module = net()
    statedict.load_into(module, tmp_path / "x.pth")

    assert same(trained(net()), module)


@pytest.mark.parametrize(
    "options", [{"check": "after"}, {"rules": "some"}, {"dtype": "int8"}, {"dtype": 3}, {"device": "nowhere"}]
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    module = net()
    with unchanged(module), pytest.raises(StateDictError):
        statedict.load_into(module, trained(net()).state_dict(), **options)


def test_only_modules_and_optimizers_can_be_loaded_into() -> None:
    with pytest.raises(StateDictError, match="module or an optimizer"):
        statedict.load_into({}, {})


# -------------------------------------------------------------------- optimizers


def stepped(module: Any, optimizer: Any) -> Any:
    module(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("end", ["pth", "safetensors"])
def test_an_optimizer_is_loaded_by_the_names_of_its_parameters(end: str, tmp_path: Path) -> None:
    module = net()
    optimizer = stepped(module, torch.optim.AdamW(module.parameters(), lr=0.1))
    statedict.save({"model": module, "optimizer": optimizer}, tmp_path / f"x.{end}")
    other = net()
    turned = torch.optim.AdamW(list(other.parameters())[::-1], lr=0.5)
    with pytest.raises(KeyMismatch, match="at='optimizer'"):
        statedict.load_into(turned, tmp_path / f"x.{end}", model=other)
    report = statedict.load_into(turned, tmp_path / f"x.{end}", model=other, rules="auto")
    moments = {name: optimizer.state[value]["exp_avg"] for name, value in module.named_parameters()}

    assert all(torch.equal(moments[name], turned.state[value]["exp_avg"]) for name, value in other.named_parameters())
    assert ("name", (0.5, 0.1)) == (report.matched_by, report.overridden["param_groups.0.lr"])
    again = torch.optim.AdamW(other.parameters())
    statedict.load_into(again, tmp_path / f"x.{end}", at="optimizer", model=other)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_refused_load_never_changes_a_bit(data: Any) -> None:
    module = net()
    state = {key: value.clone() for key, value in trained(net()).state_dict().items()}
    key = data.draw(st.sampled_from(sorted(set(state) - {"1.num_batches_tracked"})))  # old files may lack that
    fault = data.draw(st.sampled_from(["missing", "unexpected", "size", "complex", "quantised", "text"]))
    if fault == "missing":
        del state[key]
    elif fault == "unexpected":
        state[f"{key}.more"] = state[key]
    elif fault == "size":
        state[key] = torch.ones(*state[key].shape, 2)
    elif fault == "complex":
        state[key] = state[key].to(torch.complex64)
    elif fault == "quantised":
        key = "0.weight"
        state[key] = state[key].to(torch.int8)
    else:
        state[key] = "no tensor"
    with warnings.catch_warnings(), unchanged(module), pytest.raises(StateDictError) as caught:
        statedict.load_into(module, state)

    assert key in str(caught.value)


# -------------------------------------------------------------------- distributed wrappers


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_a_distributed_model_takes_the_plain_file_and_gives_one(group: None, tmp_path: Path) -> None:
    torch.save(trained(net()).state_dict(), tmp_path / "x.pth")
    module = nn.parallel.DistributedDataParallel(net())
    statedict.load_into(module, tmp_path / "x.pth", rules="auto")
    statedict.save(module, tmp_path / "y.pth")
    other = net()
    report = statedict.load_into(other, tmp_path / "y.pth", rules="auto")

    assert same(trained(net()), module.module) and same(module.module, other)
    assert ["strip_prefix('module.')"] == [str(rule) for rule in report.rules]


@pytest.mark.filterwarnings("ignore")
def test_a_sharded_model_takes_the_full_state_dict(group: None, tmp_path: Path) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    torch.save(trained(net()).state_dict(), tmp_path / "x.pth")
    module = FullyShardedDataParallel(net(), device_id=torch.device("cpu"))
    with pytest.raises(KeyMismatch):
        statedict.load_into(module, {"w": torch.ones(2)})
    report = statedict.load_into(module, tmp_path / "x.pth")

    assert set(trained(net()).state_dict()) == set(report.loaded)
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in trained(net()).state_dict().items())


def test_a_size_that_only_the_module_s_own_code_sees_changes_nothing(tmp_path: Path) -> None:
    module = net()
    module._register_load_state_dict_pre_hook(
        lambda state, *rest: [
            state.__setitem__(key[4:], state.pop(key)) for key in list(state) if key.startswith("old.")
        ]
    )
    state = {f"old.{key}": value for key, value in trained(net(5)).state_dict().items()}
    torch.save(state, tmp_path / "x.pth")
    with unchanged(module), pytest.raises(SpecMismatch, match="another size"):
        statedict.load_into(module, tmp_path / "x.pth", strict=False)


def test_a_dry_run_checks_all_and_changes_nothing(source: Any) -> None:
    module = net()
    with unchanged(module):
        report = statedict.load_into(module, source, dry_run=True)
        with pytest.raises(KeyMismatch):
            statedict.load_into(module, {"w": torch.ones(1)}, dry_run=True)

    assert 8 == len(report.loaded)

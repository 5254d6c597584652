"""The rules that change tensors, each against the same thing done in torch; and what takes them back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import statedict
from statedict import RuleError, rules

torch = pytest.importorskip("torch")


def made(state: dict[str, Any], *wanted: rules.Rule) -> dict[str, Any]:
    checkpoint = rules.apply(statedict.open(state), wanted)
    return {key: tensor.torch() for key, tensor in checkpoint.items()}


def same(expected: dict[str, Any], found: dict[str, Any]) -> None:
    assert list(expected) == list(found)
    for key, tensor in expected.items():
        assert tensor.dtype == found[key].dtype, key
        assert tensor.shape == found[key].shape, key
        assert torch.equal(tensor, found[key]), key


def some(*shape: int, dtype: Any = None) -> Any:
    return torch.randn(*shape).to(dtype or torch.float32)


def bits(tensor: Any) -> list[int]:
    """Every byte: NaN is itself, and -0 isn't 0."""
    return torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.reshape(-1)).view(torch.uint8).tolist()


# -------------------------------------------------------------------- one tensor at a time

SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])


@st.composite
def tensors(draw: Any) -> Any:
    """A tensor whose numbers all differ where they can, in one of the orders in memory that it may have."""
    shape = draw(SHAPES)
    values = torch.arange(torch.Size(shape).numel() * 2)[:: draw(st.sampled_from([1, 2]))][: torch.Size(shape).numel()]
    order = draw(st.permutations(range(len(shape))))
    turned = values.reshape([shape[dim] for dim in order]).permute([order.index(dim) for dim in range(len(shape))])
    return turned.to(draw(DTYPES))


@st.composite
def view_rules(draw: Any) -> tuple[Any, rules.Rule, Any]:
    """A tensor, a rule for it, and what torch makes of it."""
    tensor = draw(tensors())
    dims = tensor.dim()
    dim, other = draw(st.integers(-dims, dims - 1)), draw(st.integers(-dims, dims - 1))
    kind = draw(st.sampled_from(["transpose", "permute", "reshape", "unsqueeze", "squeeze", "slice", "pad"]))
    if kind == "transpose":
        return tensor, rules.transpose("w", dim, other), tensor.transpose(dim, other)
    if kind == "permute":
        order = draw(st.permutations(range(dims)))
        return tensor, rules.permute("w", *order), tensor.permute(*order)
    if kind == "reshape":
        shape = draw(st.sampled_from([[-1], [tensor.numel(), 1], [1, *tensor.shape], list(reversed(tensor.shape))]))
        return tensor, rules.reshape("w", shape), tensor.reshape(shape)
    if kind == "unsqueeze":
        return tensor, rules.unsqueeze("w", dim), tensor.unsqueeze(dim)
    if kind == "squeeze":
        return tensor.unsqueeze(dim), rules.squeeze("w", dim), tensor
    if kind == "slice":
        start = draw(st.integers(0, tensor.shape[dim] - 1))
        stop = draw(st.integers(start + 1, tensor.shape[dim]))
        return tensor, rules.slice("w", dim, start, stop), tensor.narrow(dim, start, stop - start)
    size = tensor.shape[dim] + draw(st.integers(1, 3))
    shape = list(tensor.shape)
    shape[dim] = size - tensor.shape[dim]
    return tensor, rules.pad("w", dim, size, 1), torch.cat([tensor, torch.ones(shape).to(tensor.dtype)], dim)


@settings(max_examples=400)
@given(view_rules())
def test_one_tensor_is_changed_as_torch_changes_it(case: tuple[Any, rules.Rule, Any]) -> None:
    tensor, rule, expected = case
    plan = rules.plan(statedict.open({"w": tensor, "x": tensor.clone()}), rule)
    found = plan.checkpoint["w"].torch()

    assert (expected.dtype, expected.shape) == (found.dtype, found.shape)
    assert bits(expected) == bits(found)
    inverse = plan.inverse()
    if rule.name == "slice" and expected.shape != tensor.shape:
        assert inverse is None
        return
    assert inverse is not None
    back = rules.apply(plan.checkpoint, inverse)["w"].torch()
    assert bits(tensor) == bits(back)


@pytest.mark.parametrize(
    ("rule", "what"),
    [
        (rules.transpose("w", 0, 2), "there is no dimension 2"),
        (rules.permute("w", 0, 1, 2), "not as many dimensions"),
        (rules.reshape("w", 5, -1), "not as many elements"),
        (rules.reshape("w", -1, -1), "not as many elements"),
        (rules.squeeze("w", 0), "isn't of size 1"),
        (rules.slice("w", 0, 2, 9), "there is no 2:9"),
        (rules.slice("w", 0, 3, 3), "there is no 3:3"),
        (rules.pad("w", 0, 2), "is larger than 2"),
        (rules.split("w", ["a", "b", "c"], dim=1), "no 3 equal parts"),
        (rules.split("w", ["a", "b"], [1, 2]), "the sizes don't make"),
        (rules.deinterleave("w", ["a", "b", "c"]), "no multiple of 3"),
        (rules.concat(["w", "v"], "c"), "the shapes don't fit"),
        (rules.concat(["w", "n"], "c"), "tensors of different dtypes"),
    ],
)
def test_what_a_tensor_does_not_have_is_said_with_rule_and_key(rule: rules.Rule, what: str) -> None:
    state = {"w": torch.zeros(4, 2), "v": torch.zeros(4, 3), "n": torch.zeros(4, 2, dtype=torch.int64)}
    with pytest.raises(RuleError, match=what) as caught:
        rules.apply(statedict.open(state), rule)

    assert rule.name in str(caught.value)
    assert "'w'" in str(caught.value)


# -------------------------------------------------------------------- casts

FLOATS = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]


@pytest.mark.parametrize("to", FLOATS)
def test_casts_round_as_torch_and_leave_the_rest_alone(to: str) -> None:
    state = {
        "a": torch.tensor([0.1, -3.3, 1e-7, 300.0, float("nan"), -0.0], dtype=torch.float32),
        "n": torch.tensor([1, 2]),
        "c": torch.tensor([1 + 2j]),
    }
    kind = getattr(torch, to)
    if to == "float32":
        with pytest.raises(RuleError, match="changes nothing: 1 are float32 already, 2 were left alone"):
            made(state, rules.cast("*", to))
        return
    found = made(state, rules.cast("*", to))

    assert torch.equal(state["a"].to(kind).view(torch.uint8), found["a"].view(torch.uint8))
    same({"n": state["n"], "c": state["c"]}, {"n": found["n"], "c": found["c"]})


@pytest.mark.parametrize("old", FLOATS)
@pytest.mark.parametrize("new", FLOATS)
def test_a_cast_can_be_taken_back_where_every_value_fits(old: str, new: str) -> None:
    if old == new:
        return
    every = torch.arange(65536).to(torch.int32).to(torch.uint16).view(torch.float16)
    values = {
        "float16": every,
        "bfloat16": every.view(torch.bfloat16),
        "float8_e4m3fn": torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn),
        "float8_e5m2": torch.arange(256).to(torch.uint8).view(torch.float8_e5m2),
        "float32": torch.tensor([1 + 2**-23, 3e38, 2**-149]),
        "float64": torch.tensor([1 + 2**-52, 1e308, 5e-324], dtype=torch.float64),
    }[old]
    plan = rules.plan(statedict.open({"w": values}), rules.cast("w", new))
    inverse = plan.inverse()
    there = values.to(getattr(torch, new))
    exact = bool(torch.equal(there.to(values.dtype).double().nan_to_num(7), values.double().nan_to_num(7)))

    assert exact == (inverse is not None)
    if inverse is not None:
        assert inverse == (rules.cast("w", old),)


def test_tied_tensors_are_cast_once_and_stay_tied() -> None:
    one = some(3, 4)
    checkpoint = rules.apply(statedict.open({"a": one, "b": one, "t": one.t()}), rules.cast("*", "bfloat16"))

    assert ("b",) == checkpoint["a"].tied_with
    assert checkpoint["a"].entry.view == checkpoint["b"].entry.view


def test_a_tie_that_a_rule_breaks_is_said() -> None:
    one = some(3, 4)
    state = {"emb": one, "head": one}
    for rule in (rules.cast("emb", "bfloat16"), rules.transpose("emb"), rules.split("emb", ["x", "y", "z"])):
        plan = rules.plan(statedict.open(state), rule)

        assert "'emb' is no longer tied with 'head'" in plan.coverage.lines()[0]


# -------------------------------------------------------------------- several tensors


@settings(max_examples=100)
@given(st.data())
def test_parts_are_joined_as_torch_joins_them_and_come_back(data: Any) -> None:
    shape = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    kind = data.draw(st.sampled_from(["concat", "interleave", "stack"]))
    layers, dtype = data.draw(st.integers(1, 3)), data.draw(DTYPES)

    def part(extra: int) -> Any:
        size = list(shape)
        size[dim] += extra if kind == "concat" else 0
        return torch.randint(0, 2, size).to(dtype)

    state = {f"l.{n}.{name}": part(extra) for n in range(layers) for extra, name in enumerate("012")}
    sources = [f"l.{{n}}.{name}" for name in "012"]
    groups = {n: [state[f"l.{n}.{name}"] for name in "012"] for n in range(layers)}
    if kind == "concat":
        rule = rules.concat(sources, "l.{n}.w", dim)
        expected = {f"l.{n}.w": torch.cat(parts, dim) for n, parts in groups.items()}
    elif kind == "interleave":
        at = dim % len(shape)
        rule = rules.interleave(sources, "l.{n}.w", dim)
        expected = {f"l.{n}.w": torch.stack(parts, at + 1).flatten(at, at + 1) for n, parts in groups.items()}
    else:
        rule = rules.stack("l.{n}.{e}", "l.{n}.w", dim)
        expected = {f"l.{n}.w": torch.stack(parts, dim) for n, parts in groups.items()}
    plan = rules.plan(statedict.open(state), rule)

    same(expected, {key: tensor.torch() for key, tensor in plan.checkpoint.items()})
    inverse = plan.inverse()
    assert inverse is not None
    same(state, {key: tensor.torch() for key, tensor in rules.apply(plan.checkpoint, inverse).items()})


def test_a_split_needs_no_bytes_and_keeps_the_storage() -> None:
    state = {"l.0.qkv": some(12, 4)}
    plan = rules.plan(statedict.open(state), rules.split("l.{n}.qkv", ["l.{n}.q", "l.{n}.kv"], [4, 8]))
    q, kv = plan.checkpoint["l.0.q"], plan.checkpoint["l.0.kv"]

    assert torch.equal(state["l.0.qkv"][4:], kv.torch())
    assert q.entry.view is not None
    assert kv.entry.view is not None
    assert q.entry.view.storage is kv.entry.view.storage
    assert (rules.concat(["l.{n}.q", "l.{n}.kv"], "l.{n}.qkv"),) == plan.inverse()


def test_parts_of_different_sizes_come_back_one_by_one() -> None:
    state = {"a.0.x": some(2), "a.0.y": some(3), "a.1.x": some(4), "a.1.y": some(1)}
    plan = rules.plan(statedict.open(state), rules.concat(["a.{n}.x", "a.{n}.y"], "a.{n}.z"))
    inverse = plan.inverse()

    assert inverse == (
        rules.split("a.0.z", ["a.0.x", "a.0.y"], [2, 3]),
        rules.split("a.1.z", ["a.1.x", "a.1.y"], [4, 1]),
    )
    same(state, {key: tensor.torch() for key, tensor in rules.apply(plan.checkpoint, inverse).items()})


@pytest.mark.parametrize(
    ("keys", "rule", "what"),
    [
        (["a.q", "a.k", "b.q"], rules.concat(["{m}.q", "{m}.k"], "{m}.qk"), "parts are missing: 'b.k'"),
        (["e.0", "e.1", "e.3"], rules.stack("e.{i}", "e"), "1 of 4 parts are missing: 'e.2'"),
        (["a.0", "a.1", "b.0"], rules.stack("{m}.{i}", "{m}"), "1 of 2 parts are missing: 'b.1'"),
        (["e.0", "e.999999999"], rules.stack("e.{i}", "e"), "999999998 of 1000000000 parts are missing: 'e.1'"),
        (["e.0", "e.01"], rules.stack("e.{i}", "e"), "'01' is no index"),
        (["e.0", "e.x"], rules.stack("e.{i}", "e"), "'x' is no index"),
        (["a.w", "b.w"], rules.split("*.w", ["x", "y"]), "several tensors the same names"),
        (["a.w", "b.w", "c"], rules.concat(["*.w", "c"], "d"), "two tensors for one place: 'a.w', 'b.w'"),
        (["a.w", "a.x"], rules.split("{m}.w", ["{m}.x", "{m}.y"]), "gives two keys one name"),
        (["a.w"], rules.concat(["b", "c"], "d"), "matches nothing"),
    ],
)
def test_incomplete_and_doubled_parts_are_refused(keys: list[str], rule: rules.Rule, what: str) -> None:
    with pytest.raises(RuleError, match=what):
        rules.apply(statedict.open({key: torch.zeros(2) for key in keys}), rule)


# -------------------------------------------------------------------- ties


def test_a_key_can_be_tied_to_another_and_untied() -> None:
    one = some(3, 2)
    plan = rules.plan(statedict.open({"emb": one}), rules.tie("head", "emb"))

    assert ("head",) == plan.checkpoint["emb"].tied_with
    apart = rules.plan(plan.checkpoint, rules.untie("head"))
    assert () == apart.checkpoint["emb"].tied_with
    assert torch.equal(one, apart.checkpoint["head"].torch())
    assert "'head' was tied with 'emb'" in apart.coverage.lines()[0]
    assert (rules.tie("head", "emb"),) == apart.inverse()
    assert ["emb"] == list(rules.apply(plan.checkpoint, plan.inverse() or ()))


def test_only_equal_tensors_are_tied() -> None:
    state = {
        "a": torch.ones(2, 2),
        "b": torch.ones(2, 2),
        "t": torch.ones(2, 2).t(),
        "x": torch.zeros(2, 2),
        "h": torch.ones(2, 2).half(),
    }

    assert ("b",) == rules.apply(statedict.open(state), rules.tie("b", "a"))["a"].tied_with
    assert ("t",) == rules.apply(statedict.open(state), rules.tie("t", "a"))["a"].tied_with
    for key, what in {"x": "their values differ", "h": "can't be one tensor"}.items():
        with pytest.raises(RuleError, match=what):
            rules.apply(statedict.open(state), rules.tie(key, "a"))
    with pytest.raises(RuleError, match="matches nothing"):
        rules.apply(statedict.open(state), rules.untie("a"))


# -------------------------------------------------------------------- folds


@pytest.mark.parametrize("dim", [0, 1, None])
def test_weight_norm_is_folded_as_torch_removes_it(dim: int | None) -> None:
    net = torch.nn.Sequential(torch.nn.Conv1d(3, 5, 2), torch.nn.Linear(4, 6))
    for layer in net:
        with pytest.warns(FutureWarning):
            torch.nn.utils.weight_norm(layer, dim=dim)
        layer.weight_g.data.mul_(1.5)
    found = made(net.state_dict(), rules.fold_weight_norm())
    for layer in net:
        torch.nn.utils.remove_weight_norm(layer)

    assert set(net.state_dict()) == set(found)
    for key, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, found[key])


def test_the_parametrization_is_folded_too_in_the_modules_that_are_meant() -> None:
    net = torch.nn.ModuleDict(
        {name: torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 6)) for name in "ab"}
    )
    plan = rules.plan(statedict.open(net.state_dict()), rules.fold_weight_norm("a"))
    found = {key: tensor.torch() for key, tensor in plan.checkpoint.items()}

    torch.testing.assert_close(net["a"].weight.detach(), found["a.weight"])
    assert {
        "a.bias",
        "a.weight",
        "b.bias",
        "b.parametrizations.weight.original0",
        "b.parametrizations.weight.original1",
    } == set(found)
    assert plan.inverse() is None
    assert ("a.parametrizations.weight.original0", "a.parametrizations.weight.original1") == plan.coverage.dropped


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norms_are_folded_as_torch_fuses_them(bias: bool, affine: bool) -> None:
    net = torch.nn.Sequential()
    for n in range(2):
        net.add_module(f"conv{n}", torch.nn.Conv2d(3, 3, 2, bias=bias))
        net.add_module(f"bn{n}", torch.nn.BatchNorm2d(3, eps=1e-3, affine=affine))
        net[-1].running_mean.normal_()
        net[-1].running_var.uniform_(0.5, 2)
    found = made(net.state_dict(), rules.fold_batch_norm("conv{n}", "bn{n}", eps=1e-3))
    net.eval()
    for n in range(2):
        fused = torch.nn.utils.fusion.fuse_conv_bn_eval(net[2 * n], net[2 * n + 1])

        torch.testing.assert_close(fused.weight.detach(), found[f"conv{n}.weight"])
        torch.testing.assert_close(fused.bias.detach(), found[f"conv{n}.bias"])
    assert 4 == len(found)


def test_a_transposed_convolution_is_folded_along_its_own_dimension() -> None:
    conv, bn = torch.nn.ConvTranspose2d(3, 5, 2), torch.nn.BatchNorm2d(5)
    bn.running_var.uniform_(0.5, 2)
    net = torch.nn.ModuleDict({"c": conv, "b": bn}).eval()
    found = made(net.state_dict(), rules.fold_batch_norm("c", "b", transposed=True))
    fused = torch.nn.utils.fusion.fuse_conv_bn_eval(conv, bn, transpose=True)

    torch.testing.assert_close(fused.weight.detach(), found["c.weight"])


def test_a_norm_without_statistics_is_missed() -> None:
    with pytest.raises(RuleError, match=r"parts are missing: 'b\.running_mean', 'b\.running_var'"):
        made({"c.weight": some(2, 2), "b.weight": some(2)}, rules.fold_batch_norm("c", "b"))


@pytest.mark.parametrize("layout", ["plain", "peft"])
def test_low_rank_changes_are_merged(layout: str) -> None:
    base, a, b, bias = some(6, 4), some(2, 4), some(6, 2), some(6)
    state = {
        "m.q.weight": base,
        "m.q.lora_A.weight": a,
        "m.q.lora_B.weight": b,
        "m.q.bias": bias,
        "m.o.weight": some(2, 2),
    }
    if layout == "peft":
        names = {"m.q.weight": "m.q.base_layer.weight", "m.q.bias": "m.q.base_layer.bias"}
        state = {
            names.get(k, k).replace("_A.", "_A.default.").replace("_B.", "_B.default."): v for k, v in state.items()
        }
    for rule, factor in ((rules.merge_lora(alpha=3), 1.5), (rules.merge_lora("m.*", scaling=0.25), 0.25)):
        found = made(state, rule)

        assert {"m.q.weight", "m.q.bias", "m.o.weight"} == set(found)
        torch.testing.assert_close(base + factor * (b @ a), found["m.q.weight"])
        assert torch.equal(bias, found["m.q.bias"])


def test_adapters_that_cannot_be_merged_are_said() -> None:
    state = {"m.lora_A.x.weight": some(2, 4), "m.lora_B.x.weight": some(6, 2)}
    with pytest.raises(RuleError, match=r"parts are missing: 'm\.weight'"):
        made(state, rules.merge_lora(scaling=1))
    twice = {**state, "m.weight": some(6, 4), "m.lora_A.y.weight": some(2, 4), "m.lora_B.y.weight": some(6, 2)}
    with pytest.raises(RuleError, match=r"several adapters change 'm\.weight'"):
        made(twice, rules.merge_lora(scaling=1))
    with pytest.raises(RuleError, match=r"parts are missing: 'm\.lora_B\.x\.weight'"):
        made({"m.weight": some(6, 4), "m.lora_A.x.weight": some(2, 4)}, rules.merge_lora(scaling=1))


# -------------------------------------------------------------------- the same everywhere

PORT = [
    rules.rename("layers.{n}.{rest...}", "blocks.{n}.{rest}"),
    rules.split("blocks.{n}.qkv", ["blocks.{n}.q", "blocks.{n}.k", "blocks.{n}.v"]),
    rules.transpose("blocks.{n}.mlp"),
    rules.cast("*", "bfloat16"),
    rules.stack("blocks.{n}.e.{i}", "blocks.{n}.e"),
    rules.drop("junk"),
]


def network() -> dict[str, Any]:
    state = {
        f"layers.{n}.{name}": some(*shape) for n in range(3) for name, shape in {"qkv": (6, 2), "mlp": (3, 4)}.items()
    }
    state |= {f"layers.{n}.e.{i}": some(2, 2) for n in range(3) for i in range(2)}
    return {**state, "junk": torch.zeros(2), "step": torch.tensor(7)}


def ported(state: dict[str, Any]) -> dict[str, Any]:
    made = {}
    for n in range(3):
        for name, part in zip("qkv", state[f"layers.{n}.qkv"].chunk(3)):
            made[f"blocks.{n}.{name}"] = part.bfloat16()
        made[f"blocks.{n}.mlp"] = state[f"layers.{n}.mlp"].t().bfloat16()
        made[f"blocks.{n}.e"] = torch.stack([state[f"layers.{n}.e.{i}"] for i in range(2)]).bfloat16()
    return {**made, "step": state["step"]}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_every_door_applies_the_same_rules(suffix: str, tmp_path: Path) -> None:
    state = network()
    expected = ported(state)
    path = tmp_path / f"a{suffix}"
    statedict.save(state, path)
    with statedict.remap(path, PORT) as remapped:
        found = {key: tensor.torch() for key, tensor in remapped.items()}
        assert set(expected) == set(found)
        same(dict(sorted(expected.items())), dict(sorted(found.items())))
        converted = tmp_path / f"b{suffix}"
        statedict.convert(remapped, converted)
    for each in (
        statedict.load(path, rules=PORT),
        statedict.load(path, rules=PORT, mmap=True),
        statedict.load(converted),
    ):
        same(dict(sorted(expected.items())), dict(sorted(each.items())))
    holder = torch.nn.Module()
    for key, tensor in expected.items():
        holder.register_buffer(key.replace(".", "_"), torch.zeros_like(tensor))
    report = statedict.load_into(holder, path, rules=[*PORT, rules.rename(r"\.", "_")])

    assert {key.replace(".", "_") for key in expected} == set(report.loaded)
    assert torch.equal(expected["blocks.1.mlp"], holder.blocks_1_mlp)


def test_remap_closes_what_it_has_opened(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"m.w": some(2)}, path)
    made = statedict.remap(path, rules.strip_prefix("m."))
    assert (2,) == made["w"].numpy().shape
    made.close()

    with pytest.raises((statedict.StateDictError, OSError, ValueError)):
        made["w"].numpy()
    with pytest.raises(RuleError, match=str(path)):
        statedict.remap(path, rules.strip_prefix("x."))


def test_rules_over_rules_read_the_same_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    state = {f"w.{n}": some(8, 8) for n in range(4)}
    statedict.save(state, path)
    wanted = [rules.concat([f"w.{n}" for n in range(4)], "all"), rules.transpose("all"), rules.cast("all", "float16")]
    wanted += [rules.slice("all", 1, 3, 29), rules.pad("all", 0, 10, -1), rules.reshape("all", -1)]
    whole = torch.cat([state[f"w.{n}"] for n in range(4)]).t().half()[:, 3:29]
    expected = torch.cat([whole, torch.full((2, 26), -1).half()]).reshape(-1)
    with statedict.remap(path, wanted) as remapped:
        tensor = remapped["all"]

        assert torch.equal(expected, tensor.torch())
        assert torch.equal(expected[5:77], tensor[5:77].torch())
        again = statedict.remap(remapped, rules.unsqueeze("all", 0))
        assert torch.equal(expected[None], again["all"].torch())


# -------------------------------------------------------------------- any chain of rules, and back

CHAIN = st.lists(
    st.sampled_from(
        [
            rules.add_prefix("m."),
            rules.optional(rules.strip_prefix("m.")),
            rules.optional(rules.rename("{p...}l.{n}.{x}", "{p}b.{n+1}.{x}")),
            rules.optional(rules.rename(r"\.w$", ".weight")),
            rules.optional(rules.transpose("*w*")),
            rules.optional(rules.reshape("*.v", -1, 2)),
            rules.optional(rules.unsqueeze("*", 0)),
            rules.optional(rules.squeeze("*", 0)),
            rules.optional(rules.cast("*", "float64")),
            rules.optional(rules.split("{m}.w", ["{m}.w0", "{m}.w1"])),
            rules.optional(rules.concat(["{m}.w0", "{m}.w1"], "{m}.ww", dim=-1)),
            rules.optional(rules.deinterleave("{m}.v", ["{m}.v0", "{m}.v1"])),
            rules.optional(rules.stack("l.{n}.w", "all.w")),
            rules.optional(rules.unstack("all.w", "one.{n}.w")),
            rules.optional(rules.pad("*.v", 0, 9)),
        ]
    ),
    max_size=5,
)


@settings(max_examples=200)
@given(CHAIN, st.integers(1, 3))
def test_a_chain_of_rules_that_loses_nothing_is_taken_back_by_its_inverse(chain: list[rules.Rule], layers: int) -> None:
    state = {f"l.{n}.{name}": some(*shape) for n in range(layers) for name, shape in {"w": (4, 2), "v": (6,)}.items()}
    source = statedict.open(state)
    try:
        plan = rules.plan(source, chain)
    except RuleError:
        return
    inverse = plan.inverse()
    assert plan.lossless
    assert inverse is not None
    found = {key: tensor.torch() for key, tensor in statedict.remap(plan.checkpoint, inverse).items()}

    assert set(state) == set(found)
    for key, tensor in state.items():
        assert torch.equal(tensor, found[key])
    assert rules.Rules(inverse) == rules.Rules(chain).inverse(source)

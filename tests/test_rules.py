"""Rules: what each does to the names, the containers and the facts of a checkpoint, and what undoes it."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import statedict
from statedict.errors import RuleError
from statedict.keys import dotted
from statedict.lazy_tensor import LazyTensor
from statedict.rules import (
    Rule,
    Rules,
    add_prefix,
    add_wrapper,
    apply,
    drop,
    keep,
    select,
    strip_prefix,
    strip_wrapper,
)


def numbered(value: Any, count: list[int] | None = None) -> Any:
    """The nested value with an array of one number for every None: the how manieth it is."""
    count = [0] if count is None else count
    if isinstance(value, dict):
        return type(value)((key, numbered(child, count)) for key, child in value.items())
    if isinstance(value, (list, tuple)):
        return type(value)(numbered(child, count) for child in value)
    if value is not None:
        return value
    count[0] += 1
    return np.array(float(count[0]))


def plain(value: Any) -> Any:
    """The nested value with numbers for tensors, and the kinds and orders of containers beside what they hold."""
    if isinstance(value, LazyTensor):
        return float(value.numpy())
    if isinstance(value, dict):
        return type(value).__name__, [(key, plain(child)) for key, child in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [plain(child) for child in value]
    return value


def opened(value: Any) -> statedict.Checkpoint:
    return statedict.open(numbered(value))


def after(value: Any, *rules: Rule) -> Any:
    """What a nested value is after the rules; None stands for a tensor, which becomes its number."""
    return plain(apply(opened(value), rules).tree())


# -------------------------------------------------------------------- what people see


@pytest.mark.parametrize(
    "text",
    [
        "select('model_state_dict')",
        "select(('a.b', 0))",
        "strip_prefix('module.')",
        "add_prefix('model.')",
        "strip_wrapper('_orig_mod')",
        "add_wrapper('_orig_mod', '', '_orig_mod.blocks.0')",
        "drop('*.num_batches_tracked')",
        "keep('fc.*')",
    ],
)
def test_a_rule_reads_as_it_is_typed(text: str) -> None:
    from statedict import rules

    name, _, arguments = text.partition("(")
    typed = arguments[:-1]
    values = {
        "('a.b', 0)": [("a.b", 0)],
        "'_orig_mod', '', '_orig_mod.blocks.0'": ["_orig_mod", "", "_orig_mod.blocks.0"],
    }.get(typed, [typed.strip("'")])
    rule = getattr(rules, name)(*values)

    assert (text, text) == (str(rule), repr(rule))


def test_rules_are_equal_if_they_do_the_same() -> None:
    assert {strip_prefix("a."), strip_prefix("a.")} == {strip_prefix("a.")}
    assert strip_prefix("a.") != add_prefix("a.")
    assert strip_prefix("a.") != "strip_prefix('a.')"


def test_rules_are_a_sequence() -> None:
    rules = Rules([select("model"), strip_prefix("module."), drop("fc.*")])

    assert "select('model'), strip_prefix('module.'), drop('fc.*')" == str(rules)
    assert "Rules([select('model')])" == repr(rules[:1])
    assert (strip_prefix("module."), 3) == (rules[1], len(rules))
    assert {Rules(list(rules))} == {rules}


@pytest.mark.parametrize(
    ("rules", "lossless", "inverse"),
    [
        ([strip_prefix("a."), add_prefix("b.")], True, Rules([strip_prefix("b."), add_prefix("a.")])),
        ([add_wrapper("m", "", "m.a")], True, Rules([strip_wrapper("m")])),
        ([strip_wrapper("m")], True, None),
        ([select("a")], False, None),
        ([strip_prefix("a."), drop("b")], False, None),
        ([], True, Rules()),
    ],
)
def test_rules_say_what_is_lost_and_what_undoes_them(rules: list[Rule], lossless: bool, inverse: Rules | None) -> None:
    made = Rules(rules)

    assert (lossless, inverse) == (made.lossless, made.inverse())


@pytest.mark.parametrize(
    ("rules", "names"),
    [
        ([select("m"), strip_prefix("module.")], {"m.module.w": "w", "m.n": "n", "m": "", "o.w": None}),
        ([select(("m", 0))], {"m.0.w": "w", "m.1.w": None}),
        ([select("a\\.b")], {"a.b.w": "w", "a.c": None}),
        ([add_prefix("x.")], {"w": "x.w", "": "x"}),
        ([strip_wrapper("m")], {"m.a.m.w": "a.w", "a.m": "a.m"}),
        ([add_wrapper("m", "a", "a.m")], {"a.w": "a.m.m.w", "a": "a", "ab.w": "ab.w", "": ""}),
        ([drop("a.*"), strip_prefix("b.")], {"a.w": None, "b.w": "w"}),
        ([keep("a.*")], {"a.w": "a.w", "b.w": None}),
    ],
)
def test_rules_say_what_becomes_of_a_key(rules: list[Rule], names: dict[str, str | None]) -> None:
    made = Rules(rules)

    assert names == {key: made.renamed(key) for key in names}


# -------------------------------------------------------------------- flat state dicts


def test_stripping_a_prefix_is_what_torch_does_to_keys_and_metadata(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

    net = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Sequential(torch.nn.Linear(3, 2)))
    saved = torch.nn.DataParallel(net).state_dict()
    torch.save(saved, tmp_path / "model.pth")
    with statedict.open(tmp_path / "model.pth") as ckpt:
        made = apply(ckpt, strip_prefix("module.")).tree()
        before = ckpt.tree()._metadata
    metadata = saved._metadata
    consume_prefix_in_state_dict_if_present(saved, "module.")

    assert (OrderedDict, list(saved), dict(saved._metadata)) == (type(made), list(made), dict(made._metadata))
    assert dict(before) == {"": {"version": 1}, **{f"module.{k}".strip("."): v for k, v in metadata.items()}}


def test_adding_a_prefix_gives_the_state_dict_of_the_wrapped_model() -> None:
    torch = pytest.importorskip("torch")
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
    made = apply(statedict.open(net.state_dict()), add_prefix("module.")).tree()
    wrapped = torch.nn.DataParallel(net).state_dict()
    del wrapped._metadata[""]  # of the wrapper itself, which the model knows nothing of

    assert (list(wrapped), wrapped._metadata) == (list(made), made._metadata)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, about itself
def test_wrappers_of_compiled_modules_leave_keys_and_metadata() -> None:
    torch = pytest.importorskip("torch")
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Sequential(torch.nn.Linear(2, 2)))
    expected = net.state_dict()
    net[1] = torch.compile(net[1])
    compiled = torch.compile(net).state_dict()
    made = apply(statedict.open(compiled), strip_wrapper("_orig_mod"))
    again = apply(made, add_wrapper("_orig_mod", "", "_orig_mod.1")).tree()

    assert (list(expected), dict(expected._metadata)) == (list(made), dict(made.tree()._metadata))
    assert list(compiled) == list(again)
    assert set(again._metadata) <= set(compiled._metadata)


def test_only_keys_with_the_prefix_lose_it() -> None:
    made = after({"module.a": None, "modules.b": None, "module.": None, "epoch": 3}, strip_prefix("module."))

    assert ("dict", [("a", 1.0), ("modules.b", 2.0), ("module.", 3.0), ("epoch", 3)]) == made


def test_an_extra_state_of_many_parts_keeps_a_state_dict_flat() -> None:
    value = OrderedDict({"fc.weight": None, "fc._extra_state": {"scale": None}})
    made = after(value, add_prefix("module."))

    assert (
        "OrderedDict",
        [("module.fc.weight", 1.0), ("module.fc._extra_state", ("dict", [("scale", 2.0)]))],
    ) == made


def test_ties_and_storages_stay(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    weight = torch.arange(4.0)
    torch.save({"module.a": weight, "module.b": weight, "module.c": weight[1:]}, tmp_path / "tied.pth")
    with statedict.open(tmp_path / "tied.pth") as ckpt:
        made = apply(ckpt, [strip_prefix("module."), add_prefix("net.")])

        assert ("net.b",) == made["net.a"].tied_with
        assert ckpt.manifest.storages == made.manifest.storages
        assert [1.0, 2.0, 3.0] == made["net.c"].numpy().tolist()


def test_what_is_left_out_takes_its_storages_along() -> None:
    ckpt = opened({"a": None, "b": None})

    assert (2, 1) == (len(ckpt.manifest.storages), len(apply(ckpt, drop("a")).manifest.storages))


def test_the_result_is_over_the_same_files_and_does_not_close_them(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **{"module.w": np.arange(3)})
    with statedict.open(tmp_path / "a.npz") as ckpt:
        with apply(ckpt, strip_prefix("module.")) as made:
            source = made.source

        assert str(tmp_path / "a.npz") == source
        assert [0, 1, 2] == made["w"].numpy().tolist()


# -------------------------------------------------------------------- nested trees


def test_what_stands_in_the_containers_of_a_prefix_is_lifted() -> None:
    value = {"a": {"b": {"w": None, "v": None}, "c": None}, "d": None}

    assert (
        "dict",
        [("w", 1.0), ("v", 2.0), ("a", ("dict", [("c", 3.0)])), ("d", 4.0)],
    ) == after(value, strip_prefix("a.b."))


def test_a_prefix_may_end_inside_a_flat_key() -> None:
    value = {"model": {"module.w": None, "n": None}, "epoch": 3}

    assert (
        "dict",
        [("w", 1.0), ("model", ("dict", [("n", 2.0)])), ("epoch", 3)],
    ) == after(value, strip_prefix("model.module."))


def test_a_container_that_is_all_that_is_left_keeps_its_kind() -> None:
    assert ("OrderedDict", [("w", 1.0)]) == after({"model": OrderedDict(w=None)}, strip_prefix("model."))


def test_the_outer_container_stays_where_two_become_one() -> None:
    value = {"model": OrderedDict(w=None), "epoch": 3}

    assert ("dict", [("w", 1.0), ("epoch", 3)]) == after(value, strip_prefix("model."))


def test_a_prefix_is_put_before_a_nested_tree_as_containers() -> None:
    value = OrderedDict(fc={"weight": None}, cls_token=None)
    made = after(value, add_prefix("net.module."))

    assert (
        "dict",
        [("net", ("dict", [("module", ("OrderedDict", [("fc", ("dict", [("weight", 1.0)])), ("cls_token", 2.0)]))]))],
    ) == made


def test_a_list_that_loses_elements_becomes_a_dict() -> None:
    value = {"groups": [{"lr": 0.1}, {"lr": 0.2}, {"lr": 0.3}]}
    one, two = ("dict", [("lr", 0.2)]), ("dict", [("lr", 0.3)])

    assert ("dict", [("groups", ("dict", [(1, one), (2, two)]))]) == after(value, drop("groups.0.*"))
    assert ("dict", [("groups", ("list", [("dict", [("lr", 0.1)])]))]) == after(value, keep("groups.0.*"))


def test_keys_that_are_no_texts_are_kept() -> None:
    value = {"m": {(1, 2): None, 7: {True: None}}, "x": None}

    assert (
        "dict",
        [((1, 2), 1.0), (7, ("dict", [(True, 2.0)])), ("x", 3.0)],
    ) == after(value, strip_prefix("m."))


def test_empty_containers_are_kept() -> None:
    value = {"module": {"a": {}, "b": None}, "c": []}

    assert ("dict", [("a", ("dict", [])), ("b", 1.0), ("c", ("list", []))]) == after(value, strip_prefix("module."))


def test_wrappers_leave_nested_trees_and_come_back() -> None:
    value = {"m": {"fc": {"m": {"w": None}, "b": None}}}
    without = {"fc": {"w": None, "b": None}}

    assert plain(opened(without).tree()) == after(value, strip_wrapper("m"))
    assert plain(opened({"m": without}).tree()) == after(without, add_wrapper("m", ""))
    assert plain(opened({"fc": {"m.w": None, "m.b": None}}).tree()) == after(without, add_wrapper("m", "fc"))


def test_a_single_tensor_gets_the_prefix_as_its_name(tmp_path: Path) -> None:
    np.save(tmp_path / "w.npy", np.arange(3))
    with statedict.open(tmp_path / "w.npy") as ckpt:
        assert ["fc.weight"] == list(apply(ckpt, add_prefix("fc.weight")))


def test_a_deep_tree_is_renamed_without_recursion() -> None:
    value: Any = np.array(1.0)
    for _ in range(900):
        value = {"m": value}
    made = apply(statedict.open({"a": value}), [strip_prefix("a."), strip_wrapper("m")])

    assert ["m"] == list(made)


# -------------------------------------------------------------------- select, drop, keep


@pytest.mark.parametrize("key", ["a", "a.b", ("a", "b"), "flat", ("a", "list", 1)])
def test_select_is_what_at_gives(key: Any) -> None:
    ckpt = opened({"a": {"b": {"w": None}, "list": [None, {"v": None}]}, "flat.x": None, "flat.y.z": None})
    made, expected = apply(ckpt, select(key)), ckpt.at(key)

    assert plain(expected.tree()) == plain(made.tree())
    assert list(made) == [name for each in ckpt if (name := select(key).renamed(each)) is not None]


def test_globs_match_whole_keys_of_tensors_and_objects() -> None:
    value = {"fc.weight": None, "fc.bias": None, "epoch": 3}

    assert ("dict", [("fc.bias", 2.0), ("epoch", 3)]) == after(value, drop("*weight"))
    assert ("dict", [("epoch", 3)]) == after(value, keep("e*"))
    assert ("dict", []) == after(value, drop("*"))


# -------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("rule", "hint"),
    [
        (strip_prefix("modul."), "Did you mean 'module.'"),
        (strip_prefix("zzz."), "Keys begin with 'module.', 'head'"),
        (select("modul"), "There is: module.fc.weight, head"),
        (strip_wrapper("_orig_mod"), "Keys begin with 'module.', 'head'"),
        (add_wrapper("_orig_mod", "module.fd"), "Did you mean 'module.fc.'"),
        (drop("fc.weight"), "Did you mean 'module.fc.weight'"),
        (keep("zzz"), "There are 'module.fc.weight', 'head'"),
    ],
)
def test_a_rule_that_matches_nothing_names_what_there_is(rule: Rule, hint: str) -> None:
    with pytest.raises(RuleError) as caught:
        apply(opened({"module.fc.weight": None, "head": None}), rule)

    assert f"dict in memory: {rule} matches nothing. {hint}" == str(caught.value)


def test_a_prefix_cannot_be_stripped_twice() -> None:
    with pytest.raises(RuleError, match=r"strip_prefix\('module\.'\) matches nothing\. Keys begin with 'w'"):
        apply(opened({"module.w": None}), [strip_prefix("module."), strip_prefix("module.")])


def test_an_empty_checkpoint_has_nothing_to_match() -> None:
    with pytest.raises(RuleError, match="There are no keys"):
        apply(opened({}), add_prefix("a."))


@pytest.mark.parametrize(
    ("value", "rule", "pairs"),
    [
        ({"module.w": None, "w": None}, strip_prefix("module."), "'module.w' and 'w' as 'w'"),
        ({"module": {"w": None}, "w": None}, strip_prefix("module."), "'module.w' and 'w' as 'w'"),
        ({"a": {"w.x": None, "w": {"x": None}}}, strip_prefix("a."), None),
        ({"a": {"b": {"w": None}, "w": None}}, strip_prefix("a.b."), None),
        ({"m.a": None, "b": {"m": {"a": None}, "a": None}}, strip_wrapper("m"), "'b.m.a' and 'b.a' as 'b.a'"),
        ({"w": None, "a": {"w": {"x": None}}}, strip_prefix("a."), "'w' and 'a.w.x' as 'w'"),
    ],
)
def test_two_keys_with_one_name_are_refused_and_listed(value: Any, rule: Rule, pairs: str | None) -> None:
    if pairs is None:  # alike before, or not at all
        assert len(opened(value)) == len(apply(opened(value), rule))
        return
    with pytest.raises(RuleError) as caught:
        apply(opened(value), rule)

    assert f"{rule} gives two keys one name: {pairs}" == caught.value.what


def test_of_many_collisions_the_first_are_listed() -> None:
    value = {f"{prefix}{i}": None for i in range(20) for prefix in ("a.", "")}

    with pytest.raises(RuleError, match=r"'a\.7' and '7' as '7' and 12 more"):
        apply(opened(value), strip_prefix("a."))


@pytest.mark.parametrize(
    "make",
    [
        lambda: strip_prefix(""),
        lambda: add_prefix(3),  # type: ignore[arg-type]
        lambda: strip_wrapper("a.b"),
        lambda: add_wrapper("a"),
        lambda: drop(""),
        lambda: Rules.of("auto"),
        lambda: Rules.of([strip_prefix("a."), "b"]),
        lambda: Rules.of(7),
    ],
)
def test_what_is_no_rule_is_refused(make: Any) -> None:
    with pytest.raises(RuleError):
        make()


# -------------------------------------------------------------------- any tree, any rule

WORDS = st.sampled_from(["a", "b", "m", "0", "a.b", "m.a", "a.m", "m.m", "b.a.m"])
LEAVES = st.none()
TREES = st.recursive(
    LEAVES,
    lambda children: (
        st.dictionaries(WORDS | st.integers(0, 2), children, max_size=4)
        | st.lists(children, max_size=3)
        | st.dictionaries(WORDS, children, max_size=4).map(OrderedDict)
    ),
    max_leaves=12,
).filter(lambda tree: isinstance(tree, dict))
RENAMINGS = st.one_of(
    st.sampled_from(["a.", "m.", "a.b.", "m.a.", "a", "0."]).map(strip_prefix),
    st.sampled_from(["a.", "m.", "x.y.", "x"]).map(add_prefix),
    st.just(strip_wrapper("m")),
    st.sampled_from([("",), ("a", "a.m"), ("", "m", "m.m.a"), ("b.a", "a.b", "0")]).map(
        lambda at: add_wrapper("m", *at)
    ),
)


@given(TREES, RENAMINGS | WORDS.map(drop) | WORDS.map(keep))
@example({"a": {"m": None, "b": None}, "a.b": None}, strip_prefix("a."))
def test_the_tree_gets_the_names_that_the_rule_says(tree: Any, rule: Rule) -> None:
    ckpt = opened(tree)
    expected = [
        (name, ckpt[path].numpy()) for path in ckpt.manifest.tensors if (name := rule.renamed(dotted(path))) is not None
    ]
    try:
        made = apply(ckpt, rule)
    except RuleError as error:
        names = [str(rule.renamed(dotted(path))) for path in (*ckpt.manifest.tensors, *ckpt.manifest.objects)]
        clash = len(set(names)) < len(names) or any(a.startswith(f"{b}.") for a in names for b in names)

        assert clash or "matches nothing" in str(error)
        return

    assert sorted(expected) == sorted((dotted(path), made[path].numpy()) for path in made.manifest.tensors)


@given(TREES, RENAMINGS)
def test_the_inverse_gives_the_same_tree(tree: Any, rule: Rule) -> None:
    ckpt = opened(tree)
    inverse = rule.inverse()
    names = [dotted(path) for path in (*ckpt.manifest.tensors, *ckpt.manifest.objects)]
    undone = inverse is not None and all(inverse.renamed(str(rule.renamed(name))) == name for name in names)
    if not undone or any(rule.renamed(name) == name for name in names):
        return
    try:
        made = apply(ckpt, rule)
    except RuleError:
        return

    back = apply(made, Rules.of(inverse))

    assert sorted(names) == sorted(dotted(path) for path in (*back.manifest.tensors, *back.manifest.objects))
    # A prefix without its dot makes texts of numbers; numbers among dotted keys end up together.
    if str(rule).endswith(".')") and rule.name == "add_prefix" and len({type(key) for key in tree}) == 1:
        assert plain(ckpt.tree()) == plain(back.tree())

"""Patterns, templates and files of rules: what they match, what they refuse, and that they come back as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import statedict
from statedict import RuleError, rules
from statedict.rules.patterns import Pattern, is_template


def opened(*keys: str) -> statedict.Checkpoint:
    return statedict.open({key: np.full(2, at, np.float32) for at, key in enumerate(keys)})


def names(*wanted: rules.Rule, keys: list[str]) -> list[str]:
    return list(rules.apply(opened(*keys), wanted))


# -------------------------------------------------------------------- templates


@pytest.mark.parametrize(
    ("pattern", "result", "key", "expected"),
    [
        ("layers.{n}.a", "blocks.{n+1}.b", "layers.0.a", "blocks.1.b"),
        ("layers.{n}.a", "blocks.{n-1}.b", "layers.12.a", "blocks.11.b"),
        ("l.{n}.{rest...}", "b.{2*n}.{rest}", "l.3.x.y", "b.6.x.y"),
        ("l{n}_{m}", "b.{n}.{m}", "l1_2", "b.1.2"),
        ("{m}.weight", "{m}.w", "fc.weight", "fc.w"),
        ("l.{n}.w", "s.{n//3}.{n%3}.w", "l.7.w", "s.2.1.w"),
        ("{a}.{a}", "twice.{a}", "x.x", "twice.x"),
    ],
)
def test_a_template_gives_the_name_that_it_says(pattern: str, result: str, key: str, expected: str) -> None:
    assert expected == rules.rename(pattern, result).renamed(key)


@pytest.mark.parametrize("key", ["layers.0.a.b", "xlayers.0.a", "layers..a", "layers.0.1.a", "layers.0.A"])
def test_a_template_matches_whole_keys_and_no_dots(key: str) -> None:
    assert key == rules.rename("layers.{n}.a", "b.{n}").renamed(key)


@pytest.mark.parametrize(
    ("pattern", "result", "key", "what"),
    [
        ("l.{n}", "b.{n-1}", "l.0", "comes to -1"),
        ("l.{n}", "b.{n+1}", "l.x", "no number to reckon with"),
        ("l.{n}", "b.{n//0}", "l.1", "divides by zero"),
        ("l.{n}", "b.{n**9}", "l.1", r"\+ - \* // and %"),
        ("l.{n}", "b.{-n}", "l.1", r"\+ - \* // and %"),
        ("l.{n}", "b.{n+}", "l.1", "no sum"),
    ],
)
def test_sums_that_make_no_key_are_refused(pattern: str, result: str, key: str, what: str) -> None:
    with pytest.raises(RuleError, match=what):
        rules.rename(pattern, result).renamed(key)


def test_a_result_may_only_use_what_the_pattern_names() -> None:
    with pytest.raises(RuleError, match=r"nothing gives '\{m\}' a value"):
        rules.rename("l.{n}", "b.{m}")
    with pytest.raises(RuleError, match="can't be matched in a key"):
        rules.rename("l.{n+1}", "b.{n}")


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (rules.rename("l.{n}.w", "b.{n+2}.v"), rules.rename("b.{n}.v", "l.{n-2}.w")),
        (rules.rename("{m}.w", "{m}.v"), rules.rename("{m}.v", "{m}.w")),
        (rules.rename("{r...}.w", "x.{r}.v"), rules.rename("x.{r}.v", "{r...}.w")),
        (rules.rename("l.{n}.w", "b.{2*n}.v"), None),
        (rules.rename("l.{n}.{m}", "b.{n}"), None),
        (rules.rename(r"^l\.", "b."), None),
    ],
)
def test_the_inverse_of_a_template_is_one_where_there_is_one(rule: rules.Rule, expected: rules.Rule | None) -> None:
    assert str(expected).replace("{r...}", "{r}") == str(rule.inverse()).replace("{r...}", "{r}")


@given(st.integers(0, 50), st.integers(-5, 5))
def test_shifted_indices_come_back(n: int, shift: int) -> None:
    rule = rules.rename("a.{n}.w", f"b.{{n{shift:+d}}}.v")
    inverse = rule.inverse()
    assert inverse is not None
    if n + shift < 0:
        return

    assert f"a.{n}.w" == inverse.renamed(str(rule.renamed(f"a.{n}.w")))


@pytest.mark.parametrize(
    ("text", "expected"), [("a{2}", False), ("a{2,3}", False), ("{n}", True), ("{n+1}", True), ("a", False)]
)
def test_repetitions_of_regular_expressions_are_no_templates(text: str, expected: bool) -> None:
    assert expected == is_template(text)


def test_a_glob_and_a_template_say_which_tensors() -> None:
    assert Pattern("*.weight").match("a.b.weight") is not None
    assert Pattern("a.{n}.w").match("a.3.w") == {"n": "3"}
    assert Pattern("a.{n}.w").match("a.3.4.w") is None


# -------------------------------------------------------------------- regular expressions


def test_a_regular_expression_replaces_as_re_sub_does() -> None:
    keys = ["net.0.w", "net.10.w", "head.w"]

    assert ["layers.0.w", "layers.10.w", "head.w"] == names(rules.rename(r"^net\.(\d+)", r"layers.\1"), keys=keys)
    assert ["net.0.v", "net.10.v", "head.v"] == names(rules.rename(r"w$", "v"), keys=keys)
    assert ["0.w", "10.w"] == names(rules.rename(r"(?P<a>net)\.", ""), keys=keys[:2])


@pytest.mark.parametrize("pattern", ["(", "[a", "*a", "(?P<n"])
def test_what_is_no_regular_expression_is_said(pattern: str) -> None:
    with pytest.raises(RuleError, match="this is no regular expression"):
        rules.rename(pattern, "x")


def test_a_group_that_is_not_there_is_said() -> None:
    with pytest.raises(RuleError):
        rules.apply(opened("a.w"), rules.rename("a", r"\3"))


def test_a_regular_expression_that_would_never_end_is_ended() -> None:
    with pytest.raises(RuleError, match=r"takes too long: more than 1 s for one key.*template"):
        rules.apply(opened("a" * 60 + "b"), rules.rename("(a|aa)+$", "x"))


def test_a_key_of_which_nothing_is_left_is_refused() -> None:
    with pytest.raises(RuleError, match="leaves nothing of a key"):
        rules.apply(opened("abc"), rules.rename("abc", ""))


# -------------------------------------------------------------------- pairs, and what rules concern


def test_pairs_of_keys_may_change_places() -> None:
    made = rules.apply(opened("a", "b", "c"), rules.rename({"a": "b", "b": "a"}))

    assert [("b", 0.0), ("a", 1.0), ("c", 2.0)] == [(key, float(made[key].numpy()[0])) for key in made]


def test_every_pair_must_be_there() -> None:
    with pytest.raises(RuleError, match=r"'x': 'y'.* matches nothing"):
        rules.apply(opened("a"), rules.rename({"a": "b", "x": "y"}))

    assert ["b"] == names(rules.optional(rules.rename({"a": "b", "x": "y"})), keys=["a"])


def test_an_optional_rule_may_match_nothing_and_says_so() -> None:
    plan = rules.plan(opened("a.w"), [rules.optional(rules.drop("z*")), rules.rename("a.w", "b.w")])

    assert [("optional(drop('z*'))", 0), ("rename('a.w', 'b.w')", 1)] == [
        (h.rule, h.matched) for h in plan.coverage.rules
    ]
    with pytest.raises(RuleError, match=r"drop\('z\*'\) matches nothing"):
        rules.plan(opened("a.w"), [rules.drop("z*")])


def test_the_coverage_names_what_no_rule_concerns() -> None:
    plan = rules.plan(opened("a.w", "a.b", "c.w", "d"), [rules.drop("d"), rules.rename("a.{x}", "z.{x}")])

    assert plan.coverage.to_dict() == {
        "rules": [
            {"rule": "drop('d')", "matched": 1, "lossless": False, "notes": []},
            {"rule": "rename('a.{x}', 'z.{x}')", "matched": 2, "lossless": True, "notes": []},
        ],
        "matched": 2,
        "unmatched": 1,
        "unmatched_keys": ["c.w"],
        "dropped": ["d"],
        "created": [],
    }
    assert not plan.lossless
    assert plan.inverse() is None


def test_two_rules_for_one_name_are_refused_with_the_pairs() -> None:
    with pytest.raises(RuleError, match=r"gives two keys one name: 'a\.w' and 'b\.w' as 'c\.w'"):
        rules.apply(opened("a.w", "b.w"), rules.rename("{m}.w", "c.w"))


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ([rules.strip_prefix("m.")], "refused: strip_prefix('m.') matches nothing"),
        ([rules.rename("{a...}.w", "{a}.w")], None),
        ([rules.transpose("m.w", 0, 0)], "change nothing"),
        ([rules.unsqueeze("m.w", 0)], "change it again"),
        ([rules.cast("*", "float16")], "refused"),
    ],
)
def test_a_plan_says_what_the_same_rules_would_do_once_more(wanted: list[rules.Rule], said: str | None) -> None:
    checkpoint = opened("m.w")
    if said is None:
        with pytest.raises(RuleError):
            rules.plan(checkpoint, wanted)
        return

    assert said in rules.plan(checkpoint, wanted).again()


def test_names_of_modules_in_the_metadata_follow_their_tensors() -> None:
    torch = pytest.importorskip("torch")
    net = torch.nn.Sequential()
    net.add_module("layers", torch.nn.ModuleList([torch.nn.BatchNorm1d(2) for _ in range(2)]))
    made = rules.apply(statedict.open(net.state_dict()), rules.rename("layers.{n}.{rest}", "blocks.{n+1}.{rest}"))
    other = torch.nn.Sequential()
    other.add_module("blocks", torch.nn.ModuleList([torch.nn.Identity(), *[torch.nn.BatchNorm1d(2) for _ in range(2)]]))

    found = made.tree()._metadata

    assert {"version": 2} == found["blocks.1"] == found["blocks.2"]
    assert list(other.state_dict()) == list(made)


def test_nested_containers_keep_their_kinds() -> None:
    value = {"state": {0: {"m": np.zeros(1)}, 1: {"m": np.ones(1)}}, "x": 3}
    made = rules.apply(statedict.open(value), rules.rename("state.{n}.m", "state.{n+1}.v")).tree()

    assert {"state": {1: ["v"], 2: ["v"]}, "x": 3} == {**made, "state": {k: list(v) for k, v in made["state"].items()}}


# -------------------------------------------------------------------- files

EVERY = [
    rules.select("a.b"),
    rules.strip_prefix("module."),
    rules.add_prefix("m."),
    rules.strip_wrapper("_orig_mod"),
    rules.add_wrapper("_orig_mod", "", "a.b"),
    rules.drop("*.x"),
    rules.keep("*"),
    rules.rename("a.{n}", "b.{n+1}"),
    rules.rename(r"^a\.(\d+)", r"b.\1"),
    rules.rename({'a"é.b': "c\\d", "x": "y"}),
    rules.cast("*", "bf16"),
    rules.transpose("*.w"),
    rules.transpose("*.w", 0, 1),
    rules.permute("*", 2, 0, 1),
    rules.reshape("*", 2, -1),
    rules.squeeze("*", 0),
    rules.unsqueeze("*", -1),
    rules.slice("*", 0, 2, None),
    rules.slice("*", 1, -3, -1),
    rules.pad("*", 0, 64, 1.5),
    rules.split("{m}.qkv", ["{m}.q", "{m}.k", "{m}.v"], [4, 2, 2], dim=1),
    rules.concat(["{m}.q", "{m}.k"], "{m}.qk"),
    rules.interleave(["a", "b"], "c", dim=-1),
    rules.deinterleave("c", ["a", "b"], dim=-1),
    rules.stack("e.{i}.w", "e.w", 1),
    rules.unstack("e.w", "e.{i}.w"),
    rules.reorder("*.q_proj.weight", (4, 2, 8), (0, 2, 1)),
    rules.tie("head.w", "emb.w"),
    rules.untie("head.w"),
    rules.fold_weight_norm(),
    rules.fold_weight_norm("conv*"),
    rules.fold_pruning("conv*"),
    rules.fold_spectral_norm("conv*", 1),
    rules.fold_scale("{m}.weight", "{m}.SCB", 1 / 127),
    rules.fold_scale("{m}.weight", "{m}.scale", 1.0, (128, 128), "bfloat16"),
    rules.fold_batch_norm("c{n}", "b{n}", 1e-3),
    rules.fold_pruning(),
    rules.fold_spectral_norm("d.*", 1),
    rules.fold_scale("{m...}.weight", "{m...}.SCB", 1 / 127),
    rules.fold_scale("{m...}.weight", "{m...}.weight_scale_inv", block=(128, 128), dtype="bfloat16"),
    rules.merge_lora(scaling=0.5),
    rules.merge_lora("enc.*", alpha=16),
    rules.optional(rules.drop("*")),
]


def test_every_rule_is_among_those_tested_here() -> None:
    makers = set(rules.__all__) - {
        "Coverage",
        "Plan",
        "Rule",
        "Rules",
        "RulesLike",
        "apply",
        "plan",
        "shipped",
        "from_file",
        "to_file",
    }

    assert makers - {"optional"} == {rule.name for rule in EVERY}


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_rules_come_back_from_a_file_as_they_were(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rules{suffix}"
    rules.to_file(EVERY, path)

    assert EVERY == list(rules.from_file(path))
    assert [str(rule) for rule in EVERY] == [str(rule) for rule in rules.from_file(path)]
    rules.to_file(rules.from_file(path), path, overwrite=True)
    assert EVERY == list(rules.Rules.from_file(path))


@pytest.mark.parametrize("rule", EVERY, ids=str)
def test_what_a_rule_shows_is_what_one_types(rule: rules.Rule) -> None:
    known = {name: getattr(rules, name) for name in rules.__all__}

    typed = eval(str(rule), known)  # noqa: S307

    assert rule == typed
    assert hash(rule) == hash(typed)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "no JSON"),
        ("[1]", "no file of rules"),
        ("{}", "no file of rules"),
        ('{"rules": [{"rule": "explode"}]}', "rule 1: there is no such rule"),
        ('{"rules": [{"glob": "x"}]}', "rule 1: there is no such rule"),
        (
            '{"rules": [{"rule": "drop", "glob": "x", "also": 1}]}',
            "rule 1: drop got an unexpected keyword argument 'also'",
        ),
        ('{"rules": [{"rule": "drop"}]}', "rule 1: drop missing"),
        ('{"rules": [{"rule": "drop", "glob": 3}]}', "rule 1: drop takes a text"),
        ('{"rules": [{"rule": "rename", "pattern": "a"}]}', "rule 1: rename needs"),
        ('{"rules": [{"rule": "rename"}]}', "rule 1: rename"),
        ('{"rules": [{"rule": "permute", "glob": "*", "dims": "01"}]}', "rule 1: permute takes whole numbers"),
        ('{"schema": "other/1", "rules": []}', "another kind of file"),
        ("[" * 100_000, "no JSON"),
    ],
)
def test_a_file_that_is_none_of_rules_is_refused_in_one_line(text: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / "rules.json"
    path.write_text(text)

    with pytest.raises(RuleError, match=what) as caught:
        rules.from_file(path)

    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("rules: []")
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    (tmp_path / "c.toml").write_text("a = [")
    for name, what in {"a.yaml": ".toml or .json", "b.toml": "UTF-8", "c.toml": "no TOML"}.items():
        with pytest.raises(RuleError, match=what):
            rules.from_file(tmp_path / name)
    with pytest.raises(statedict.FileError):
        rules.from_file(tmp_path / "none.toml")


def test_a_written_file_says_its_schema(tmp_path: Path) -> None:
    rules.to_file([rules.drop("x")], tmp_path / "r.json")
    found: Any = json.loads((tmp_path / "r.json").read_text())

    assert {"schema": "statedict.rules/1", "rules": [{"rule": "drop", "glob": "x"}]} == found
    with pytest.raises(statedict.TargetExists):
        rules.to_file([rules.drop("x")], tmp_path / "r.json")


@pytest.mark.parametrize(
    "make",
    [
        lambda: rules.cast("*", "int8"),
        lambda: rules.cast("*", "float9"),
        lambda: rules.split("a", []),
        lambda: rules.split("a", ["b", "b"]),
        lambda: rules.split("a", "bc"),
        lambda: rules.concat(["{m}.a", "b"], "c"),
        lambda: rules.stack("a", "b"),
        lambda: rules.stack("a.{n}.{m}", "b"),
        lambda: rules.unstack("a.{n}", "b"),
        lambda: rules.transpose("*", 0.5),  # type: ignore[arg-type]
        lambda: rules.merge_lora(),
        lambda: rules.merge_lora(scaling=1, alpha=1),
        lambda: rules.rename({}),
        lambda: rules.rename("a"),
        lambda: rules.pad("*", 0, 4, "x"),  # type: ignore[arg-type]
    ],
)
def test_arguments_that_make_no_rule_are_refused(make: Any) -> None:
    with pytest.raises(RuleError):
        make()

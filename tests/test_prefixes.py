"""The search for rules that make a state dict fit: what it finds, what it leaves alone, and where it doesn't choose."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import statedict
from statedict.prefixes import WRAPPERS, Repair, containers_of, find_repair
from statedict.rules import Rules, apply

Shapes = dict[str, tuple[int, ...]]

NET: Shapes = {
    "stem.weight": (4, 3),
    "stem.bias": (4,),
    "blocks.0.norm.weight": (4,),
    "blocks.0.fc.weight": (8, 4),
    "blocks.1.norm.weight": (4,),
    "blocks.1.fc.weight": (8, 4),
    "head.weight": (2, 8),
}


def prefixed(prefix: str, shapes: Mapping[str, tuple[int, ...]] = NET) -> Shapes:
    return {prefix + key: shape for key, shape in shapes.items()}


def compiled(*modules: str, word: str = "_orig_mod") -> Shapes:
    """The network with a wrapper around each of these modules."""
    out = {}
    for key, shape in NET.items():
        for module in modules:
            key = key.replace(f"{module}.", f"{module}.{word}.", 1) if key.startswith(f"{module}.") else key
        out[key] = shape
    return out


def arrays(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    return {key: np.zeros(shape, "float32") for key, shape in shapes.items()}


def shapes_of(state: Iterable[tuple[str, Any]]) -> Shapes:
    return {key: tuple(value.shape) for key, value in state}


def repaired(source: Any, target: Shapes) -> Repair | None:
    """The repair of a nested value; its rules, applied, must give the names that it promises, and those fit."""
    ckpt = statedict.open(source)
    shapes = shapes_of(ckpt.items())
    repair = find_repair(shapes, target, containers=containers_of(ckpt.manifest.structure))
    plain = sum(target.get(key) == shape for key, shape in shapes.items())
    if repair is not None and not repair.is_ambiguous:
        made = apply(ckpt, repair.rules)
        fitting = sum(target.get(key) == value.shape for key, value in made.items())

        assert list(repair.names.values()) == list(made)
        assert (fitting, plain) == (repair.matches, repair.plain)
        assert plain < fitting
    return repair


def rules_for(source: Any, target: Shapes = NET) -> str | None:
    repair = repaired(source, target)
    return None if repair is None else str(repair.rules)


# -------------------------------------------------------------------- wrappers


@pytest.mark.parametrize(
    ("source", "rules"),
    [
        (prefixed("module."), "strip_prefix('module.')"),
        (prefixed("_orig_mod."), "strip_prefix('_orig_mod.')"),
        (prefixed("_orig_mod.module."), "strip_prefix('_orig_mod.module.')"),
        (prefixed("module._orig_mod."), "strip_prefix('module._orig_mod.')"),
        (prefixed("module.module."), "strip_prefix('module.module.')"),
        (prefixed("_forward_module.model."), "strip_prefix('_forward_module.model.')"),
        (prefixed("net.backbone."), "strip_prefix('net.backbone.')"),
        (compiled("blocks.0", "blocks.1"), "strip_wrapper('_orig_mod')"),
        (compiled("blocks.0", "blocks.1", word="_fsdp_wrapped_module"), "strip_wrapper('_fsdp_wrapped_module')"),
        (compiled("blocks.1.fc", word="_checkpoint_wrapped_module"), "strip_wrapper('_checkpoint_wrapped_module')"),
        (compiled("blocks", word="module"), "strip_wrapper('module')"),
        (
            prefixed("module._orig_mod.model.", compiled("blocks.0")),
            "strip_wrapper('_orig_mod'), strip_prefix('module.model.')",
        ),
    ],
)
def test_wrappers_of_the_source_are_taken_away(source: Shapes, rules: str) -> None:
    assert rules == rules_for(arrays(source))


@pytest.mark.parametrize(
    ("source", "target", "rules"),
    [
        (NET, prefixed("module."), "add_prefix('module.')"),
        (NET, prefixed("_orig_mod.module."), "add_prefix('_orig_mod.module.')"),
        (NET, compiled("blocks.0"), "add_wrapper('_orig_mod', 'blocks.0')"),
        (prefixed("module."), prefixed("_orig_mod."), "strip_prefix('module.'), add_prefix('_orig_mod.')"),
        (prefixed("_orig_mod.module."), prefixed("module."), "strip_prefix('_orig_mod.')"),
        (prefixed("module."), prefixed("module._orig_mod."), None),
        (
            compiled("blocks.0"),
            compiled("blocks.1", word="module"),
            "strip_wrapper('_orig_mod'), add_wrapper('module', 'blocks.1')",
        ),
        (
            compiled("blocks.0"),
            compiled("blocks.1"),
            "strip_wrapper('_orig_mod'), add_wrapper('_orig_mod', 'blocks.1')",
        ),
        (
            prefixed("state.", compiled("blocks.0")),
            prefixed("module._orig_mod.", compiled("blocks.1", "blocks.1._orig_mod.fc", word="module")),
            None,
        ),
    ],
)
def test_a_wrapped_model_gets_names_with_its_wrappers(source: Shapes, target: Shapes, rules: str | None) -> None:
    repair = repaired(arrays(source), target)

    assert repair is not None
    assert len(target) == repair.matches
    assert rules in (None, str(repair.rules))


def test_an_unmatched_key_is_renamed_like_the_others_and_seen() -> None:
    repair = repaired(arrays({**prefixed("module."), "module.extra": (1,), "loss.weight": (2,)}), NET)

    assert repair is not None
    assert {"module.extra": "extra", "loss.weight": "loss.weight"} == {
        key: name for key, name in repair.names.items() if name not in NET
    }


def test_a_wrapper_that_is_not_needed_stays() -> None:
    source = {**prefixed("module."), "module.extra._orig_mod.weight": (1,)}

    assert "strip_prefix('module.')" == rules_for(arrays(source))


@pytest.mark.parametrize(
    ("source", "target", "rules"),
    [
        (prefixed("module."), prefixed("module."), None),
        (prefixed("_orig_mod.module."), prefixed("module."), "strip_prefix('_orig_mod.')"),
        (
            prefixed("a.module._orig_mod."),
            prefixed("a.module."),
            "strip_prefix('a.module._orig_mod.'), add_prefix('a.module.')",
        ),
        (
            {**prefixed("module.module."), "module.fc.weight": (9, 9)},
            {**prefixed("module."), "fc.weight": (9, 9)},
            "strip_prefix('module.')",
        ),
        (
            {**prefixed("a.module.", compiled("blocks.0")), "a.w": (3,)},
            {**prefixed("a.module."), "a.w": (3,)},
            "strip_wrapper('_orig_mod')",
        ),
    ],
)
def test_a_module_that_is_really_called_module_stays(source: Shapes, target: Shapes, rules: str | None) -> None:
    assert rules == rules_for(arrays(source), target)


def test_half_of_the_keys_with_a_prefix_are_no_wrapped_model() -> None:
    keys = list(NET)
    source = {("module." if i < len(keys) // 2 else "") + key: NET[key] for i, key in enumerate(keys)}

    assert rules_for(arrays(source)) is None


@pytest.mark.parametrize(
    "extra",
    [{"stem.weight": (9, 9)}, {key: (1, *shape) for key, shape in NET.items()}],
    ids=["one", "all"],
)
def test_names_that_would_collide_are_not_proposed(extra: Shapes) -> None:
    assert rules_for(arrays({**prefixed("module."), **extra})) is None


def test_names_that_would_collide_inside_a_model_are_not_proposed() -> None:
    source = {**compiled("blocks.0"), "blocks.0.fc.weight": (7,)}

    assert rules_for(arrays(source)) is None


# -------------------------------------------------------------------- where the weights are


@pytest.mark.parametrize(
    ("source", "rules", "words"),
    [
        ({"model_state_dict": arrays(NET)}, "select('model_state_dict')", "at='model_state_dict'"),
        (
            {"epoch": 3, "state_dict": arrays(prefixed("model."))},
            "select('state_dict'), strip_prefix('model.')",
            'rules="auto"',
        ),
        (
            {"checkpoint": {"model": arrays(prefixed("module._orig_mod.net.")), "step": 7}},
            "select('checkpoint.model'), strip_prefix('module._orig_mod.net.')",
            'rules="auto"',
        ),
        ({"module": arrays(NET), "optimizer": {}}, "select('module')", "at='module'"),
        (
            {"a.b": {"state.dict": arrays(compiled("blocks.0"))}},
            "select('a.b.state.dict'), strip_wrapper('_orig_mod')",
            'rules="auto"',
        ),
        ({"runs": [{"model": arrays(NET)}, {"log": [1]}]}, "select('runs.0.model')", "at='runs.0.model'"),
    ],
)
def test_the_weights_are_found_in_a_training_checkpoint(source: Any, rules: str, words: str) -> None:
    repair = repaired(source, NET)

    assert repair is not None
    assert (rules, words, len(NET)) == (str(repair.rules), repair.words, repair.matches)
    assert f"7 of 7 tensors fit with {rules}: pass {words}" == repair.advice


def test_optimizer_states_are_neither_weights_nor_unexpected() -> None:
    state = {i: {"exp_avg": np.zeros(shape), "step": np.zeros(())} for i, shape in enumerate(NET.values())}
    named = {key: {"exp_avg": np.zeros(shape)} for key, shape in NET.items()}
    source = {"model": arrays(prefixed("module.")), "optimizer": {"state": state}, "named": named}
    repair = repaired(source, NET)

    assert repair is not None
    assert set(prefixed("model.module.")) == set(repair.names)


def test_what_a_container_is_decides_between_select_and_a_prefix() -> None:
    flat = {**prefixed("model."), "loss.weight": (2,)}

    assert "select('model')" == rules_for({"model": arrays(NET), "loss": {"weight": np.zeros(2)}})
    assert "strip_prefix('model.')" == rules_for(arrays(flat))


# -------------------------------------------------------------------- several that fit


@pytest.mark.parametrize(
    ("source", "candidates"),
    [
        (arrays({**prefixed("student."), **prefixed("teacher.")}), ("student", "teacher")),
        ({"model": arrays(NET), "model_best": arrays(NET)}, ("model", "model_best")),
        ({"ema": arrays(NET), "swa_state_dict": arrays(NET)}, ("ema", "swa_state_dict")),
        (
            {"s": arrays({**prefixed("student.module."), **prefixed("teacher._orig_mod.", compiled("blocks.0"))})},
            ("s.student", "s.teacher"),
        ),
    ],
)
def test_parts_that_fit_equally_well_are_named_and_none_is_chosen(source: Any, candidates: tuple[str, ...]) -> None:
    repair = repaired(source, NET)

    assert repair is not None
    assert (candidates, Rules(), {}) == (repair.candidates, repair.rules, repair.names)
    assert f"at={candidates[0]!r}" == repair.words
    assert repair.advice.startswith(f"Several parts of it fit equally well ('{candidates[0]}', '{candidates[1]}'): say")


@pytest.mark.parametrize("candidate", ["s.student", "s.teacher"])
def test_a_candidate_is_what_at_takes(candidate: str) -> None:
    source = {"s": arrays({**prefixed("student.module."), **prefixed("teacher._orig_mod.", compiled("blocks.0"))})}
    repair = repaired(statedict.open(source, at=candidate), NET)

    assert repair is not None
    assert len(NET) == repair.matches


@pytest.mark.parametrize("name", ["ema", "model_ema", "ema_state_dict", "shadow", "averaged_model", "swa", "emaModel"])
def test_averages_are_passed_over_and_said(name: str) -> None:
    repair = repaired({name: arrays(NET), "model": arrays(prefixed("module."))}, NET)

    assert repair is not None
    assert "select('model'), strip_prefix('module.')" == str(repair.rules)
    assert (f"the averaged weights under '{name}' fit as well: at='{name}' takes them instead",) == repair.notes


def test_averages_are_passed_over_even_if_the_weights_need_more_rules() -> None:
    assert "select('net'), strip_wrapper('_orig_mod')" == rules_for(
        {"ema": arrays(NET), "net": arrays(compiled("stem"))}
    )


def test_averages_are_taken_where_nothing_else_fits_as_well() -> None:
    repair = repaired({"model": arrays({**NET, "head.weight": (5, 8)}), "ema": arrays(NET)}, NET)

    assert repair is not None
    assert ("select('ema')", ()) == (str(repair.rules), repair.notes)


@pytest.mark.parametrize(
    ("source", "rules"),
    [
        (arrays({"n_averaged": (), **prefixed("module.")}), "drop('n_averaged'), strip_prefix('module.')"),
        (
            {"swa": arrays({"n_averaged": (), **prefixed("module.module.")})},
            "select('swa'), drop('n_averaged'), strip_prefix('module.module.')",
        ),
        (
            arrays({"net[0].n_averaged": (), **prefixed("net[0].module.")}),
            "drop('net[[]0].n_averaged'), strip_prefix('net[0].module.')",
        ),
    ],
)
def test_the_counter_of_an_averaged_model_is_left_out_and_said(source: Any, rules: str) -> None:
    repair = repaired(source, NET)

    assert repair is not None
    assert (rules, set(NET)) == (str(repair.rules), set(repair.names.values()))
    assert ["n_averaged', the counter of an AveragedModel, is left out"] == [note[-57:] for note in repair.notes]


def test_an_averaged_model_can_be_the_target() -> None:
    assert "add_prefix('module.')" == rules_for(arrays(NET), {"n_averaged": (), **prefixed("module.")})


# -------------------------------------------------------------------- nothing to repair

OTHER: Shapes = {
    **{f"layer{i}.0.{name}": shape for i in range(4) for name, shape in [("conv.weight", (4, 3)), ("bn.weight", (4,))]},
    "fc.weight": (2, 8),
}


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (NET, NET),
        ({**NET, "extra.weight": (1,)}, NET),
        (NET, {**NET, "extra.weight": (1,)}),
        (NET, {key: (*shape, 1) for key, shape in NET.items()}),
        (prefixed("module."), {key: (*shape, 1) for key, shape in NET.items()}),
        (OTHER, NET),
        (NET, OTHER),
        (OTHER, {"bn.weight": (4,), **{f"stage.{i}.w": (i,) for i in range(9)}}),
        ({}, NET),
        (NET, {}),
    ],
)
def test_no_repair_is_proposed_where_none_helps(source: Shapes, target: Shapes) -> None:
    assert find_repair(source, target) is None


def test_a_head_of_another_size_does_not_hide_the_prefix() -> None:
    repair = repaired(arrays(prefixed("module.", {**NET, "head.weight": (1000, 8)})), NET)

    assert repair is not None
    assert ("strip_prefix('module.')", 6, 7) == (str(repair.rules), repair.matches, repair.wanted)


def test_a_file_with_many_equal_layers_is_searched_in_linear_time() -> None:
    source = {f"layers.{i}.weight": (3,) for i in range(20_000)}
    containers = {"layers", *[f"layers.{i}" for i in range(20_000)]}
    repair = find_repair(source, {"weight": (3,)}, containers=containers)

    assert repair is not None
    assert len(source) == len(repair.candidates)


# -------------------------------------------------------------------- what torch makes


def network(torch: Any) -> Any:
    return torch.nn.Sequential(
        torch.nn.Linear(3, 4),
        torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4)),
        torch.nn.Linear(4, 2),
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, about itself
@pytest.mark.parametrize("kind", ["parallel", "compiled", "parallel compiled", "compiled parallel", "part", "averaged"])
def test_the_state_dicts_of_wrapped_models_fit_the_model_and_the_other_way_round(kind: str) -> None:
    torch = pytest.importorskip("torch")
    from torch.optim.swa_utils import AveragedModel

    plain = network(torch).state_dict()
    net = network(torch)
    if kind == "part":
        net[1] = torch.compile(net[1])
    for word in kind.split():
        net = {
            "parallel": torch.nn.DataParallel,
            "compiled": torch.compile,
            "averaged": AveragedModel,
            "part": lambda each: each,
        }[word](net)
    wrapped = net.state_dict()
    there = repaired(wrapped, shapes_of(plain.items()))
    back = repaired(plain, shapes_of(wrapped.items()))

    assert there is not None
    assert back is not None
    assert (list(plain), len(plain)) == (list(there.names.values()), back.matches)


@pytest.mark.filterwarnings("ignore")  # of torch, about what it imports
def test_the_names_of_a_checkpointed_module_are_seen_through() -> None:
    torch = pytest.importorskip("torch")
    wrappers = pytest.importorskip("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    net = network(torch)
    expected = list(dict(net.named_parameters()))
    net[1] = wrappers.checkpoint_wrapper(net[1])
    named = dict(net.named_parameters())
    repair = repaired(named, shapes_of(network(torch).named_parameters()))

    assert repair is not None
    assert ("strip_wrapper('_checkpoint_wrapped_module')", expected) == (str(repair.rules), list(repair.names.values()))


# -------------------------------------------------------------------- any names, any wrappers

COMPONENTS = st.sampled_from(["a", "b", "fc", "0", "1", "weight", "modules"])
NAMES = st.lists(COMPONENTS, min_size=1, max_size=4).map(".".join)


@st.composite
def networks(draw: st.DrawFn) -> Shapes:
    """Names of which none is the path of another, and shapes that all differ."""
    names = draw(st.lists(NAMES, min_size=2, max_size=8, unique=True))
    names = [name for name in names if not any(other.startswith(f"{name}.") for other in names)]
    return {name: (number,) for number, name in enumerate(names)}


@st.composite
def wrapped(draw: st.DrawFn, names: Iterable[str]) -> dict[str, str]:
    """Each name as it is in a model of which some modules are wrapped, any number of times."""
    now = {name: name for name in names}
    for _ in range(draw(st.integers(0, 4))):
        paths = {key[:at] for key in now.values() for at, char in enumerate(key) if char == "."}
        module = draw(st.sampled_from(["", *sorted(paths)]))
        word = draw(st.sampled_from(WRAPPERS))
        begin = f"{module}." if module else ""
        now = {n: f"{begin}{word}.{k[len(begin) :]}" if k.startswith(begin) else k for n, k in now.items()}
    return now


@given(st.data(), networks(), st.sampled_from(["", "model.", "net.inner.", "state.module."]))
def test_the_original_names_come_back_from_any_stack_of_wrappers(data: st.DataObject, net: Shapes, prefix: str) -> None:
    saved = data.draw(wrapped(net))
    source = {prefix + key: net[name] for name, key in saved.items()}
    repair = repaired(arrays(source), net)
    made = {key: key for key in source} if repair is None else repair.names

    assert {prefix + key: name for name, key in saved.items()} == made


@given(st.data(), networks())
def test_the_names_of_a_wrapped_model_are_found_from_those_of_another(data: st.DataObject, net: Shapes) -> None:
    saved, wanted = data.draw(wrapped(net)), data.draw(wrapped(net))
    repair = repaired(arrays({saved[name]: net[name] for name in net}), {wanted[name]: net[name] for name in net})
    made = {saved[name]: saved[name] for name in net} if repair is None else repair.names

    assert {saved[name]: wanted[name] for name in net} == made


SHAPES = st.dictionaries(
    st.lists(st.sampled_from(["a", "b", "module", "_orig_mod", "w", "n_averaged"]), min_size=1, max_size=4).map(
        ".".join
    ),
    st.sampled_from([(), (1,), (2, 3)]),
    max_size=8,
)


@given(SHAPES, SHAPES)
def test_a_repair_never_gives_two_keys_one_name_and_never_fits_less(source: Shapes, target: Shapes) -> None:
    repair = find_repair(source, target)
    if repair is not None and not repair.is_ambiguous:
        names = repair.names

        assert len(names) == len(set(names.values()))
        assert repair.plain < sum(target.get(name) == source[key] for key, name in names.items()) == repair.matches
        assert dict(names) == {key: name for key in source if (name := repair.rules.renamed(key)) is not None}


@given(st.dictionaries(NAMES, st.just((1,)) | st.just((2,)), max_size=8), st.integers(0, 3))
def test_containers_make_no_difference_to_the_names(net: Shapes, depth: int) -> None:
    source: Any = arrays(prefixed("module.", net))
    for level in range(depth):
        source = {f"level{level}": source}
    repair = repaired(source, net)
    found = [] if repair is None else list(repair.names.values())

    assert found in ([], list(net))

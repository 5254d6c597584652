"""Optimizers' state by the names of parameters: what is saved, what is loaded where, what is refused and left alone."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from statedict.errors import KeyMismatch, SpecMismatch, StateDictError, Unsupported  # noqa: E402
from statedict.torch.optimizers.loading import load_optimizer, named_state_dict  # noqa: E402
from statedict.torch.optimizers.matching import parameter_names  # noqa: E402

SHAPES = {"a.weight": (3, 2), "a.bias": (3,), "b.weight": (2, 3), "b.bias": (2,), "c.weight": (3, 2)}
NAMES = tuple(SHAPES)
ALL_LOOPS = [{}, {"foreach": False}, {"foreach": True}]

MAKERS: dict[str, Callable[..., Any]] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "SGD without momentum": lambda params: torch.optim.SGD(params, lr=0.1),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.1, amsgrad=True),
    "Adam fused": lambda params: torch.optim.Adam(params, lr=0.1, fused=True),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.1),
    "Adamax": lambda params: torch.optim.Adamax(params, lr=0.1),
    "NAdam": lambda params: torch.optim.NAdam(params, lr=0.1),
    "RAdam": lambda params: torch.optim.RAdam(params, lr=0.1),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.1, momentum=0.9, centered=True),
    "Rprop": lambda params: torch.optim.Rprop(params, lr=0.1),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1),
    "Adadelta": lambda params: torch.optim.Adadelta(params, lr=0.1),
    "ASGD": lambda params: torch.optim.ASGD(params, lr=0.1),
    "SparseAdam": lambda params: torch.optim.SparseAdam(params, lr=0.1),
}
MAKERS |= {
    name: (lambda cls: lambda params: cls(params, lr=0.1))(getattr(torch.optim, name))
    for name in ("Adafactor", "Muon")  # since torch 2.5 and 2.9
    if hasattr(torch.optim, name)
}

Params = dict[str, Any]


def params_of(maker: str = "", dtype: Any = torch.float32, names: Sequence[str] = NAMES) -> Params:
    """Parameters with equal values at each call. Muon takes matrices alone."""
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return {
        name: torch.nn.Parameter(values[name].to(dtype)) for name in names if maker != "Muon" or values[name].dim() == 2
    }


def module_of(params: Params) -> Any:
    """A module whose parameters are these, under these names."""
    root = torch.nn.Module()
    for name, param in params.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.register_parameter(last, param)
    return root


def step(optimizer: Any, params: Params, seed: int) -> None:
    """One step with gradients that depend on the names and the seed alone."""
    for name, param in params.items():
        generator = torch.Generator().manual_seed(1000 * seed + sum(name.encode()))
        grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        param.grad = grad.to_sparse(1) if isinstance(optimizer, torch.optim.SparseAdam) else grad
    optimizer.step(lambda: torch.tensor(1.0) + 0 * seed)


def trained(maker: Callable[..., Any], params: Params, steps: int = 3) -> Any:
    optimizer = maker(list(params.items()))
    for seed in range(steps):
        step(optimizer, params, seed)
    return optimizer


def through_torch(state: Any) -> Any:
    """Saved and loaded by torch, with nothing but what it calls safe."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def copies(params: Params, order: Sequence[str] | None = None) -> Params:
    return {name: torch.nn.Parameter(params[name].detach().clone()) for name in order or params}


def frozen(optimizer: Any) -> Any:
    """Everything of the optimizer, for comparisons: its state by position and its groups."""
    return copy.deepcopy(optimizer.state_dict())


def same(first: Any, second: Any) -> bool:
    """Equal to the bit, dtypes included."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return (
            isinstance(second, dict) and list(first) == list(second) and all(same(first[k], second[k]) for k in first)
        )
    if isinstance(first, (list, tuple)):
        return type(first) is type(second) and len(first) == len(second) and all(map(same, first, second))
    return type(first) is type(second) and first == second


def tensors_in(value: Any) -> Iterator[Any]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


# -------------------------------------------------------------------- saving


def test_names_of_a_model_are_saved_in_each_group() -> None:
    params = params_of()
    groups = [{"params": [params["a.weight"], params["c.weight"]]}, {"params": [params["a.bias"]], "lr": 1.0}]

    saved = named_state_dict(torch.optim.SGD(groups, lr=0.1), [module_of(params)])

    assert [["a.weight", "c.weight"], ["a.bias"]] == [group["param_names"] for group in saved["param_groups"]]
    assert "torch.optim.sgd.SGD" == saved["optimizer_class"]


def test_saving_changes_nothing_of_the_optimizer() -> None:
    params = params_of()
    optimizer = torch.optim.SGD(params.values(), lr=0.1)

    named_state_dict(optimizer, [module_of(params)])

    assert "param_names" not in optimizer.param_groups[0]


def test_a_hook_that_gives_out_its_own_groups_finds_them_unchanged() -> None:
    params = params_of()
    optimizer = torch.optim.SGD(params.values(), lr=0.1)
    own = optimizer.state_dict()
    before = copy.deepcopy(own)
    optimizer.register_state_dict_post_hook(lambda _, state: own)

    named_state_dict(optimizer, [module_of(params)])

    assert before == own


def test_of_several_models_the_one_that_has_the_parameters_names_them() -> None:
    first, second = params_of(), params_of()
    optimizer = torch.optim.SGD(second.values(), lr=0.1)

    assert [list(NAMES)] == parameter_names(optimizer, [module_of(first), module_of(second)]).groups


def test_two_models_with_different_names_name_their_parameters_together() -> None:
    first, second = params_of(names=NAMES[:2]), params_of(names=NAMES[2:])
    optimizer = torch.optim.SGD([*first.values(), *second.values()], lr=0.1)

    assert [list(NAMES)] == parameter_names(optimizer, [module_of(first), module_of(second)]).groups


@pytest.mark.parametrize(("second", "why"), [(NAMES[:1], "same name"), ((), "not all")])
def test_names_that_are_not_certain_are_left_out_and_said(second: Sequence[str], why: str) -> None:
    first, others = params_of(), params_of()
    models = [module_of(first), *([module_of({name: others[name] for name in second})] if second else [])]
    optimizer = torch.optim.SGD([*first.values(), others["a.weight"]], lr=0.1)

    names = parameter_names(optimizer, models)

    assert names.groups is None
    assert names.finding is not None and why in names.finding.message
    assert "param_names" not in named_state_dict(optimizer, models)["param_groups"][0]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("maker", MAKERS)
def test_torch_loads_what_is_saved(maker: str, named: bool) -> None:
    params = params_of(maker)
    optimizer = MAKERS[maker](params.items() if named else params.values())
    step(optimizer, params, 0)
    saved = through_torch(named_state_dict(optimizer, [module_of(params)]))
    plain = MAKERS[maker](copies(params).values())

    plain.load_state_dict(saved)

    assert same(optimizer.state_dict()["state"], plain.state_dict()["state"])


# -------------------------------------------------------------------- loading by name


@pytest.mark.parametrize("maker", MAKERS)
def test_the_next_step_after_another_order_is_the_uninterrupted_one(maker: str) -> None:
    params = params_of(maker)
    optimizer = trained(MAKERS[maker], params)
    saved = through_torch(named_state_dict(optimizer))
    other = copies(params, list(params)[::-1])
    fresh = MAKERS[maker](other.values())

    report = load_optimizer(fresh, saved, model=module_of(other))
    step(optimizer, params, 7)
    step(fresh, other, 7)

    assert ("name", 1.0, {}) == (report.matched_by, report.coverage.keys, report.overridden)
    assert set(params) == set(report.loaded)
    assert all(torch.equal(params[name], other[name]) for name in params)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_vectors_of_lbfgs_follow_the_order_of_the_parameters(reverse: bool) -> None:
    params = params_of()
    optimizer = trained(torch.optim.LBFGS, params)
    saved = through_torch(named_state_dict(optimizer))
    other = copies(params, NAMES[::-1] if reverse else NAMES)
    fresh = torch.optim.LBFGS(other.items())

    load_optimizer(fresh, saved)
    step(optimizer, params, 7)
    step(fresh, other, 7)

    # A dot product of another order rounds otherwise.
    tolerance = 1e-5 if reverse else 0.0
    assert all(torch.allclose(params[name], other[name], rtol=tolerance, atol=tolerance) for name in params)


def test_lbfgs_with_other_parameters_is_refused() -> None:
    saved = named_state_dict(trained(torch.optim.LBFGS, params_of()))
    fresh = torch.optim.LBFGS(params_of(names=NAMES[:2]).items())

    with pytest.raises(KeyMismatch, match="all its parameters together") as caught:
        load_optimizer(fresh, saved)

    assert NAMES[2:] == caught.value.unexpected


def test_lbfgs_with_no_name_in_common_gets_no_state() -> None:
    saved = named_state_dict(trained(torch.optim.LBFGS, params_of(names=["a.weight"])))
    fresh = torch.optim.LBFGS(params_of(names=["c.weight"]).items())

    report = load_optimizer(fresh, saved, allow_empty=True)

    assert ((), ("c.weight",), ("a.weight",)) == (report.loaded, report.missing, report.unexpected)
    assert not fresh.state_dict()["state"].get(0)


def test_lbfgs_by_position_with_other_sizes_is_refused() -> None:
    saved = trained(lambda params: torch.optim.LBFGS(dict(params).values()), params_of(names=NAMES[:2])).state_dict()

    with pytest.raises(SpecMismatch, match=r"expected \[12\], found \[9\]"):
        load_optimizer(torch.optim.LBFGS(params_of(names=("a.weight", "b.weight")).values()), saved)


def test_frozen_and_added_parameters_are_listed() -> None:
    saved = named_state_dict(trained(MAKERS["AdamW"], params_of(names=NAMES[:4])))
    params = params_of(names=NAMES[1:])
    fresh = MAKERS["AdamW"](params.items())

    report = load_optimizer(fresh, saved)
    step(fresh, params, 0)

    assert (NAMES[1:4], NAMES[4:], NAMES[:1]) == (report.loaded, report.missing, report.unexpected)
    assert NAMES[4:] == report.untouched
    assert 0.75 == report.coverage.keys
    assert [4.0, 4.0, 4.0, 1.0] == [float(fresh.state[param]["step"]) for param in params.values()]


def test_an_added_parameter_of_adagrad_keeps_the_state_it_starts_with() -> None:
    saved = named_state_dict(trained(MAKERS["Adagrad"], params_of(names=NAMES[:4])))
    params = params_of()
    fresh = MAKERS["Adagrad"](params.items())

    load_optimizer(fresh, saved)
    step(fresh, params, 0)

    assert [4.0, 4.0, 4.0, 4.0, 1.0] == [float(fresh.state[param]["step"]) for param in params.values()]


def test_no_name_in_common_is_refused_unless_allowed() -> None:
    saved = named_state_dict(trained(MAKERS["AdamW"], params_of(names=NAMES[:2])))
    fresh = MAKERS["AdamW"](params_of(names=NAMES[2:]).items())

    with pytest.raises(KeyMismatch, match="no parameter of the optimizer") as caught:
        load_optimizer(fresh, saved)

    assert (NAMES[2:], NAMES[:2]) == (caught.value.missing, caught.value.unexpected)
    assert 0.0 == load_optimizer(fresh, saved, allow_empty=True).coverage.keys


@pytest.mark.parametrize(
    ("there", "here"),
    [
        ("module.", ""),
        ("", "_orig_mod."),
        ("_orig_mod.module.", "module._orig_mod."),
        ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module."),
    ],
)
def test_wrappers_are_seen_through_on_both_sides(there: str, here: str) -> None:
    params = params_of()
    optimizer = MAKERS["SGD"]([(there + name, param) for name, param in params.items()])
    step(optimizer, params, 0)
    other = copies(params, NAMES[::-1])
    fresh = MAKERS["SGD"]([(here + name, param) for name, param in other.items()])

    report = load_optimizer(fresh, named_state_dict(optimizer))

    assert 1.0 == report.coverage.keys
    assert {here + name: f"{there}{name} in the source" for name in NAMES} == report.details
    assert all(
        torch.equal(optimizer.state[params[name]]["momentum_buffer"], fresh.state[other[name]]["momentum_buffer"])
        for name in NAMES
    )


def test_a_submodule_called_module_beside_its_like_is_left_alone() -> None:
    params = {"module.w": torch.nn.Parameter(torch.ones(2)), "w": torch.nn.Parameter(torch.zeros(2))}
    optimizer = trained(MAKERS["SGD"], params)
    other = copies(params, ["w", "module.w"])
    fresh = MAKERS["SGD"](other.items())

    report = load_optimizer(fresh, named_state_dict(optimizer))

    assert {} == report.details
    assert all(
        torch.equal(optimizer.state[params[name]]["momentum_buffer"], fresh.state[other[name]]["momentum_buffer"])
        for name in params
    )


def test_a_tied_parameter_is_found_by_any_of_its_names() -> None:
    saved = named_state_dict(trained(MAKERS["AdamW"], params_of(names=["c.weight"])))
    model = torch.nn.Module()
    model.a, model.c = torch.nn.Module(), torch.nn.Module()
    model.a.weight = model.c.weight = torch.nn.Parameter(torch.zeros(3, 2))

    report = load_optimizer(MAKERS["AdamW"](model.parameters()), saved, model=model)

    assert (("a.weight",), {"a.weight": "c.weight in the source"}) == (report.loaded, report.details)


@pytest.mark.parametrize("flat", [False, True])
def test_forms_of_distributed_checkpoints_are_loaded(flat: bool) -> None:
    dcp = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    params = params_of()
    optimizer = trained(MAKERS["AdamW"], params)
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
    saved = through_torch(dcp.get_optimizer_state_dict(module_of(params), optimizer, options=options))
    other = copies(params, NAMES[::-1])
    fresh = MAKERS["AdamW"](other.values())

    report = load_optimizer(fresh, saved, model=module_of(other))
    step(optimizer, params, 7)
    step(fresh, other, 7)

    assert ("name", 1.0) == (report.matched_by, report.coverage.keys)
    assert all(torch.equal(params[name], other[name]) for name in params)


def test_a_flattened_file_without_names_on_this_side_is_refused() -> None:
    saved = {"state.w.exp_avg": torch.zeros(2), "param_groups.w.lr": 0.1}

    with pytest.raises(KeyMismatch, match="no positions, only names"):
        load_optimizer(
            torch.optim.RAdam([torch.nn.Parameter(torch.zeros(2))]),
            {**saved, "param_groups.w.betas": (0, 0), "param_groups.w.eps": 0.0},
        )


# -------------------------------------------------------------------- shapes and classes


@pytest.fixture
def resized() -> Any:
    """An optimizer with state whose first and last parameter have other shapes than elsewhere here."""
    params = params_of()
    params["a.weight"] = torch.nn.Parameter(torch.zeros(2, 3))
    params["c.weight"] = torch.nn.Parameter(torch.zeros(4, 2))
    return trained(MAKERS["AdamW"], params, 1)


def test_other_shapes_are_refused_with_all_of_them_listed(resized: Any) -> None:
    saved = named_state_dict(trained(MAKERS["AdamW"], params_of()))
    before = frozen(resized)

    with pytest.raises(SpecMismatch) as caught:
        load_optimizer(resized, saved)

    assert ("a.weight.exp_avg", "[2, 3]", "[3, 2]") == (caught.value.key, caught.value.expected, caught.value.found)
    assert "c.weight.exp_avg_sq (expected [4, 2], found [3, 2])" in str(caught.value)
    assert same(before, frozen(resized))


def test_other_shapes_can_be_left_out(resized: Any) -> None:
    saved = named_state_dict(trained(MAKERS["AdamW"], params_of()))
    before = frozen(resized)

    report = load_optimizer(resized, saved, strict=False)

    assert (("a.weight", "c.weight"), ()) == (report.mismatched, report.unexpected)
    assert ("a.bias", "b.weight", "b.bias") == report.loaded
    assert same(before["state"][0], resized.state_dict()["state"][0])


def test_positions_are_taken_where_shapes_agree_and_that_is_said() -> None:
    params = params_of()
    optimizer = MAKERS["AdamW"](params.values())
    step(optimizer, params, 0)
    other = copies(params)
    fresh = MAKERS["AdamW"](other.values())

    report = load_optimizer(fresh, through_torch(optimizer.state_dict()))

    assert ("position", ["matched-by-position"]) == (report.matched_by, [each.code for each in report.findings])
    assert tuple(f"param {at}" for at in range(5)) == report.loaded
    assert same(optimizer.state_dict(), fresh.state_dict())


@pytest.mark.parametrize("maker", [maker for maker in MAKERS if maker != "SGD without momentum"])
def test_positions_of_other_shapes_are_refused_and_nothing_changes(maker: str) -> None:
    params = params_of(maker)
    optimizer = MAKERS[maker](params.values())
    step(optimizer, params, 0)
    swapped = copies(params, list(params)[::-1])
    swapped = {name: swapped[name] for name in sorted(swapped, key=lambda name: (name[0] != "b", name))}
    fresh = MAKERS[maker](swapped.values())
    step(fresh, swapped, 1)
    before, groups, objects = frozen(fresh), fresh.param_groups, [id(p) for p in fresh.param_groups[0]["params"]]

    with pytest.raises(SpecMismatch, match="order of the parameters"):
        load_optimizer(fresh, through_torch(optimizer.state_dict()))

    assert same(before, frozen(fresh))
    assert groups is fresh.param_groups and objects == [id(p) for p in fresh.param_groups[0]["params"]]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([NAMES[:3]], "5 parameters, the file 3 parameters"),
        ([NAMES[:2], NAMES[2:]], "1 group, the file 2 groups"),
    ],
)
def test_positions_of_other_groups_are_refused(groups: list[Sequence[str]], message: str) -> None:
    params = params_of()
    saved = torch.optim.SGD([{"params": [params[name] for name in names]} for names in groups], lr=0.1).state_dict()

    with pytest.raises(KeyMismatch, match=message):
        load_optimizer(torch.optim.SGD(params.values(), lr=0.1), saved)


def test_positions_of_groups_of_other_sizes_are_refused() -> None:
    params = list(params_of().values())
    saved = torch.optim.SGD([{"params": params[:2]}, {"params": params[2:]}], lr=0.1).state_dict()
    other = torch.optim.SGD([{"params": params[:3]}, {"params": params[3:]}], lr=0.1)

    with pytest.raises(KeyMismatch, match="have 3, 2 parameters, those of the file 2, 3"):
        load_optimizer(other, saved)


CLASSES = [name for name in MAKERS if name not in ("SGD without momentum", "Adam fused", "SparseAdam", "Muon")]


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("there", CLASSES)
def test_the_state_of_another_class_is_refused(there: str, recorded: bool) -> None:
    saved = named_state_dict(trained(MAKERS[there], params_of()))
    if not recorded:
        del saved["optimizer_class"]
    accepted = []
    for here in CLASSES:
        fresh = MAKERS[here](params_of().items())
        before = frozen(fresh)
        try:
            load_optimizer(fresh, saved)
            accepted.append(here)
        except SpecMismatch as error:
            assert "another class" in str(error)
            assert f"{there}-like" in str(error) or not recorded
            assert same(before, frozen(fresh))

    assert (["Adam", "AdamW"] if there in ("Adam", "AdamW") else [there]) == accepted


def test_a_refused_class_is_named_with_its_hyperparameters() -> None:
    saved = trained(MAKERS["SGD"], params_of()).state_dict()

    with pytest.raises(
        SpecMismatch, match=r"expected AdamW \(amsgrad, betas, eps\), found SGD-like \(dampening, moment"
    ):
        load_optimizer(MAKERS["AdamW"](params_of().items()), saved)


def test_adamw_for_adam_is_loaded_and_said() -> None:
    saved = named_state_dict(trained(MAKERS["AdamW"], params_of()))

    report = load_optimizer(torch.optim.Adam(params_of().items(), lr=0.1, weight_decay=0.01), saved)

    assert ["another-class", "weight-decay-differs"] == [each.code for each in report.findings]
    assert {"param_groups.0.decoupled_weight_decay": (False, True)} == report.overridden


class Lion(torch.optim.Optimizer):
    """A class that isn't torch's, with state in float32 and in 8 bits for parameters of any dtype."""

    def __init__(self, params: Any, lr: float = 0.1, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                state.setdefault("master", param.detach().float())
                state.setdefault("codes", torch.zeros(param.shape, dtype=torch.uint8))
                state.setdefault("scales", torch.zeros(7))
                state.setdefault("mode", "fast")
                state["master"].sub_(group["lr"] * param.grad.float())
                param.data.copy_(state["master"])


class Logging(torch.optim.AdamW):
    """A class of someone else's that takes torch's step in the end."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class First(torch.optim.AdamW):
    """A class that was used before AdamW itself: torch has put the inherited step into it."""

    step = torch.optim.Optimizer.profile_hook_step(torch.optim.AdamW.step)


@pytest.mark.parametrize("cls", [Logging, First])
def test_a_class_that_takes_the_step_of_torch_gets_state_that_it_takes(cls: Any) -> None:
    saved = named_state_dict(trained(MAKERS["AdamW"], params_of()))
    params = params_of(dtype=torch.bfloat16)
    fresh = cls(params.items(), lr=0.1)

    report = load_optimizer(fresh, saved)
    step(fresh, params, 7)

    assert 10 == len(report.cast)
    assert ["another-class"] == [each.code for each in report.findings]


@pytest.mark.parametrize("by_name", [False, True])
def test_state_of_a_foreign_class_keeps_dtypes_and_texts(by_name: bool) -> None:
    params = params_of(dtype=torch.bfloat16)
    optimizer = Lion(params.items() if by_name else params.values())
    step(optimizer, params, 0)
    fresh = Lion(params.items() if by_name else params.values())

    report = load_optimizer(fresh, through_torch(named_state_dict(optimizer)))

    assert () == report.cast
    assert same(optimizer.state_dict(), fresh.state_dict())


def test_positions_of_a_foreign_class_are_checked_too() -> None:
    params = params_of()
    optimizer = Lion(params.values())
    step(optimizer, params, 0)

    with pytest.raises(SpecMismatch, match=r"param 1\.master"):
        load_optimizer(Lion(copies(params, NAMES[::-1]).values()), optimizer.state_dict())


def test_a_foreign_class_refuses_the_state_of_torchs_and_the_other_way_round() -> None:
    params = params_of()
    lion = Lion(params.items())
    adam = trained(MAKERS["Adam"], params)

    with pytest.raises(SpecMismatch, match="found Adam-like"):
        load_optimizer(lion, adam.state_dict())
    with pytest.raises(SpecMismatch, match="another class"):
        load_optimizer(adam, lion.state_dict())


# -------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("maker", MAKERS)
def test_float32_state_of_half_parameters_stays_where_the_step_takes_it(maker: str, dtype: Any) -> None:
    takes = {"SGD", "SGD without momentum", "Rprop", "Adagrad", "Adadelta", "ASGD", "SparseAdam"}
    optimizer = trained(MAKERS[maker], params_of(maker))
    params = params_of(maker, dtype)
    fresh = MAKERS[maker](params.items())

    report = load_optimizer(fresh, named_state_dict(optimizer))
    tensors = [
        (name, value) for state in fresh.state.values() for name, value in state.items() if torch.is_tensor(value)
    ]
    half = {name for name, value in tensors if value.dtype == dtype}
    step(fresh, params, 7)

    assert (maker in takes) == (not half)
    assert half == {key.rpartition(".")[2] for key in report.cast}
    assert not half & {"step", "mu_product", "eta", "mu"}


LOOPS = [(name, kwargs) for name in ("SGD", "Rprop", "Adagrad", "Adadelta", "ASGD") for kwargs in ALL_LOOPS]


@pytest.mark.parametrize(("name", "kwargs"), [*LOOPS, ("SGD", {"fused": True}), ("Adagrad", {"fused": True})])
def test_a_step_over_kept_float32_state_works_in_every_implementation(name: str, kwargs: dict[str, bool]) -> None:
    settings = {"momentum": 0.9, **kwargs} if name == "SGD" else kwargs

    def maker(params: Any) -> Any:
        return getattr(torch.optim, name)(params, lr=0.1, **settings)

    optimizer = trained(maker, params_of())
    params = params_of(dtype=torch.bfloat16)
    fresh = maker(params.items())

    load_optimizer(fresh, named_state_dict(optimizer))
    step(fresh, params, 7)
    kept = {value.dtype for state in fresh.state.values() for value in state.values() if value.dim()}

    assert {torch.bfloat16 if "fused" in kwargs else torch.float32} == kept


def test_bfloat16_training_goes_on_to_the_bit() -> None:
    params = params_of(dtype=torch.bfloat16)
    optimizer = trained(MAKERS["NAdam"], params)
    other = copies(params, NAMES[::-1])
    fresh = MAKERS["NAdam"](other.items())

    report = load_optimizer(fresh, through_torch(named_state_dict(optimizer)))
    step(optimizer, params, 7)
    step(fresh, other, 7)

    assert () == report.cast
    assert all(torch.equal(params[name], other[name]) for name in params)


def test_state_of_bfloat16_widens_with_the_parameters() -> None:
    saved = named_state_dict(trained(MAKERS["AdamW"], params_of(dtype=torch.bfloat16, names=NAMES[:1])))
    fresh = MAKERS["AdamW"](params_of(names=NAMES[:1]).items())

    report = load_optimizer(fresh, saved)

    assert ("a.weight.exp_avg", "a.weight.exp_avg_sq") == report.cast
    assert "bfloat16 in the source, float32 here" == report.details["a.weight.exp_avg"]


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (torch.zeros(3, 2, dtype=torch.complex64), "expected float32, found complex64"),
        (torch.zeros(3, 2, dtype=torch.bool), "expected float32, found bool"),
        (torch.zeros(3, 2, device="meta"), "found a tensor without values"),
        (torch.zeros(3, 2).to_sparse(), "found one of layout sparse_coo"),
        ("text", r"expected \[3, 2\], found str"),
    ],
)
def test_state_that_is_no_plain_tensor_of_the_kind_is_refused(value: object, found: str) -> None:
    saved = named_state_dict(trained(MAKERS["SGD"], params_of(names=NAMES[:1])))
    saved["state"] = {0: {"momentum_buffer": value}}

    with pytest.raises(SpecMismatch, match=found):
        load_optimizer(MAKERS["SGD"](params_of(names=NAMES[:1]).items()), saved)


@pytest.mark.parametrize(
    ("name", "value"), [("d", torch.zeros(5)), ("d", [torch.zeros(27)]), ("old_dirs", None), ("ro", ["x"])]
)
def test_state_that_lbfgs_never_makes_is_refused(name: str, value: object) -> None:
    saved = named_state_dict(trained(torch.optim.LBFGS, params_of()))
    saved["state"][0][name] = value

    with pytest.raises(SpecMismatch, match=f"state.{name}"):
        load_optimizer(torch.optim.LBFGS(params_of().items()), saved)


@pytest.mark.parametrize("maker", MAKERS)
def test_loaded_tensors_share_no_memory_with_the_callers(maker: str) -> None:
    saved = named_state_dict(trained(MAKERS[maker], params_of(maker)))
    before = copy.deepcopy(saved)
    params = params_of(maker)
    fresh = MAKERS[maker](params.items())

    load_optimizer(fresh, saved)
    step(fresh, params, 7)

    assert same(before, saved)
    pointers = {tensor.untyped_storage().data_ptr() for tensor in tensors_in(saved)}
    assert not pointers & {tensor.untyped_storage().data_ptr() for tensor in tensors_in(list(fresh.state.values()))}


# -------------------------------------------------------------------- hyperparameters


def test_hyperparameters_come_from_the_file_and_are_reported() -> None:
    params = params_of()
    saved = named_state_dict(torch.optim.SGD(params.items(), lr=0.01, momentum=0.9, nesterov=True))
    saved["param_groups"][0]["layer"] = 3
    fresh = torch.optim.SGD(params.items(), lr=0.1, momentum=0.9)

    report = load_optimizer(fresh, saved)

    assert {
        "param_groups.0.lr": (0.1, 0.01),
        "param_groups.0.nesterov": (False, True),
        "param_groups.0.layer": (None, 3),
    } == report.overridden
    assert 0.01 == fresh.param_groups[0]["lr"]


def test_hyperparameters_can_be_kept() -> None:
    params = params_of()
    saved = named_state_dict(torch.optim.SGD(params.items(), lr=0.01, momentum=0.5))
    fresh = torch.optim.SGD(params.items(), lr=0.1, momentum=0.9)

    report = load_optimizer(fresh, saved, keep_hyperparameters=["lr"])

    assert {"param_groups.0.momentum": (0.9, 0.5)} == report.overridden
    assert 0.1 == fresh.param_groups[0]["lr"]


def test_regrouped_parameters_take_what_their_groups_agree_on() -> None:
    params = params_of()

    def grouped(*groups: tuple[Sequence[str], dict[str, Any]]) -> Any:
        members = [{"params": [(name, params[name]) for name in names], **settings} for names, settings in groups]
        return torch.optim.SGD(members, lr=0.1)

    saved = grouped((NAMES[:2], {"lr": 1.0, "weight_decay": 0.5}), (NAMES[2:], {"lr": 1.0, "weight_decay": 0.0}))
    fresh = grouped((NAMES[1:4], {"weight_decay": 0.25}), (NAMES[:1], {}), (NAMES[4:], {}))

    report = load_optimizer(fresh, named_state_dict(saved))

    assert [1.0, 1.0, 1.0] == [group["lr"] for group in fresh.param_groups]
    assert [0.25, 0.5, 0.0] == [group["weight_decay"] for group in fresh.param_groups]
    assert [("regrouped", ("param_groups.0.weight_decay",))] == [(each.code, each.keys) for each in report.findings]


def test_a_scheduler_goes_on() -> None:
    params = params_of()
    fresh = torch.optim.SGD(params.items(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(fresh, 1, 0.5)

    load_optimizer(fresh, named_state_dict(torch.optim.SGD(params.items(), lr=0.8)))
    step(fresh, params, 0)
    scheduler.step()

    assert (0.4, 0.1) == (fresh.param_groups[0]["lr"], fresh.param_groups[0]["initial_lr"])


def test_the_flag_of_a_gpu_is_left_off_on_the_cpu() -> None:
    params = params_of()
    saved = named_state_dict(trained(MAKERS["AdamW"], params))
    saved["param_groups"][0]["capturable"] = True
    fresh = MAKERS["AdamW"](params.items())

    report = load_optimizer(fresh, saved)
    step(fresh, params, 7)

    assert ["capturable-left-off"] == [each.code for each in report.findings]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lr", "fast", "param_groups.0.lr.*expected a number, found str"),
        ("betas", (0.9,), "param_groups.0.betas.*expected a tuple of 2"),
        ("betas", (0.9, "x"), r"param_groups\.0\.betas\.1.*expected a number, found str"),
        ("lr", True, "expected a number, found bool"),
        ("fused", torch.zeros(2), "expected True, False or None, found Tensor"),
        ("amsgrad", torch.zeros(2), "expected True, False or None, found Tensor"),
        ("amsgrad", True, r"weight\.max_exp_avg_sq.*expected \[3, 2\], found nothing"),
    ],
)
def test_values_that_the_next_step_could_not_use_are_refused(name: str, value: object, message: str) -> None:
    saved = named_state_dict(trained(MAKERS["AdamW"], params_of()))
    saved["param_groups"][0][name] = value

    with pytest.raises(SpecMismatch, match=message):
        load_optimizer(MAKERS["AdamW"](params_of().items()), saved)


# -------------------------------------------------------------------- old and odd files


@pytest.mark.parametrize(
    "maker", ["Adam", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "Rprop", "ASGD", "Adamax"]
)
def test_old_files_with_plain_numbers_and_fewer_keys_are_loaded(maker: str) -> None:
    params = params_of()
    optimizer = MAKERS[maker](params.items()) if maker != "Adam" else torch.optim.Adam(params.items(), lr=0.1)
    for seed in range(2):
        step(optimizer, params, seed)
    saved = through_torch(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = int(state["step"])
    for key in ("amsgrad", "foreach", "maximize", "capturable", "differentiable", "fused", "decoupled_weight_decay"):
        saved["param_groups"][0].pop(key, None)
    other = copies(params)
    fresh = MAKERS[maker](other.items()) if maker != "Adam" else torch.optim.Adam(other.items(), lr=0.1)

    load_optimizer(fresh, saved)
    step(optimizer, params, 7)
    step(fresh, other, 7)

    assert all(torch.equal(params[name], other[name]) for name in params)


@pytest.mark.parametrize(
    "saved",
    [
        {},
        [],
        {"state": {}},
        {"state": {}, "param_groups": None},
        {"state": [], "param_groups": []},
        {"state": {}, "param_groups": [3]},
        {"state": {}, "param_groups": [{"lr": 1}]},
        {"state": {}, "param_groups": [{"params": [None]}]},
        {"state": {0: 3}, "param_groups": [{"params": [0]}]},
        {"weight": 3},
    ],
)
def test_what_is_no_state_dict_is_refused(saved: Any) -> None:
    with pytest.raises(SpecMismatch, match="no state dict of an optimizer"):
        load_optimizer(torch.optim.SGD(params_of().items(), lr=0.1), saved, source="x.pth")


def test_names_that_are_not_parallel_or_not_distinct_are_no_names() -> None:
    params = params_of()
    saved = torch.optim.SGD(params.values(), lr=0.1).state_dict()
    for names in (["a"], ["a"] * 5, "abcde", [1, 2, 3, 4, 5]):
        saved["param_groups"][0]["param_names"] = names

        assert "position" == load_optimizer(torch.optim.SGD(params.items(), lr=0.1), saved).matched_by


def test_state_of_no_parameter_is_listed_or_carried_over() -> None:
    saved = named_state_dict(trained(MAKERS["SGD"], params_of()))
    saved["state"] = {**saved["state"], 17: {"momentum_buffer": None}, "global": 3}
    fresh = MAKERS["SGD"](params_of().items())

    report = load_optimizer(fresh, saved)

    assert ("state.17",) == report.unexpected
    assert 3 == fresh.state["global"]


def test_a_state_of_lists_too_deep_is_refused() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    saved = named_state_dict(trained(MAKERS["SGD"], params_of()))
    saved["state"] = {0: {"history": deep}}
    fresh = MAKERS["SGD"](params_of().items())

    with pytest.raises(Unsupported, match="too deep"):
        load_optimizer(fresh, saved)


# -------------------------------------------------------------------- hooks and failures


def test_hooks_run_once_and_have_the_last_word() -> None:
    saved = named_state_dict(trained(MAKERS["SGD"], params_of()))
    fresh = MAKERS["SGD"](params_of(dtype=torch.bfloat16).items())
    calls = []

    def before(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        calls.append("before")
        state["state"][0]["momentum_buffer"] = torch.ones(3, 2, dtype=torch.float32)
        return state

    def after(optimizer: Any) -> None:
        buffers = [state["momentum_buffer"] for state in optimizer.state.values()]
        calls.append([buffer.dtype for buffer in buffers])
        buffers[1].fill_(5.0)

    fresh.register_load_state_dict_pre_hook(before)
    fresh.register_load_state_dict_post_hook(after)
    load_optimizer(fresh, saved)
    first, second, *_ = (state["momentum_buffer"] for state in fresh.state.values())

    assert ["before", [torch.bfloat16] + [torch.float32] * 4] == calls
    assert (1.0, 5.0) == (float(first.mean()), float(second.mean()))


def test_nothing_of_ours_is_left_among_the_hooks() -> None:
    fresh = MAKERS["SGD"](params_of().items())

    load_optimizer(fresh, named_state_dict(trained(MAKERS["SGD"], params_of())))

    assert not fresh._optimizer_load_state_dict_pre_hooks and not fresh._optimizer_load_state_dict_post_hooks


@pytest.mark.parametrize("error", [ValueError("no"), KeyError("no"), RuntimeError("no")])
@pytest.mark.parametrize("where", ["pre", "post"])
def test_a_failure_in_a_hook_leaves_the_optimizer_as_it_was(where: str, error: Exception) -> None:
    params = params_of()
    fresh = trained(MAKERS["AdamW"], params, 1)
    before, state, groups, group = frozen(fresh), fresh.state, fresh.param_groups, fresh.param_groups[0]

    def fail(optimizer: Any, *_: Any) -> None:
        optimizer.param_groups[0]["lr"] = 99.0
        optimizer.state.clear()
        raise error

    getattr(fresh, f"register_load_state_dict_{where}_hook")(fail)
    with pytest.raises(Unsupported, match=f"load_state_dict failed with {type(error).__name__}") as caught:
        load_optimizer(fresh, named_state_dict(trained(MAKERS["AdamW"], params_of())), source="x.pth")

    assert caught.value.__cause__ is error and str(caught.value).startswith("x.pth: ")
    assert same(before, frozen(fresh))
    assert state is fresh.state and groups is fresh.param_groups and group is fresh.param_groups[0]
    assert all(own is param for own, param in zip(group["params"], params.values()))


def test_an_interrupt_leaves_the_optimizer_as_it_was() -> None:
    fresh = trained(MAKERS["AdamW"], params_of(), 1)
    before = frozen(fresh)

    def interrupt(_: Any) -> None:
        raise KeyboardInterrupt

    fresh.register_load_state_dict_post_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_optimizer(fresh, named_state_dict(trained(MAKERS["AdamW"], params_of())))

    assert same(before, frozen(fresh))


# -------------------------------------------------------------------- any order, any groups


@st.composite
def groupings(draw: st.DrawFn) -> list[list[str]]:
    """Some of the names, in any order, in any groups."""
    order = draw(st.permutations(NAMES))
    chosen = order[: draw(st.integers(1, len(NAMES)))]
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(chosen) - 1)), max_size=3)))
    parts = [list(chosen[low:high]) for low, high in zip([0, *cuts], [*cuts, len(chosen)])]
    return [part for part in parts if part]


@given(there=groupings(), here=groupings())
def test_state_follows_its_parameter_through_any_order_and_groups(
    there: list[list[str]], here: list[list[str]]
) -> None:
    params, other = params_of(), params_of()
    optimizer = MAKERS["AdamW"]([{"params": [(name, params[name]) for name in names]} for names in there])
    step(optimizer, params, 0)
    fresh = MAKERS["AdamW"]([{"params": [(name, other[name]) for name in names]} for names in here])
    saved = {name for names in there for name in names}
    wanted = {name for names in here for name in names}

    report = load_optimizer(fresh, named_state_dict(optimizer), allow_empty=True)

    assert (saved & wanted, wanted - saved, saved - wanted) == (
        set(report.loaded),
        set(report.missing),
        set(report.unexpected),
    )
    assert all(same(optimizer.state[params[name]], fresh.state[other[name]]) for name in saved & wanted)
    assert not any(other[name] in fresh.state for name in wanted - saved)


@given(order=st.permutations(NAMES))
def test_positions_never_take_state_of_another_shape(order: list[str]) -> None:
    params = params_of()
    optimizer = MAKERS["SGD"](params.values())
    step(optimizer, params, 0)
    other = copies(params, order)
    fresh = MAKERS["SGD"](other.values())
    fits = [SHAPES[name] for name in order] == list(SHAPES.values())

    try:
        load_optimizer(fresh, optimizer.state_dict())
        loaded = True
    except StateDictError:
        loaded = False

    assert fits == loaded
    assert loaded == bool(fresh.state)

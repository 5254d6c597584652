"""The file that people publish: the weights of a training checkpoint alone, as torch and the safetensors library read them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import statedict
from statedict import KeyMismatch, KeyNotFound, rules
from statedict.cli import main

torch = pytest.importorskip("torch")

from safetensors.torch import load_file  # noqa: E402
from saved_values import facts, saved  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present  # noqa: E402
from torch.optim.swa_utils import AveragedModel  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*(TypedStorage is deprecated|quantiz|CUDA|torch.jit).*")

State = dict[str, Any]


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    net.train()(torch.randn(8, 3))
    return net


def optimizer_of(net: nn.Module) -> Any:
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.randn(8, 3)).sum().backward()
    optimizer.step()
    return optimizer


def behind(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def trained(net: nn.Module, weights: str, state: State) -> State:
    """A training checkpoint with the state dict under that key."""
    optimizer = optimizer_of(copy.deepcopy(net))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    return {
        "epoch": 3,
        weights: state,
        "optimizer_state_dict": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "rng_state": torch.get_rng_state(),
        "best_loss": torch.tensor(0.5),
        "args": {"lr": 0.1},
    }


def published(value: object, folder: Path, **options: Any) -> State:
    """What the safetensors library reads of what was published."""
    source = saved(value, folder / "run.pth")
    statedict.convert(source, folder / "weights.safetensors", weights_only=True, overwrite=True, **options)
    return load_file(folder / "weights.safetensors")


def same(expected: State, found: State) -> bool:
    values = {name: value.detach() for name, value in expected.items()}
    return values.keys() == found.keys() and all(torch.equal(values[name], found[name]) for name in values)


@pytest.mark.parametrize(
    "weights", ["model_state_dict", "state_dict", "model", "module", "net", "params", "netG", "my_own_name"]
)
def test_only_the_weights_are_left_whatever_they_are_called(weights: str, tmp_path: Path) -> None:
    net = network()
    found = published(trained(net, weights, net.state_dict()), tmp_path)

    assert same(net.state_dict(), found)


WRAPPED: dict[str, Callable[[nn.Module], State]] = {
    "plain": lambda net: net.state_dict(),
    "DataParallel": lambda net: nn.DataParallel(net).state_dict(),
    "compiled": lambda net: torch.compile(net).state_dict(),
    "compiled DataParallel": lambda net: torch.compile(nn.DataParallel(net)).state_dict(),
    "DataParallel of compiled": lambda net: nn.DataParallel(torch.compile(net)).state_dict(),
    "a dict of its own": lambda net: behind("module.", dict(net.state_dict())),
    "parameters": lambda net: behind("module.", {**net.state_dict(keep_vars=True)}),
    "AveragedModel": lambda net: AveragedModel(net).state_dict(),
    "checkpointed layer": lambda net: {
        (f"0._checkpoint_wrapped_module.{name[2:]}" if name.startswith("0.") else name): value
        for name, value in net.state_dict().items()
    },
}


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("alone", [False, True])
def test_wrappers_leave_no_trace(wrapper: str, alone: bool, tmp_path: Path) -> None:
    net = network()
    state = WRAPPED[wrapper](net)
    found = published(state if alone else trained(net, "model", state), tmp_path)

    assert same(net.state_dict(), found)
    net.load_state_dict(found)


def test_a_published_pth_has_the_metadata_that_torch_would_have_left(tmp_path: Path) -> None:
    net = network()
    source = saved(trained(net, "model", nn.DataParallel(net).state_dict()), tmp_path / "run.pth")
    statedict.convert(source, tmp_path / "weights.pth", weights_only=True)
    expected = nn.DataParallel(net).state_dict()
    consume_prefix_in_state_dict_if_present(expected, "module.")
    found = torch.load(tmp_path / "weights.pth", weights_only=True)

    assert facts(expected) == facts(found)
    assert isinstance(found, OrderedDict)


def test_a_module_that_is_really_called_module_stays(tmp_path: Path) -> None:
    state = {"encoder.module.weight": torch.ones(2), "head.weight": torch.ones(3)}

    assert same(state, published({"model": state, "epoch": 1}, tmp_path))


def test_a_prefix_that_not_all_keys_have_stays(tmp_path: Path) -> None:
    state = {"module.a": torch.ones(2), "b": torch.ones(3)}

    assert same(state, published(state, tmp_path))


def test_the_name_of_the_model_in_a_lightning_module_goes(tmp_path: Path) -> None:
    net = network()
    state = behind("model.", net.state_dict())
    run = {"pytorch-lightning_version": "2.5.0", "global_step": 1, "state_dict": state, "loops": {"fit_loop": {}}}

    assert same(net.state_dict(), published(run, tmp_path))
    del run["pytorch-lightning_version"]
    assert same(state, published(run, tmp_path))


def test_a_whole_model_is_published_as_its_state_dict(tmp_path: Path) -> None:
    net = network()

    assert same(net.state_dict(), published({"model": net, "ema": None, "optimizer": None, "epoch": -1}, tmp_path))


def test_parameters_become_plain_tensors_of_the_cpu(tmp_path: Path) -> None:
    source = saved({"model": {"w": nn.Parameter(torch.ones(2))}, "step": 1}, tmp_path / "run.pth")
    statedict.convert(source, tmp_path / "weights.pth", weights_only=True)
    found = torch.load(tmp_path / "weights.pth", weights_only=True)["w"]

    assert (torch.Tensor, False) == (type(found), found.requires_grad)


def test_a_nested_state_dict_becomes_flat(tmp_path: Path) -> None:
    state = {"encoder": {"w": torch.ones(2), "b": torch.ones(1)}, "decoder": {"w": torch.zeros(2)}}
    found = published({"params": state, "step": 1}, tmp_path)

    assert ["decoder.w", "encoder.b", "encoder.w"] == sorted(found)


def test_two_tensors_that_would_get_one_key_are_refused(tmp_path: Path) -> None:
    source = saved({"model": {"a.b": torch.ones(2), "a": {"b": torch.ones(1)}}, "epoch": 1}, tmp_path / "run.pth")

    with pytest.raises(KeyMismatch, match=r"run\.pth: two tensors would have one key.*'a\.b'"):
        statedict.convert(source, tmp_path / "weights.pth", weights_only=True)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    weight = torch.randn(4, 3)
    state = {"module.embed.weight": weight, "module.head.weight": weight}
    source = saved({"model": state, "optimizer": {"state": {}, "param_groups": []}}, tmp_path / "run.pth")
    statedict.convert(source, tmp_path / "weights.pth", weights_only=True)
    found = torch.load(tmp_path / "weights.pth", weights_only=True)

    assert found["embed.weight"].data_ptr() == found["head.weight"].data_ptr()


def test_what_is_left_out_is_named_with_its_size(tmp_path: Path) -> None:
    net = network()
    run = trained(net, "model", {**net.state_dict(), "_extra_state": {"version": 2}})
    source = saved(run, tmp_path / "run.pth")
    result = statedict.convert(source, tmp_path / "weights.safetensors", weights_only=True)
    left = {each.key: (each.tensors, each.nbytes) for each in result.left_out}
    state = run["optimizer_state_dict"]["state"]
    moments = [tensor for each in state.values() for tensor in each.values()]

    assert (len(moments), sum(tensor.nbytes for tensor in moments)) == left["optimizer_state_dict"]
    assert {*run} - {"model"} == {*left} - {"model._extra_state.version"}
    assert "model" == result.weights
    assert "optimizer_state_dict" in str(result)


def test_a_plain_state_dict_is_published_as_it_is(tmp_path: Path) -> None:
    net = network()
    source = saved(net.state_dict(), tmp_path / "model.pth")
    result = statedict.convert(source, tmp_path / "weights.pth", weights_only=True)

    assert ("", ()) == (result.weights, tuple(result.left_out))
    assert facts(net.state_dict()) == facts(torch.load(tmp_path / "weights.pth", weights_only=True))


# ---------------------------------------------------------------- several models, or none


@pytest.mark.parametrize("plain", [False, True])
def test_several_models_are_listed_and_none_is_guessed(
    plain: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = network().state_dict(), network(1).state_dict()
    run = {"generator": dict(a) if plain else a, "discriminator": dict(b) if plain else b, "epoch": 1}
    source = saved(run, tmp_path / "gan.pth")
    code = main(["convert", str(source), str(tmp_path / "w.safetensors"), "--weights-only"])
    said = capsys.readouterr().err

    assert (2, 1) == (code, len(said.splitlines()))
    assert "'generator' (9 tensors, 176 B), 'discriminator' (9 tensors, 176 B)" in said
    assert "--at generator" in said
    assert ["gan.pth"] == [path.name for path in tmp_path.iterdir()]
    assert same(b, published(run, tmp_path, at="discriminator"))


def test_a_known_name_does_not_win_over_a_second_model(tmp_path: Path) -> None:
    run = {"model": network().state_dict(), "teacher": network(1).state_dict()}

    with pytest.raises(KeyMismatch, match=r"'model'.*'teacher'"):
        published(run, tmp_path)


def test_a_few_numbers_beside_the_model_are_no_second_model(tmp_path: Path) -> None:
    state = {"w": torch.randn(100, 10), "b": torch.ones(3)}
    found = published({"model": state, "normalizer": {"mean": torch.ones(3), "std": torch.ones(3)}}, tmp_path)

    assert same(state, found)


@pytest.mark.parametrize("value", [{"epoch": 3, "lr": 0.1}, {"step": torch.tensor(1.0), "rng": {"cpu": [1, 2]}}])
def test_a_file_without_weights_says_what_there_is(value: object, tmp_path: Path) -> None:
    with pytest.raises((KeyNotFound, KeyMismatch), match=r"run\.pth: it holds no weights that stand alone"):
        published(value, tmp_path)


def test_an_optimizer_alone_holds_no_weights(tmp_path: Path) -> None:
    with pytest.raises(KeyNotFound, match=r"no weights.*'state', 'param_groups'"):
        published(optimizer_of(network()).state_dict(), tmp_path)


# ---------------------------------------------------------------- averages


def averaged(net: nn.Module) -> nn.Module:
    """A network of the same kind with other numbers."""
    other = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    return other


def only_parameters(net: nn.Module) -> State:
    return {name: value.detach() for name, value in net.named_parameters()}


def overlaid(net: nn.Module, average: nn.Module) -> State:
    """What a model is with the averages of its parameters in their places: its buffers are its own."""
    return {**net.state_dict(), **only_parameters(average)}


Layout = Callable[[nn.Module, nn.Module], State]

WHOLE: dict[str, Layout] = {
    "ema": lambda net, ema: {"model": net.state_dict(), "ema": ema.state_dict()},
    "model_ema": lambda net, ema: {"model": net.state_dict(), "model_ema": ema.state_dict()},
    "timm": lambda net, ema: {"state_dict": net.state_dict(), "state_dict_ema": ema.state_dict(), "arch": "x"},
    "DDP": lambda net, ema: {"state_dict": net.state_dict(), "state_dict_ema": behind("module.", ema.state_dict())},
    "BasicSR": lambda net, ema: {"params": net.state_dict(), "params_ema": ema.state_dict()},
    "AveragedModel": lambda net, ema: {"model": net.state_dict(), "swa": AveragedModel(ema).state_dict()},
    "whole models": lambda net, ema: {"model": net, "ema": ema, "updates": 3},
    "nested": lambda net, ema: {"model": net.state_dict(), "ema": {"decay": 0.9, "module": ema.state_dict()}},
    "Lightning averages": lambda net, ema: {
        "state_dict": ema.state_dict(),
        "current_model_state": net.state_dict(),
        "averaging_state": {"n_averaged": torch.tensor(3)},
    },
    "GAN": lambda net, ema: {"g": net.state_dict(), "d": network(7).state_dict(), "g_ema": ema.state_dict()},
}
PARTIAL: dict[str, Layout] = {
    "by name": lambda net, ema: {"model": net.state_dict(), "ema": only_parameters(ema)},
    "shadow": lambda net, ema: {"model": net.state_dict(), "ema": {"decay": 0.9, "shadow": only_parameters(ema)}},
    "torch_ema": lambda net, ema: {
        "model": net.state_dict(),
        "ema": {"num_updates": 2, "shadow_params": [p.detach() for p in ema.parameters()], "collected_params": None},
    },
    "optimizer.ema": lambda net, ema: {
        "state_dict": net.state_dict(),
        "optimizer_states": [
            {"opt": optimizer_of(net).state_dict(), "ema": tuple(p.detach() for p in ema.parameters())}
        ],
    },
    "Lightning callback": lambda net, ema: {
        "pytorch-lightning_version": "2.0",
        "state_dict": behind("model.", net.state_dict()),
        "callbacks": {"EMACallback": {"ema_state_dict": behind("model.", only_parameters(ema))}},
    },
}


@pytest.mark.parametrize("layout", [*WHOLE, *PARTIAL])
def test_averages_are_found_and_take_the_place_of_the_weights(layout: str, tmp_path: Path) -> None:
    net = network()
    ema = averaged(net)
    run = {**(WHOLE | PARTIAL)[layout](net, ema), "optimizer": optimizer_of(copy.deepcopy(net)).state_dict()}
    expected = ema.state_dict() if layout in WHOLE else overlaid(net, ema)

    assert same(expected, published(run, tmp_path, ema=True))
    if layout != "GAN":
        assert same(net.state_dict(), published(run, tmp_path))


def test_without_being_asked_for_averages_are_mentioned(tmp_path: Path) -> None:
    net = network()
    source = saved({"model": net.state_dict(), "ema": averaged(net).state_dict()}, tmp_path / "run.pth")
    result = statedict.convert(source, tmp_path / "w.safetensors", weights_only=True)

    assert ["averages-left-out"] == [finding.code for finding in result.findings]
    assert "under 'ema'" in result.findings[0].message


def test_taken_averages_are_said_with_what_has_none(tmp_path: Path) -> None:
    net = network()
    source = saved(PARTIAL["by name"](net, averaged(net)), tmp_path / "run.pth")
    result = statedict.convert(source, tmp_path / "w.safetensors", ema=True)

    assert ["averages-taken"] == [finding.code for finding in result.findings]
    assert ("1.running_mean", "1.running_var", "1.num_batches_tracked") == result.findings[0].keys


def latent_diffusion(net: nn.Module, ema: nn.Module) -> State:
    """Averages among the weights themselves, whose names have lost their dots."""
    names = behind("diffusion_model.", only_parameters(ema))
    return {
        **behind("model.diffusion_model.", net.state_dict()),
        **behind("first_stage_model.", network(3).state_dict()),
        "model_ema.decay": torch.tensor(0.9),
        "model_ema.num_updates": torch.tensor(3),
        **{f"model_ema.{name.replace('.', '')}": value for name, value in names.items()},
    }


def test_averages_whose_names_have_lost_their_dots_are_told_by_all_of_them(tmp_path: Path) -> None:
    net = network()
    ema = averaged(net)
    run = {"state_dict": latent_diffusion(net, ema), "global_step": 5}
    without = {name: value for name, value in run["state_dict"].items() if not name.startswith("model_ema.")}
    expected = {**without, **behind("model.diffusion_model.", only_parameters(ema))}

    assert same(expected, published(run, tmp_path, ema=True))
    assert same(without, published(run, tmp_path))


def test_names_without_dots_that_could_be_two_weights_are_no_averages(tmp_path: Path) -> None:
    state = {
        "model.a.b1": torch.ones(2),
        "model.a.b.1": torch.ones(2),
        "model_ema.ab1": torch.zeros(2),
    }

    assert same(state, published({"state_dict": state, "epoch": 1}, tmp_path))


@pytest.mark.parametrize("wrong", ["fewer", "other shapes"])
def test_a_list_of_averages_must_fit_the_parameters_one_to_one(wrong: str, tmp_path: Path) -> None:
    net = network()
    tensors = [parameter.detach() for parameter in net.parameters()]
    tensors = tensors[:-1] if wrong == "fewer" else [tensors[1], tensors[0], *tensors[2:]]
    run = {"model": net.state_dict(), "ema": {"shadow_params": tensors}}

    with pytest.raises(KeyMismatch, match=r"'ema\.shadow_params' have no names.*expected 6 parameters"):
        published(run, tmp_path, ema=True)


def test_without_averages_the_error_lists_what_there_is(tmp_path: Path) -> None:
    net = network()

    with pytest.raises(KeyNotFound, match=r"no averaged weights.*'epoch', 'model'"):
        published({"epoch": 1, "model": net.state_dict()}, tmp_path, ema=True)


def test_adams_averages_of_gradients_are_no_averages_of_weights(tmp_path: Path) -> None:
    net = network()
    moments = {"exp_avg": only_parameters(net), "exp_avg_sq": only_parameters(net)}

    with pytest.raises(KeyNotFound, match=r"no averaged weights"):
        published({"model": net.state_dict(), "moments": moments}, tmp_path, ema=True)


def test_averages_alone_are_taken_and_said(tmp_path: Path) -> None:
    net = network()

    assert same(net.state_dict(), published({"ema": net.state_dict(), "step": 3}, tmp_path))


# ---------------------------------------------------------------- with rules


def test_rules_see_the_published_names(tmp_path: Path) -> None:
    net = network()
    run = trained(net, "model", nn.DataParallel(net).state_dict())
    found = published(run, tmp_path, rules=[rules.drop("1.*"), rules.add_prefix("net.")])
    expected = behind("net.", {name: value for name, value in net.state_dict().items() if not name.startswith("1.")})

    assert same(expected, found)


def test_a_wrapper_that_a_rule_takes_away_is_left_to_the_rule(tmp_path: Path) -> None:
    net = network()
    run = trained(net, "model", nn.DataParallel(net).state_dict())

    assert same(net.state_dict(), published(run, tmp_path, rules=[rules.strip_prefix("module.")]))
    assert same(behind("module.", net.state_dict()), published(run, tmp_path, rules=[rules.add_prefix("module.")]))


@pytest.mark.parametrize(
    "rule", [rules.rename(r"^module\.(.*)", r"\1"), rules.strip_wrapper("module"), rules.drop("module.1.*")]
)
def test_rules_that_name_a_wrapper_find_it(rule: rules.Rule, tmp_path: Path) -> None:
    net = network()
    run = trained(net, "model", nn.DataParallel(net).state_dict())

    assert {rule.renamed(name) for name in run["model"]} - {None} == {*published(run, tmp_path, rules=rule)}


def test_weights_without_elements_are_warned_about(tmp_path: Path) -> None:
    source = saved({"module": {"a.weight": torch.ones(0), "b": torch.ones(2)}, "epoch": 1}, tmp_path / "run.pth")
    result = statedict.convert(source, tmp_path / "w.pth", weights_only=True)

    assert [("empty-weights", ("a.weight",))] == [(finding.code, finding.keys) for finding in result.findings]


def test_arrays_of_numpy_become_tensors(tmp_path: Path) -> None:
    import numpy

    source = saved({"model": {"w": numpy.ones((2, 3), "f4")}, "step": numpy.int64(3)}, tmp_path / "run.pth")
    statedict.convert(source, tmp_path / "w.pth", weights_only=True)

    assert torch.equal(torch.ones(2, 3), torch.load(tmp_path / "w.pth", weights_only=True)["w"])


def test_many_names_that_look_like_averages_take_no_time_to_speak_of(tmp_path: Path) -> None:
    state = {f"ema{at}.w{at}": torch.ones(1) for at in range(3000)}
    deep = {f"{'module.' * 3000}w": torch.ones(1)}

    assert 3000 == len(published({"model": state, "step": 1}, tmp_path))
    assert [f"{'module.' * 2992}w"] == [*published({"model": deep, "step": 1}, tmp_path)]

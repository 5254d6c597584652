"""States of optimizers and schedulers against live ones and against each other: what torch would load without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import statedict
from statedict import KeyMismatch

torch = pytest.importorskip("torch")
nn, optim = torch.nn, torch.optim


def net() -> Any:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))


def state(make: Any, module: Any = None) -> Any:
    """The state dict of an optimizer after a step."""
    module = module or net()
    optimizer = make(module)
    module(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def adam(module: Any, **options: Any) -> Any:
    return optim.Adam(module.parameters(), **{"lr": 0.1, **options})


def named(module: Any) -> Any:
    return optim.Adam(module.named_parameters(), lr=0.1)


def found(source: Any, target: Any) -> dict[str, Any]:
    return {finding.code: finding for finding in statedict.diagnose(source, target).findings}


def test_the_state_of_the_same_optimizer_is_fine() -> None:
    result = statedict.diagnose(state(named), named(net()))

    assert result and () == result.findings and "Adam" == result.target
    assert "statedict.diagnosis/1" == result.to_dict()["schema"]


def test_nothing_of_the_optimizer_changes_and_no_file_is_left_open(tmp_path: Path) -> None:
    torch.save(state(adam), tmp_path / "opt.pth")
    optimizer = adam(net(), lr=0.5)
    statedict.diagnose(tmp_path / "opt.pth", optimizer)

    assert 0.5 == optimizer.param_groups[0]["lr"] and not optimizer.state


def test_parameters_without_names_can_only_be_told_by_position() -> None:
    assert "info" == found(state(adam), adam(net()))["optimizer-by-position"].level


# -------------------------------------------------------------------- groups (I1)


@pytest.mark.parametrize("live", [True, False])
def test_another_size_of_a_group_says_which_slots_are_too_many_by_their_shapes(live: bool) -> None:
    target = adam(net()[1:]) if live else state(lambda module: adam(module[1:]))
    result = found(state(adam), target)

    assert "group 0 has 6 parameters in the file and 4 in the optimizer" in result["optimizer-group-size"].message
    assert ("parameter 0", "parameter 1") == result["optimizer-extra-slots"].keys


def test_a_frozen_layer_in_the_middle_is_found_by_the_order_of_shapes() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2))
    optimizer = adam(nn.Sequential(nn.Linear(3, 4), nn.Linear(5, 2)))

    assert ("parameter 2", "parameter 3") == found(state(adam, module), optimizer)["optimizer-extra-slots"].keys


def test_where_neighbours_have_the_same_shape_it_is_said_that_it_is_not_sure() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))

    assert "may be" in found(state(adam, module), adam(module[:1]))["optimizer-extra-slots"].message


def test_parameters_that_are_new_are_named() -> None:
    module = net()
    less = optim.Adam(list(module.named_parameters())[:-2], lr=0.1)
    result = found(state(lambda _: less, module), named(net()))

    assert ("2.weight", "2.bias") == result["optimizer-extra-slots"].keys
    assert "load_into(optimizer, file, model=model)" in result["optimizer-group-size"].message


def test_another_number_of_groups() -> None:
    module = net()
    two = optim.Adam([{"params": module[0].parameters()}, {"params": module[1:].parameters()}], lr=0.1)

    assert "the file has 1 parameter group" in found(state(adam), two)["optimizer-groups"].message


# -------------------------------------------------------------------- order (I2)


def test_names_in_another_order_are_an_error_that_torch_does_not_see() -> None:
    module = net()
    turned = optim.Adam(list(module.named_parameters())[::-1], lr=0.1)
    result = found(state(named), turned)
    turned.load_state_dict(state(named))

    assert 6 == len(result["optimizer-order"].keys)


def test_two_layers_of_one_shape_exchanged_are_seen_by_their_names() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    saved = state(named, module)
    turned = optim.Adam([*module[1].named_parameters(prefix="1"), *module[0].named_parameters(prefix="0")], lr=0.1)

    assert {"optimizer-order"} == set(found(saved, turned))


def test_shapes_in_another_order_are_seen_without_names() -> None:
    result = found(state(adam), optim.Adam(list(net().parameters())[::-1], lr=0.1))

    assert "the reverse one" in result["optimizer-order"].message


def test_other_parameters_of_as_many() -> None:
    other = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 2))

    assert "other parameters" in found(state(adam), adam(other))["optimizer-order"].message


# -------------------------------------------------------------------- class and flags (I3, I4)


@pytest.mark.parametrize(
    ("theirs", "ours", "level"),
    [
        (adam, lambda module: optim.SGD(module.parameters(), lr=0.1, momentum=0.9), "error"),
        (lambda module: optim.SGD(module.parameters(), lr=0.1, momentum=0.9), adam, "error"),
        (adam, lambda module: optim.RMSprop(module.parameters(), lr=0.1), "error"),
        (lambda module: optim.Adagrad(module.parameters()), adam, "error"),
        (adam, lambda module: optim.AdamW(module.parameters(), lr=0.1), "warning"),
    ],
)
def test_the_state_of_another_class(theirs: Any, ours: Any, level: str) -> None:
    assert level == found(state(theirs), ours(net()))["optimizer-other-class"].level


def test_what_torch_would_lose_is_said() -> None:
    message = found(state(lambda module: optim.SGD(module.parameters(), lr=0.1)), adam(net()))[
        "optimizer-other-class"
    ].message

    assert "which would lose amsgrad, betas, eps" in message


def test_a_capturable_state_for_parameters_on_the_cpu() -> None:
    saved = state(adam)
    saved["param_groups"][0]["capturable"] = True

    assert "warning" == found(saved, adam(net()))["optimizer-flags"].level


def test_counters_that_were_saved_on_a_device_of_a_group_that_is_not_capturable(tmp_path: Path) -> None:
    saved = state(adam)
    torch.save(saved, tmp_path / "x.pth", _use_new_zipfile_serialization=False)  # which has no check sums
    data = (tmp_path / "x.pth").read_bytes().replace(b"cpu", b"mps")
    (tmp_path / "y.pth").write_bytes(data)

    assert "were saved on mps" in found(tmp_path / "y.pth", adam(net()))["optimizer-flags"].message


def test_flags_and_hyperparameters_that_the_file_changes() -> None:
    result = found(state(adam), adam(net(), lr=0.5, fused=True, betas=(0.8, 0.9)))

    assert ("param_groups.0.fused",) == result["optimizer-flags"].keys
    assert ("param_groups.0.lr", "param_groups.0.betas") == result["optimizer-overrides"].keys
    assert "lr 0.5 → 0.1" in result["optimizer-overrides"].message


def test_state_that_its_own_class_can_not_use() -> None:
    saved = state(adam)
    del saved["state"][0]["exp_avg_sq"]

    assert "exp_avg_sq" in found(saved, adam(net()))["optimizer-state"].message


# -------------------------------------------------------------------- schedulers (I5)


def step(lr: float = 0.1, size: int = 3) -> Any:
    return optim.lr_scheduler.StepLR(optim.SGD(net().parameters(), lr=lr), size)


def cosine(lr: float = 0.1) -> Any:
    return optim.lr_scheduler.CosineAnnealingLR(optim.SGD(net().parameters(), lr=lr), 10)


@pytest.mark.parametrize("live", [True, False])
def test_the_state_of_another_scheduler_and_its_learning_rates(live: bool) -> None:
    target = cosine(0.5) if live else cosine(0.5).state_dict()
    result = found(step().state_dict(), target)

    assert ("gamma", "step_size") == result["scheduler-other-class"].keys
    assert (
        "StepLR" in result["scheduler-other-class"].message
        and "CosineAnnealingLR" in result["scheduler-other-class"].message
    )
    assert "[0.1]" in result["scheduler-base-lrs"].message


def test_arguments_that_were_changed_for_this_run() -> None:
    result = found(step().state_dict(), step(size=5))

    assert "step_size 5 → 3" in result["scheduler-overrides"].message


@pytest.mark.parametrize(
    "make",
    [
        step,
        cosine,
        lambda: optim.lr_scheduler.OneCycleLR(optim.SGD(net().parameters(), lr=0.1), 1.0, total_steps=5),
        lambda: optim.lr_scheduler.ReduceLROnPlateau(optim.SGD(net().parameters(), lr=0.1)),
        lambda: optim.lr_scheduler.LambdaLR(optim.SGD(net().parameters(), lr=0.1), lambda epoch: 1.0),
    ],
)
def test_the_same_scheduler_further_on_is_fine(make: Any) -> None:
    scheduler = make()
    scheduler.optimizer.step()
    scheduler.step(*([1.0] if isinstance(scheduler, optim.lr_scheduler.ReduceLROnPlateau) else []))

    assert {} == found(scheduler.state_dict(), make())


def test_another_number_of_groups_of_a_scheduler() -> None:
    module = net()
    two = optim.SGD([{"params": module[0].parameters()}, {"params": module[1:].parameters()}], lr=0.1)

    assert "error" == found(step().state_dict(), optim.lr_scheduler.StepLR(two, 3))["scheduler-groups"].level


# -------------------------------------------------------------------- where it stands


def test_the_state_is_found_in_a_training_checkpoint(tmp_path: Path) -> None:
    parts = {"epoch": 3, "model": net().state_dict(), "optimizer": state(adam), "scheduler": step().state_dict()}
    torch.save(parts, tmp_path / "run.pth")

    assert "optimizer-overrides" in found(tmp_path / "run.pth", adam(net(), lr=0.5))
    assert "scheduler-other-class" in found(tmp_path / "run.pth", cosine())


@pytest.mark.parametrize(("parts", "words"), [({"a": 1}, "no state"), ({"g": state(adam), "d": state(adam)}, "at='g'")])
def test_none_or_several_are_an_error(parts: Any, words: str, tmp_path: Path) -> None:
    torch.save(parts, tmp_path / "x.pth")
    with pytest.raises(KeyMismatch, match=words):
        statedict.diagnose(tmp_path / "x.pth", adam(net()))


@pytest.mark.parametrize(
    "hostile", [{"param_groups": 3, "state": 5}, {"param_groups": [{"params": "ab"}], "state": {}}]
)
def test_what_is_no_state_after_all_is_an_error_of_ours(hostile: Any) -> None:
    with pytest.raises(statedict.StateDictError):
        statedict.diagnose(hostile, adam(net()))

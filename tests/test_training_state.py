"""What a training state captures, and how it brings it back: all that fits or nothing, chance last."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest

torch = pytest.importorskip("torch")

from torch.utils.data import DataLoader, TensorDataset  # noqa: E402
from torch.utils.data.distributed import DistributedSampler  # noqa: E402

from statedict import rules  # noqa: E402
from statedict.checkpoint import of_memory  # noqa: E402
from statedict.doors import TrainingState  # noqa: E402
from statedict.errors import CorruptFile, KeyMismatch, SpecMismatch, StateDictError, UnsafeContent  # noqa: E402
from statedict.runs import TrainingRun  # noqa: E402
from statedict.runs.pieces import Captured  # noqa: E402


def carry(folder: Path, saved: Any, into: Any, **options: Any) -> Any:
    """Save one state, and restore it into another."""
    with TrainingRun(folder) as run:
        run.save(7, saved)
        return run.restore(into, **options)


def linear(seed: int = 0, width: int = 3) -> Any:
    torch.manual_seed(seed)
    return torch.nn.Linear(4, width)


def data(samples: int = 10, **options: Any) -> Any:
    return DataLoader(TensorDataset(torch.arange(samples)), 2, **options)


def step(model: Any, optimizer: Any) -> None:
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()


# -------------------------------------------------------------------- values


def test_components_are_attributes_and_values_can_be_set() -> None:
    model = linear()
    state = TrainingState(model=model, best=1.5)
    state.best = 0.5
    state.epoch = 3

    assert (model, 0.5, 3, 0) == (state.model, state.best, state.epoch, state.step)


@pytest.mark.parametrize("name", ["epcoh", "model"])
def test_what_is_no_value_of_the_state_cannot_be_set(name: str) -> None:
    state = TrainingState(model=linear())
    with pytest.raises(AttributeError, match=name):
        setattr(state, name, 3)


@pytest.mark.parametrize("name", ["capture", "_hidden", "a.b", "rng_"])
def test_names_that_mean_something_else_are_refused(name: str) -> None:
    if name == "rng_":
        with pytest.raises(StateDictError, match="random generators"):
            TrainingState(rng=("dice",))
        return
    with pytest.raises(StateDictError, match="can't be called so"):
        TrainingState(**{name: 1})


def test_values_keep_their_types_and_nest(tmp_path: Path) -> None:
    value = {
        "none": None,
        "list": [1, 2.5, "x", None, [True]],
        "bytes": torch.arange(5, dtype=torch.uint8),
        3: (float("inf"), {"a"}),
        "array": numpy.arange(3, dtype="int16"),
        "big": 2**200,
    }
    fresh = TrainingState(value={})
    carry(tmp_path / "run", TrainingState(value=value), fresh)
    found = fresh.value

    assert torch.equal(value.pop("bytes"), found.pop("bytes"))  # type: ignore[arg-type]
    assert value.pop("array").tolist() == found.pop("array").tolist()  # type: ignore[union-attr, attr-defined]
    assert value == found


def test_lists_dicts_and_tensors_stay_the_same_objects(tmp_path: Path) -> None:
    history, table, tensor = ["old"], {"old": 1}, torch.zeros(3)
    saved = TrainingState(history=[1, 2], table={"new": 2}, tensor=torch.ones(3))
    carry(tmp_path / "run", saved, TrainingState(history=history, table=table, tensor=tensor))

    assert ([1, 2], {"new": 2}, [1.0, 1.0, 1.0]) == (history, table, tensor.tolist())


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecMismatch, match=r"\[3\]"):
        carry(tmp_path / "run", TrainingState(value=torch.ones(3)), TrainingState(value=torch.ones(4)))


class Stranger:
    pass


@pytest.mark.parametrize(
    ("value", "key"),
    [(Stranger(), "thing"), ({"a": [Stranger()]}, "thing.a.0"), ([linear()], "thing.0"), (lambda: 0, "thing")],
)
def test_what_only_code_could_bring_back_is_refused_by_key(value: Any, key: str) -> None:
    with pytest.raises(UnsafeContent, match=f"'{key}'"):
        TrainingState(thing=value).capture()


# -------------------------------------------------------------------- chance

GENERATORS: dict[str, tuple[Callable[[int], Any], Callable[[Any], Any]]] = {
    "PCG64": (numpy.random.default_rng, lambda g: g.random()),
    "Philox": (lambda seed: numpy.random.Generator(numpy.random.Philox(seed)), lambda g: g.normal()),
    "SFC64": (lambda seed: numpy.random.Generator(numpy.random.SFC64(seed)), lambda g: g.integers(10**9)),
    "MT19937": (lambda seed: numpy.random.Generator(numpy.random.MT19937(seed)), lambda g: g.random()),
    "bits": (numpy.random.PCG64DXSM, lambda g: int(g.random_raw())),
    "RandomState": (numpy.random.RandomState, lambda g: g.normal()),
    "Random": (random.Random, lambda g: g.gauss(0, 1)),
    "torch": (lambda seed: torch.Generator().manual_seed(seed), lambda g: torch.rand((), generator=g).item()),
}


@pytest.mark.parametrize(("make", "draw"), GENERATORS.values(), ids=list(GENERATORS))
def test_a_generator_goes_on_where_it_was(tmp_path: Path, make: Any, draw: Any) -> None:
    saved, fresh = make(1), make(2)
    draw(saved)
    carry(tmp_path / "run", TrainingState(dice=saved), TrainingState(dice=fresh))

    assert [draw(saved) for _ in range(5)] == [draw(fresh) for _ in range(5)]


def test_the_state_of_another_kind_of_generator_is_refused(tmp_path: Path) -> None:
    saved = TrainingState(dice=numpy.random.Generator(numpy.random.Philox(1)))
    with pytest.raises(CorruptFile, match="dice"):
        carry(tmp_path / "run", saved, TrainingState(dice=numpy.random.default_rng(1)))


def draw() -> tuple[float, ...]:
    return random.gauss(0, 1), numpy.random.normal(), torch.rand(()).item()


def test_the_generators_of_the_process_go_on_where_they_were(tmp_path: Path) -> None:
    draw()
    with TrainingRun(tmp_path / "run") as run:
        run.save(1, TrainingState())
        expected = [draw(), draw()]
        run.restore(TrainingState())

        assert expected == [draw(), draw()]


def test_generators_that_are_not_asked_for_stay_as_they_are(tmp_path: Path) -> None:
    with TrainingRun(tmp_path / "run") as run:
        run.save(1, TrainingState())
        first = draw()
        run.restore(TrainingState(rng=("torch",)))
        second = draw()

        assert first[2] == second[2]
        assert first[:2] != second[:2]


def test_the_simple_pair_brings_random_states_back_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from statedict.torch.chapter import load_training_state, save_training_state

    model = linear()
    save_training_state(model, None, 1, 0.5, tmp_path / "run.pth", rng=True)
    expected = [draw(), draw()]
    load_training_state(model, None, tmp_path / "run.pth")

    assert expected == [draw(), draw()]
    assert "restored the random states of python, numpy, torch" in capsys.readouterr().out
    assert {"python", "numpy", "torch"} == set(torch.load(tmp_path / "run.pth", weights_only=True)["rng_states"])


def test_a_keyword_of_the_caller_that_is_called_rng_is_kept(tmp_path: Path) -> None:
    from statedict.torch.chapter import load_training_state, save_training_state

    save_training_state(linear(), None, 1, 0.5, tmp_path / "run.pth", rng=[1, 2], rng_states="mine")
    found = load_training_state(linear(), None, tmp_path / "run.pth")

    assert ([1, 2], "mine") == (found["rng"], found["rng_states"])


# -------------------------------------------------------------------- all or nothing


class Refusing:
    """Loads nothing."""

    def state_dict(self) -> dict[str, Any]:
        return {"a": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise ValueError("not today")


class Counter:
    """Has a number."""

    def __init__(self, count: int) -> None:
        self.count = count

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def test_nothing_has_changed_where_one_component_refuses(tmp_path: Path) -> None:
    counter, model = Counter(2), linear(2)
    before = model.weight.clone()
    saved = TrainingState(counter=Counter(1), other=Refusing(), model=linear(1))
    chance = torch.get_rng_state()
    with pytest.raises(StateDictError, match="not today"):
        carry(tmp_path / "run", saved, TrainingState(counter=counter, other=Refusing(), model=model))

    assert 2 == counter.count
    assert torch.equal(before, model.weight)
    assert torch.equal(chance, torch.get_rng_state())


def test_nothing_has_changed_where_a_model_does_not_fit(tmp_path: Path) -> None:
    counter, values = Counter(2), [0]
    saved = TrainingState(counter=Counter(1), values=[1], model=linear())
    with pytest.raises(SpecMismatch):
        carry(tmp_path / "run", saved, TrainingState(counter=counter, values=values, model=linear(width=5)))

    assert (2, [0]) == (counter.count, values)


def test_a_component_that_the_step_lacks_is_an_error_that_says_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(KeyMismatch, match=r"nothing for ema.*only=\['epoch', 'step', 'model'\]"):
        carry(tmp_path / "run", TrainingState(model=linear()), TrainingState(model=linear(), ema=linear()))


def test_a_component_that_only_the_step_has_is_a_difference(tmp_path: Path) -> None:
    found = carry(tmp_path / "run", TrainingState(model=linear(), note="x"), TrainingState(model=linear()))

    assert ["note"] == [each.name for each in found.differences]


def test_a_part_can_be_restored_alone(tmp_path: Path) -> None:
    saved, model = linear(1), linear(2)
    fresh = TrainingState(model=model, note="mine")
    chance = torch.get_rng_state()
    found = carry(tmp_path / "run", TrainingState(model=saved, note="theirs", epoch=4), fresh, only=["model"])

    assert torch.equal(saved.weight, model.weight)
    assert ("mine", 0, ["model"]) == (fresh.note, fresh.epoch, list(found.report))
    assert torch.equal(chance, torch.get_rng_state())


GARBAGE: list[Any] = [None, 5, "x", [], [1], {}, {"a": 1}, {"position": 1}, torch.ones(2), numpy.ones(2)]
POSITIONS: list[Any] = [1, {}, {"epoch": 0, "batches": "x", "start": {}}, {"epoch": 0, "batches": 1, "start": {"a": 1}}]


def full_state() -> Any:
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    return TrainingState(
        model=model,
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.StepLR(optimizer, 3),
        loader=data(shuffle=True, generator=torch.Generator()),
        sampler=torch.utils.data.RandomSampler(range(5), generator=torch.Generator()),
        dice=numpy.random.default_rng(1),
        coin=torch.Generator(),
        value=torch.zeros(3),
        buffers="all",
    )


def replaced(state: Any, name: str, value: Any) -> Captured:
    live = state.capture()
    return Captured({**live.pieces, name: of_memory(value)}, {**live.facts, "environment": [1], "kinds": 3})


@pytest.mark.parametrize("name", [*full_state().capture().pieces, "model.gradients"])
def test_a_step_that_holds_something_else_is_an_error_of_ours_or_loads(tmp_path: Path, name: str) -> None:
    state = full_state()
    values = list(GARBAGE)
    if name == "loader":
        whole = state.loader.state()
        values += [{**whole, "position": position} for position in POSITIONS]
        values += [{**whole, "generators": [5]}, {**whole, "epochs": 5}, {**whole, "facts": {}}]
    if name == "rng":
        values += [{kind: item} for kind in ("python", "numpy", "torch", "cuda", "dice") for item in GARBAGE]
    if name == "dice":
        values += [{"type": "Generator", "state": item} for item in GARBAGE]
    with TrainingRun(tmp_path / "run") as run:
        for step, value in enumerate(values):
            run.write(step, replaced(state, name, value))
            with contextlib.suppress(StateDictError):
                run.restore(state, step=step)

        assert len(values) == len(run.steps())


# -------------------------------------------------------------------- modules and optimizers


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_a_wrapped_model_has_the_names_of_the_bare_one(tmp_path: Path, wrap: Any) -> None:
    saved, model = linear(1), linear(2)
    carry(tmp_path / "run", TrainingState(model=wrap(saved)), TrainingState(model=model))

    assert torch.equal(saved.weight, model.weight)


def test_a_changed_model_is_restored_by_rules(tmp_path: Path) -> None:
    saved = linear(1)
    model = torch.nn.Sequential(linear(2))
    state = TrainingState(model=model)
    carry(tmp_path / "run", TrainingState(model=saved), state, only=["model"], rules=[rules.add_prefix("0.")])

    assert torch.equal(saved.weight, model[0].weight)


def test_an_optimizer_is_restored_by_the_names_of_its_parameters(tmp_path: Path) -> None:
    saved, model = linear(1), linear(2)
    one = torch.optim.AdamW([saved.weight, saved.bias])
    other = torch.optim.AdamW([model.bias, model.weight])
    step(saved, one)
    carry(tmp_path / "run", TrainingState(model=saved, optimizer=one), TrainingState(model=model, optimizer=other))

    assert torch.equal(one.state[saved.bias]["exp_avg"], other.state[model.bias]["exp_avg"])


def test_hyperparameters_of_the_file_are_reported_or_kept(tmp_path: Path) -> None:
    def make(lr: float) -> tuple[Any, Any, Any]:
        model = linear()
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=lr)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5)
        return optimizer, schedule, TrainingState(model=model, optimizer=optimizer, schedule=schedule)

    (_, _, saved), (kept, schedule, state) = make(0.5), make(0.25)
    found = carry(tmp_path / "run", saved, state, keep_hyperparameters=("lr",))

    assert [("optimizer.param_groups.0.momentum", 0.5, 0.25)] == [tuple(each) for each in found.differences]
    assert (0.25, 0.25, [0.25]) == (
        kept.param_groups[0]["lr"],
        kept.param_groups[0]["initial_lr"],
        schedule.base_lrs,
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, 10),
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.1, 0.2),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o),
        lambda o: torch.optim.swa_utils.SWALR(o, 0.1),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o, [torch.optim.lr_scheduler.ConstantLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], [2]
        ),
    ],
    ids=["lambda", "one cycle", "cyclic", "plateau", "swa", "sequential"],
)
def test_schedulers_go_on_where_they_were(tmp_path: Path, make: Any) -> None:
    def begin() -> tuple[Any, Any, Any]:
        model = linear()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        schedule = make(optimizer)
        return optimizer, schedule, TrainingState(model=model, optimizer=optimizer, schedule=schedule)

    def advance(optimizer: Any, schedule: Any) -> float:
        optimizer.step()
        plateau = isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau)
        schedule.step(1.0) if plateau else schedule.step()
        rate: float = optimizer.param_groups[0]["lr"]
        return rate

    (optimizer, schedule, saved), (other, second, fresh) = begin(), begin()
    for _ in range(3):
        advance(optimizer, schedule)
    carry(tmp_path / "run", saved, fresh)

    assert [advance(optimizer, schedule) for _ in range(6)] == [advance(other, second) for _ in range(6)]


# -------------------------------------------------------------------- gradients


@pytest.mark.parametrize(("gradients", "expected"), [("unused", False), ("all", True), ("none", False)])
def test_gradients_that_a_step_has_used_are_left_out(gradients: str, expected: bool) -> None:
    model = linear()
    optimizer = torch.optim.SGD(model.parameters())
    state = TrainingState(model=model, optimizer=optimizer, gradients=gradients)
    step(model, optimizer)

    assert expected == ("model.gradients" in state.capture().pieces)


def test_gradients_that_were_added_to_since_are_captured() -> None:
    model = linear()
    optimizer = torch.optim.SGD(model.parameters())
    state = TrainingState(model=model, optimizer=optimizer)
    step(model, optimizer)
    model(torch.ones(1, 4)).sum().backward()

    assert model.weight.grad.tolist() == state.capture().pieces["model.gradients"]["weight"].numpy().tolist()


def test_gradients_that_the_step_does_not_hold_become_none(tmp_path: Path) -> None:
    model = linear()
    model(torch.ones(1, 4)).sum().backward()
    carry(tmp_path / "run", TrainingState(model=linear()), TrainingState(model=model))

    assert model.weight.grad is None


# -------------------------------------------------------------------- copies and tearing


def test_a_capture_does_not_change_with_the_model() -> None:
    model = linear()
    captured = TrainingState(model=model, values=[1]).capture()
    before = model.weight.tolist()
    with torch.no_grad():
        model.weight.add_(1)

    assert before == captured.pieces["model"]["weight"].numpy().tolist()


def test_an_async_save_holds_what_there_was_when_it_was_asked_for(tmp_path: Path) -> None:
    model = linear()
    state = TrainingState(model=model)
    expected = []
    with TrainingRun(tmp_path / "run") as run:
        for number in range(4):
            expected.append(model.weight.tolist())
            run.save(number, state, wait=False)
            with torch.no_grad():
                model.weight.add_(1)
    with TrainingRun(tmp_path / "run") as run:
        found = []
        for number in range(4):
            run.restore(state, step=number)
            found.append(model.weight.tolist())

    assert expected == found


def test_the_memory_of_a_capture_is_used_again_once_it_is_gone() -> None:
    state = TrainingState(model=linear())
    first = state.capture()
    place = first.pieces["model"]["weight"].entry.view.storage.data.obj
    second = state.capture()

    assert second.pieces["model"]["weight"].entry.view.storage.data.obj is not place

    place = second.pieces["model"]["weight"].entry.view.storage.data.obj
    del first, second

    assert place is state.capture().pieces["model"]["weight"].entry.view.storage.data.obj


def test_of_a_large_storage_only_what_is_seen_is_copied_and_ties_stay() -> None:
    whole = torch.arange(1000.0)
    value = {"a": whole[10:20], "b": whole[15:18], "c": whole[10:20], "t": torch.ones(2, 3).t()}
    piece = TrainingState(value=value).capture().pieces["value"]

    assert {name: tensor.tolist() for name, tensor in value.items()} == {k: piece[k].numpy().tolist() for k in piece}
    assert ("c",) == piece["a"].tied_with


def test_a_step_that_did_not_end_cannot_be_captured() -> None:
    model = linear()
    optimizer = torch.optim.SGD(model.parameters())
    state = TrainingState(model=model, optimizer=optimizer)

    def fail() -> float:
        raise OverflowError("half way")

    with pytest.raises(OverflowError):
        optimizer.step(fail)
    with pytest.raises(StateDictError, match="has not ended"):
        state.capture()
    step(model, optimizer)

    assert "model" in state.capture().pieces


@pytest.mark.parametrize("by", ["hooks", "updating"])
def test_a_capture_of_another_thread_waits_for_the_end_of_a_step(by: str) -> None:
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    state = TrainingState(model=model, optimizer=optimizer)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(state.capture()))

    def closure() -> float:
        thread.start()
        thread.join(0.05)
        model.bias.grad = torch.ones(3)

        assert [] == found
        return 0.0

    if by == "hooks":
        optimizer.step(closure)
    else:
        with state.updating():
            closure()
            with torch.no_grad():
                model.bias.sub_(1)
    thread.join()

    assert model.bias.tolist() == found[0].pieces["model"]["bias"].numpy().tolist()


def test_the_hooks_end_with_the_state() -> None:
    model = linear()
    optimizer = torch.optim.SGD(model.parameters())
    state = TrainingState(model=model, optimizer=optimizer)
    hooks = len(optimizer._optimizer_step_post_hooks)
    del state

    assert (1, 0) == (hooks, len(optimizer._optimizer_step_post_hooks))


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_cuda
def test_a_model_on_a_gpu_is_copied_to_pinned_memory_and_comes_back(tmp_path: Path) -> None:
    saved, model = linear(1).cuda(), linear(2).cuda()
    optimizer, other = (torch.optim.AdamW(each.parameters()) for each in (saved, model))
    saved(torch.ones(2, 4, device="cuda")).sum().backward()
    optimizer.step()
    state = TrainingState(model=saved, optimizer=optimizer)
    captured = state.capture()

    assert saved.weight.tolist() == captured.pieces["model"]["weight"].numpy().tolist()

    carry(tmp_path / "run", state, TrainingState(model=model, optimizer=other))

    assert torch.equal(saved.weight, model.weight)
    assert torch.equal(optimizer.state[saved.bias]["exp_avg"], other.state[model.bias]["exp_avg"])


@needs_cuda
def test_the_generators_of_gpus_go_on_where_they_were(tmp_path: Path) -> None:
    torch.rand(3, device="cuda")
    with TrainingRun(tmp_path / "run") as run:
        run.save(1, TrainingState())
        expected = torch.rand(3, device="cuda").tolist()
        run.restore(TrainingState())

    assert expected == torch.rand(3, device="cuda").tolist()


# -------------------------------------------------------------------- data


def test_the_batches_consumed_are_those_that_were_handed_out() -> None:
    state = TrainingState(loader=data(num_workers=2))
    batches = iter(state.loader)
    found = [state.loader.consumed]
    for _ in range(2):
        next(batches)
        found.append(state.loader.consumed)
    for _ in batches:
        pass

    assert [0, 1, 2, 0] == [*found, state.loader.consumed]
    assert 5 == len(state.loader)


def test_an_epoch_that_is_over_by_the_state_is_not_gone_on_with(tmp_path: Path) -> None:
    saved, fresh = TrainingState(loader=data()), TrainingState(loader=data())
    next(iter(saved.loader))
    saved.epoch = 1
    carry(tmp_path / "run", saved, fresh)

    assert 5 == len(list(fresh.loader))


def test_other_data_than_at_the_time_is_a_difference_or_an_error(tmp_path: Path) -> None:
    saved, fresh = TrainingState(loader=data()), TrainingState(loader=data(samples=4))
    batches = iter(saved.loader)
    for _ in range(4):
        next(batches)
    found = carry(tmp_path / "run", saved, fresh)

    assert [("loader.samples", 10, 4)] == [tuple(each) for each in found.differences]
    with pytest.raises(StateDictError, match="the data end before"):
        list(fresh.loader)


class Stream(torch.utils.data.IterableDataset):  # type: ignore[misc]
    def __iter__(self) -> Any:
        return iter(range(20))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_is_gone_on_with_behind_the_batches_consumed(tmp_path: Path, workers: int) -> None:
    saved, fresh = (TrainingState(loader=DataLoader(Stream(), 4, num_workers=workers)) for _ in range(2))
    batches = iter(saved.loader)
    for _ in range(3):
        next(batches)
    carry(tmp_path / "run", saved, fresh)

    assert [[12, 13, 14, 15], [16, 17, 18, 19]] == [batch.tolist() for batch in fresh.loader]


def test_workers_that_persist_are_a_difference(tmp_path: Path) -> None:
    states = [TrainingState(loader=data(num_workers=1, persistent_workers=True)) for _ in range(2)]
    next(iter(states[0].loader))
    found = carry(tmp_path / "run", *states)

    assert ["loader.persistent_workers"] == [each.name for each in found.differences]


def test_a_distributed_sampler_has_its_epoch_back(tmp_path: Path) -> None:
    def make() -> Any:
        return DistributedSampler(TensorDataset(torch.arange(10)), num_replicas=2, rank=0)

    saved, fresh = make(), make()
    loaders = [DataLoader(TensorDataset(torch.arange(10)), sampler=make()) for _ in range(2)]
    saved.set_epoch(3)
    loaders[0].sampler.set_epoch(5)
    states = [TrainingState(sampler=s, loader=d) for s, d in zip((saved, fresh), loaders, strict=True)]
    carry(tmp_path / "run", *states)

    assert (3, 5) == (fresh.epoch, loaders[1].sampler.epoch)


# -------------------------------------------------------------------- the environment


def test_another_environment_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with TrainingRun(tmp_path / "run") as run:
        run.save(1, TrainingState())
        monkeypatch.setenv("WORLD_SIZE", "4")
        restored = run.restore(TrainingState())

    assert restored is not None
    assert [("world_size", 1, 4)] == [tuple(each) for each in restored.differences]
    assert "world_size: 1 in the step, 4 here" == str(restored.differences[0])


def test_the_facts_of_a_step_are_progress_and_environment() -> None:
    state = TrainingState(model=linear(), loader=data(), epoch=2)
    next(iter(state.loader))
    facts: Any = state.capture().facts

    assert {"epoch": 2, "step": 0, "batches": {"loader": 1}} == facts["progress"]
    assert {"epoch": "value", "step": "value", "model": "module", "loader": "loader"} == facts["kinds"]
    assert str(torch.__version__) == facts["environment"]["torch"]

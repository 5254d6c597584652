"""A ``DataLoader`` that can go on in the middle of an epoch: the random states at the epoch's start, and the batches consumed since.

    epoch's start                          batch k                                            end
    │ states of the sampler's generators   │ consumed counts what was handed out: batches      │
    │ and of Python, numpy, torch's CPU    │ that workers have prepared ahead don't count      │

On resume the generators get the states of the epoch's start, the same iterator is made again and its first k batches are skipped; then
all generators get the states of the moment that was captured. Without workers the indices alone are skipped, since all randomness of
the data comes from generators that are restored; with workers the batches are made again and dropped, so that each worker is where it was.
A loader that keeps its own state, as torchdata's StatefulDataLoader does, is asked for that in the place of the epoch's start.

Workers that persist over epochs have random states that can't be asked for: that they are others is said as a difference. torchdata's
loader makes no batch again, so neither have its workers the states that they had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from statedict.errors import CorruptFile, StateDictError
from statedict.torch.training.environment import Difference, compare
from statedict.torch.training.rng import attempt, check_states, set_states, source_of, states

__all__ = ["ResumableLoader"]

# The generators of the process that a sampler or the loader itself may draw from.
_DRAWN = ("python", "numpy", "torch")


class ResumableLoader:
    """A ``DataLoader`` to be iterated in its place; everything else is asked of the loader itself.

    ``consumed`` are the batches of the current epoch that were handed out. An epoch that was left with ``break`` goes on where it
    was left, if it is saved and resumed, unless ``end_epoch`` is called or the epoch that the training state counts is another by then.
    """

    def __init__(self, loader: DataLoader[Any], epoch: Callable[[], object]) -> None:
        self.loader = loader
        self._epoch = epoch
        self._keeps_state = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        self._current: _Batches | None = None
        self._pending: Mapping[str, Any] | None = None  # where to go on, once it is iterated
        self._after: Mapping[str, Any] = {}  # what the generators of the process get then

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Any]:
        """The batches of an epoch; those of the one that was resumed from where it was saved."""
        pending, self._pending = self._pending, None
        if pending is not None and pending["epoch"] != self._epoch():
            pending = None
        self._current = _Batches(self, pending, self._after)
        return self._current

    @property
    def consumed(self) -> int:
        """The batches of the current epoch that were handed out; 0 between two epochs."""
        position = self.position()
        return 0 if position is None else int(position["batches"])

    def end_epoch(self) -> None:
        """Say that the epoch is over, after a ``break``: what is saved from now on begins the next one."""
        self._current = self._pending = None

    def position(self) -> Mapping[str, Any] | None:
        """The place in the epoch: its number, the batches consumed, the states at its start. None between two epochs."""
        current = self._current
        if self._pending is not None or current is None:
            return self._pending
        if current.is_over or current.epoch != self._epoch():
            return None
        start = {"state": self.loader.state_dict()} if self._keeps_state else {"start": current.start}  # type: ignore[attr-defined]
        return {"epoch": current.epoch, "batches": current.consumed, **start}

    # ---------------------------------------------------------------- captured and restored

    @property
    def generators(self) -> list[torch.Generator]:
        """The generators that the loader and its samplers draw from, each once."""
        owners = [self.loader, *self._samplers()]
        found = [getattr(owner, "generator", None) for owner in owners]
        return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())

    def _samplers(self) -> list[Any]:
        batches = getattr(self.loader, "batch_sampler", None)
        found = [getattr(self.loader, "sampler", None), batches, getattr(batches, "sampler", None)]
        return list({id(each): each for each in found if each is not None}.values())

    def states(self) -> list[Any]:
        """The states of the generators now."""
        return [source_of(generator).get() for generator in self.generators]

    def state(self) -> dict[str, object]:
        """Everything that the following batches depend on."""
        epochs = [getattr(sampler, "epoch", None) for sampler in self._samplers()]
        return {"position": self.position(), "generators": self.states(), "epochs": epochs, "facts": self._facts()}

    def _facts(self) -> dict[str, object]:
        dataset: Any = self.loader.dataset
        sized = hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset)
        return {
            "samples": len(dataset) if sized else None,
            "batch_size": self.loader.batch_size,
            "drop_last": self.loader.drop_last,
            "workers": self.loader.num_workers,
            "sampler": type(self.loader.sampler).__name__,
        }

    def check(self, value: object, key: str) -> list[Difference]:
        """Try everything that needs trying; gives what is another with this loader. Raises ``CorruptFile`` or ``StateDictError``."""
        generators = self.generators
        found: Any = value if isinstance(value, Mapping) else {}
        saved, facts = found.get("generators"), found.get("facts")
        if not isinstance(saved, list) or not isinstance(found.get("epochs"), list) or not isinstance(facts, Mapping):
            raise CorruptFile("this is no state of a DataLoader", key=key)
        if len(saved) != len(generators):
            what = "the DataLoader draws from another number of generators than when the step was saved"
            hint = "Give it the generator= that it had, or leave it out with only="
            raise StateDictError(what, key=key, expected=len(saved), found=len(generators), hint=hint)
        for generator, state in zip(generators, saved):
            attempt(source_of(generator).trial, state, f"{key}.generators")
        if found.get("position") is not None:
            _check_position(found["position"], generators, key, keeps_state=self._keeps_state)
        differences = compare(facts, self._facts())
        if found.get("position") is not None and getattr(self.loader, "persistent_workers", False):
            differences.append(Difference("persistent_workers", "random states of their own", "those of new workers"))
        return [each._replace(name=f"{key}.{each.name}") for each in differences]

    def restore(self, value: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        """Take over a state that was checked. ``after`` are the states of the process's generators at the moment of the capture."""
        self._current = None
        self._pending = value.get("position")
        self._after = after
        for generator, state in zip(self.generators, value["generators"]):
            attempt(source_of(generator).set, state, "loader.generators")
        for sampler, epoch in zip(self._samplers(), value["epochs"]):
            if epoch is not None and hasattr(sampler, "epoch"):
                sampler.epoch = epoch


def _check_position(position: Any, generators: list[torch.Generator], key: str, *, keeps_state: bool) -> None:
    if keeps_state and isinstance(position, Mapping) and isinstance(position.get("state"), Mapping):
        return  # what is in it, only the loader knows
    start = position.get("start") if isinstance(position, Mapping) else None
    process = start.get("process") if isinstance(start, Mapping) else None
    of_samplers = start.get("generators") if isinstance(start, Mapping) else None
    is_counted = isinstance(position, Mapping) and type(position.get("batches")) is int and "epoch" in position
    if not is_counted or not isinstance(process, Mapping) or not isinstance(of_samplers, list):
        raise CorruptFile("this is no place in an epoch of a DataLoader", key=f"{key}.position")
    check_states(process, f"{key}.position")
    for generator, state in zip(generators, of_samplers):
        attempt(source_of(generator).trial, state, f"{key}.position")


class _Batches:
    """The batches of one epoch, from its beginning or from a position in it."""

    def __init__(self, owner: ResumableLoader, position: Mapping[str, Any] | None, after: Mapping[str, Any]) -> None:
        self.epoch = owner._epoch()
        self.consumed = 0
        self.is_over = False
        self.start: Mapping[str, Any] = {"process": states(_DRAWN), "generators": owner.states()}
        if position is None:
            self._batches = iter(owner.loader)
            return
        # What is drawn from now on was drawn at the epoch's start; what was drawn between then and the capture comes back behind it.
        now = {"process": {**self.start["process"], **after}, "generators": self.start["generators"]}
        if "state" in position:
            owner.loader.load_state_dict(position["state"])  # type: ignore[attr-defined]
            self._batches = iter(owner.loader)
            self.consumed = position["batches"]
        else:
            self.start = position["start"]
            _set(owner, self.start)
            self._batches = iter(owner.loader)
            self._skip(owner.loader, position["batches"])
        _set(owner, now)

    def _skip(self, loader: DataLoader[Any], batches: int) -> None:
        # Without workers the iterator makes a batch of the indices that it has just drawn (torch/utils/data/dataloader.py,
        # _BaseDataLoaderIter._next_index): drawing them is enough.
        draw = getattr(self._batches, "_next_index", None)
        is_plain = loader.num_workers == 0 and not isinstance(loader.dataset, IterableDataset)
        skip = draw if is_plain and draw is not None else self._batches.__next__
        try:
            for _ in range(batches):
                skip()
                self.consumed += 1
        except StopIteration:
            what = "the data end before the place where the step was saved"
            raise StateDictError(what, expected=f"{batches} batches", found=self.consumed) from None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            batch = next(self._batches)
        except StopIteration:
            self.is_over = True
            raise
        self.consumed += 1
        return batch

    def __len__(self) -> int:
        return len(self._batches)


def _set(owner: ResumableLoader, values: Mapping[str, Any]) -> None:
    set_states(values["process"])
    for generator, state in zip(owner.generators, values["generators"]):
        attempt(source_of(generator).set, state, "loader.generators")

"""States of random generators as plain values: Python's, numpy's, torch's of the CPU and of every device, and those that a user names.

    python   {"version": 3, "words": uint32 [625], "gauss": a number or None}     ``random.getstate`` (CPython, ``Lib/random.py``)
    numpy    what ``get_state(legacy=False)`` gives: {"bit_generator", "state": {"key": uint32 [624], "pos"}, "has_gauss", "gauss"}
    torch    uint8 [5056], the Mersenne twister of the CPU          ``torch.get_rng_state``
    cuda     a list, for each device uint8 [16]: seed and offset    ``torch.cuda.get_rng_state_all``; xpu alike, mps one tensor

A state is tried on a generator that nobody uses before any that somebody uses gets one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from statedict.errors import CorruptFile, StateDictError, one_line

__all__ = [
    "KINDS",
    "Source",
    "attempt",
    "check_states",
    "is_generator",
    "plain_states",
    "set_states",
    "source_of",
    "states",
]

# The generators of the process, in the order in which they are restored.
KINDS = ("python", "numpy", "torch", "cuda", "mps", "xpu")
# What setting a state raises that isn't one.
_UNFIT = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class Source(NamedTuple):
    """Where a state comes from and goes to; ``trial`` sets it on a generator of its own, and raises where that doesn't go."""

    get: Callable[[], Any]
    set: Callable[[Any], None]
    trial: Callable[[Any], None]


# -------------------------------------------------------------------- Python


def _of_python(state: Any) -> dict[str, object]:
    version, words, gauss = state
    return {"version": version, "words": np.array(words, np.uint32), "gauss": gauss}


def _to_python(value: Any) -> Any:
    words = tuple([int(word) for word in np.asarray(value["words"]).astype(np.uint32)])
    return int(value["version"]), words, value["gauss"]


def _python(generator: random.Random | None) -> Source:
    get, put = (random.getstate, random.setstate) if generator is None else (generator.getstate, generator.setstate)
    return Source(
        lambda: _of_python(get()),
        lambda value: put(_to_python(value)),
        lambda value: random.Random().setstate(_to_python(value)),
    )


# -------------------------------------------------------------------- numpy


def _owned(value: Any) -> Any:
    """The state with arrays of its own; tensors as arrays."""
    if isinstance(value, Mapping):
        return {str(key): _owned(item) for key, item in value.items()}
    if isinstance(value, torch.Tensor):
        return value.cpu().numpy().copy()
    return value.copy() if isinstance(value, np.ndarray) else value


def _legacy(generator: np.random.RandomState | None) -> Source:
    get: Any = np.random.get_state if generator is None else generator.get_state
    put: Any = np.random.set_state if generator is None else generator.set_state

    def trial(value: Any) -> None:
        owned = _owned(value)
        here = get(legacy=False)["bit_generator"]
        if owned["bit_generator"] != here:
            raise ValueError(f"the state of {owned['bit_generator']} for {here}")
        if here == "MT19937":
            np.random.RandomState().set_state(owned)

    return Source(lambda: _owned(get(legacy=False)), lambda value: put(_owned(value)), trial)


def _bits(generator: np.random.BitGenerator) -> Source:
    def put(value: Any, onto: Any = generator) -> None:
        onto.state = _owned(value)

    return Source(lambda: _owned(generator.state), put, lambda value: put(value, type(generator)()))


# -------------------------------------------------------------------- torch


def _bytes(value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        value = torch.from_numpy(np.array(value, np.uint8))
    made: torch.Tensor = value.detach().to("cpu", torch.uint8)
    return made


def _torch(generator: torch.Generator) -> Source:
    def put(value: Any, onto: torch.Generator = generator) -> None:
        onto.set_state(_bytes(value))

    return Source(generator.get_state, put, lambda value: put(value, torch.Generator(generator.device)))


def _devices(module: Any, name: str) -> Source:
    """All generators of one kind of device. A state for a device that isn't there is left out: the environment is another then."""

    def put(value: Any) -> None:
        for number, state in enumerate(value[: module.device_count()]):
            module.set_rng_state(_bytes(state), number)

    def trial(value: Any) -> None:
        for number, state in enumerate(value[: module.device_count()]):
            torch.Generator(f"{name}:{number}").set_state(_bytes(state))

    return Source(lambda: list(module.get_rng_state_all()), put, trial)


def _mps() -> Source:
    def trial(value: Any) -> None:
        torch.Generator("mps").set_state(_bytes(value))

    return Source(torch.mps.get_rng_state, lambda value: torch.mps.set_rng_state(_bytes(value)), trial)


def _global(kind: str) -> Source | None:
    """The generators of that kind of this process; None where there are none, or none that was ever used."""
    if kind == "python":
        return _python(None)
    if kind == "numpy":
        return _legacy(None)
    if kind == "torch":
        return _torch(torch.default_generator)
    if kind == "mps":
        return _mps() if torch.backends.mps.is_available() else None
    module: Any = torch.cuda if kind == "cuda" else torch.xpu
    return _devices(module, kind) if module.is_available() else None


# -------------------------------------------------------------------- all of them


def is_generator(value: object) -> bool:
    """Whether the value is a random generator whose state can be captured."""
    kinds = (random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator, torch.Generator)
    return isinstance(value, kinds) and not isinstance(value, random.SystemRandom)


def source_of(generator: Any) -> Source:
    """Where the state of a generator that a user has made comes from and goes to."""
    if isinstance(generator, random.Random):
        return _python(generator)
    if isinstance(generator, torch.Generator):
        return _torch(generator)
    if isinstance(generator, np.random.RandomState):
        return _legacy(generator)
    return _bits(generator.bit_generator if isinstance(generator, np.random.Generator) else generator)


def states(kinds: Collection[str] = KINDS) -> dict[str, Any]:
    """The states of the generators of this process, in memory of their own. Devices that were never used have none."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        if kind in kinds and not _is_unused(kind):
            source = _global(kind)
            if source is not None:
                found[kind] = source.get()
    return found


def plain_states() -> dict[str, Any]:
    """The same with tensors in the place of arrays, for ``torch.load(weights_only=True)``, which builds no arrays."""
    plain: dict[str, Any] = _plain(states())
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    # Of 32 bits: in 64 they have a place with sign.
    return torch.from_numpy(value.astype(np.int64)) if isinstance(value, np.ndarray) else value


def _is_unused(kind: str) -> bool:
    """Whether asking for the state would start the driver of a device, for a training that doesn't use it."""
    module: Any = {"cuda": torch.cuda, "xpu": torch.xpu}.get(kind)
    return module is not None and not module.is_initialized()


def check_states(values: Mapping[str, Any], key: str = "rng") -> list[str]:
    """Try each state on a generator of its own. Gives the kinds that this machine has no generator of.

    Raises ``CorruptFile`` for what is no state.
    """
    absent = []
    for kind, value in values.items():
        source = _global(kind) if kind in KINDS else None
        if source is None:
            absent.append(kind)
            continue
        attempt(source.trial, value, f"{key}.{kind}")
    return absent


def set_states(values: Mapping[str, Any], key: str = "rng") -> None:
    """Give the generators of this process these states. Raises ``StateDictError`` where one doesn't take its."""
    for kind in KINDS:
        source = _global(kind) if kind in values else None
        if source is not None:
            attempt(source.set, values[kind], f"{key}.{kind}")


def attempt(do: Callable[[Any], None], value: Any, key: str) -> None:
    """Set a state, or try to. Raises ``CorruptFile`` that names the generator."""
    try:
        do(value)
    except StateDictError:
        raise
    except _UNFIT as error:
        what = f"this is no state of that random generator: {type(error).__name__}: {one_line(error)}"
        raise CorruptFile(what, key=key) from error

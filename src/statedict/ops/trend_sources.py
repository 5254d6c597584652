"""What of a step is measured: one component, and those of its tensors that are floating numbers; and the modules that they belong to."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from statedict.errors import KeyNotFound, StateDictError
from statedict.formats.step import StepManifest
from statedict.keys import matches, near
from statedict.lazy_tensor import LazyTensor
from statedict.manifest import TensorEntry
from statedict.numerics.motion import is_measured
from statedict.ops.comparing.walks import Side
from statedict.runs.pieces import OpenedStep

__all__ = ["MeasuredStep", "component_of", "depth_of", "module_of"]

# What a training state's model is called, as a component and as a kind.
_MODEL, _MODULE = "model", "module"
# Modules: the fewest that are worth a finer division, and the most that figures are kept of for each step.
_FEWEST, _MOST = 8, 256
# Components of a key that are looked at. Real keys have fewer than 20.
_MOST_LEVELS = 64


def component_of(manifest: StepManifest, path: str, wanted: str | None = None) -> str:
    """The component that is the model: the one of that name, else the first module, else the only one with tensors.

    Raises ``KeyNotFound``, naming the step's ``path``, where it doesn't have the one that is wanted, or nothing says which it is.
    """
    names = list(manifest.components)
    if wanted is not None:
        if wanted in names:
            return wanted
        hint = f"There is: {', '.join(near(wanted, names) or names)}"
        raise KeyNotFound("the step has no such component", path=path, key=wanted, hint=hint)
    kinds = manifest.facts.get("kinds")
    modules = [name for name in names if isinstance(kinds, dict) and kinds.get(name) == _MODULE]
    filled = [name for name in names if manifest.inventory.get(name, {}).get("tensors")]
    likely = [name for name in (_MODEL, *modules) if name in names] or filled
    if not likely or (len(likely) > 1 and likely is filled):
        hint = f"Name it, --component or component=; there is: {', '.join(names)}"
        raise KeyNotFound("nothing says which component is the model", path=path, key=_MODEL, hint=hint)
    return likely[0]


class MeasuredStep:
    """An opened step: its ``tensors`` of floating numbers by key, tied ones once, and why others are ``left_out``."""

    def __init__(self, at: int, opened: OpenedStep, component: str, globs: Sequence[str]) -> None:
        """Raises ``CorruptFile`` for a header that isn't as it was written, and closes nothing then."""
        self.at = at  # its number among the steps that are looked at
        self.step = opened.step
        self.tensors: dict[str, TensorEntry] = {}
        self.left_out: dict[str, list[str]] = {}
        self.keys: list[str] = []  # all of them, whatever the globs say
        self._opened = opened
        self._piece = opened.piece(component)
        seen: set[object] = set()
        for key in self._piece:
            self.keys.append(key)
            if not globs or any(matches(key, glob) for glob in globs):
                self._choose(key, self._piece[key], seen)

    def _choose(self, key: str, tensor: LazyTensor, seen: set[object]) -> None:
        entry = tensor.entry
        view = entry.view
        if view is None or not is_measured(entry.dtype):
            is_float = entry.dtype.kind in ("float", "complex", "quantized")
            if is_float and entry.numel:
                kind = entry.layout if view is None else str(entry.dtype)
                self.left_out.setdefault(kind, []).append(key)
            return
        try:
            tensor.check_readable()
        except StateDictError as error:
            self.left_out.setdefault(error.what, []).append(key)
            return
        mark = (view.storage.id, view.offset, view.stride, view.bits, entry.shape, entry.dtype)
        if mark not in seen:
            seen.add(mark)
            self.tensors[key] = entry

    def side(self, key: str) -> Side:
        """A tensor, to be read."""
        return Side(self.tensors[key], self._piece)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is measured."""
        return sum([entry.nbytes for entry in self.tensors.values()])

    def close(self) -> None:
        """Close its files, and forget its tensors; retention may take the step from now on."""
        self._opened.close()
        self.tensors, self.keys = {}, []


def depth_of(keys: Iterable[str]) -> int:
    """How many components of a key name its module: as few as tell eight modules apart, if no more than 256 come of it."""
    parts = [key.split(".", _MOST_LEVELS) for key in keys]
    most = max(map(len, parts), default=1)
    depth = found = 1
    while depth < most and len(_modules(parts, depth)) < _FEWEST:
        depth += 1
        finer = len(_modules(parts, depth))
        # One tensor each is no division into modules.
        if finer > _MOST or finer == len(parts):
            break
        found = depth
    return found


def _modules(parts: Collection[Sequence[str]], depth: int) -> set[tuple[str, ...]]:
    return {tuple(each[:depth]) for each in parts}


def module_of(key: str, depth: int) -> str:
    """The module of a key: ``layers.3.*``, or the key itself where it has no more components than that."""
    parts = key.split(".", _MOST_LEVELS)
    return ".".join(parts[:depth]) + (".*" if len(parts) > depth else "")

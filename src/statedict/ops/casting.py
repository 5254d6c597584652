"""A checkpoint whose floats are cast to one dtype, and what the cast does to the values, before anything is written.

Floats are cast and nothing else: integers and booleans are counts and masks, complex numbers would lose a part, and of quantised
weights the stored numbers mean nothing without their scales, which stay as exact as they are. An optimizer's steps are counts too.
Tied tensors are cast once and stay tied.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from statedict.checkpoint import Checkpoint
from statedict.dtypes import DType
from statedict.errors import RuleError, one_line
from statedict.io.workers import Workers
from statedict.keys import Path, display
from statedict.lazy_tensor import LazyTensor
from statedict.manifest import Container, Finding, Node, TensorEntry
from statedict.nodes import components, fold
from statedict.ops.findings import named
from statedict.report.units import plural
from statedict.rules.drafts import CastOf, Draft, identity_of
from statedict.rules.dtypes import float_named, holds
from statedict.views import is_dense, is_packed

if TYPE_CHECKING:
    from statedict.numerics.casting import CastTally
    from statedict.recipes.derived import Packed

__all__ = ["Casting", "TensorCast", "cast", "examined", "nbytes_of", "refuse_overflow"]

# What stands beside a quantised tensor and belongs to it: behind its own key, or in place of its last component
# (compressed-tensors, bitsandbytes, GPTQ and AWQ, DeepSeek's float8).
_BEHIND = ("_scale", "_scales", "_scale_inv", "_zero_point")
_BESIDE = ("scale", "scales", "weight_scale", "input_scale", "SCB", "zeros", "qzeros", "zero_point")
# What integers are called that hold several small ones each (GPTQ, AWQ, compressed-tensors).
_PACKED = ("qweight", "qzeros", "weight_packed")
_THREADS = 2
# Keys that an error names.
_LISTED = 3


class TensorCast(NamedTuple):
    """What the cast does to one tensor. Counts are of numbers, the errors those of finite ones."""

    key: str
    before: DType
    after: DType
    overflowed: int = 0  # finite before; Inf, NaN or cut to the largest number after
    underflowed: int = 0  # not zero before, zero after
    max_abs: float = 0.0
    max_rel: float = 0.0

    def to_dict(self) -> dict[str, object]:
        """The facts, JSON-ready."""
        return {
            "key": self.key,
            "from": self.before.torch,
            "to": self.after.torch,
            "overflowed": self.overflowed,
            "underflowed": self.underflowed,
            "max_abs": self.max_abs,
            "max_rel": self.max_rel,
        }


class Casting(NamedTuple):
    """The checkpoint with the dtypes that it gets, the tensors that change, by path, and what is left alone."""

    checkpoint: Checkpoint
    dtype: DType
    changed: Mapping[Path, TensorEntry]  # as they were
    findings: tuple[Finding, ...]

    def casts(self, source: Checkpoint) -> list[CastOf]:
        """Each tensor that changes, of the checkpoint before the cast."""
        names = {path: key for key, path in display(source.manifest.tensors).items()}
        return [CastOf(names[path], LazyTensor(entry, source), self.dtype) for path, entry in self.changed.items()]


def _sifted(casts: Sequence[CastOf]) -> dict[object, CastOf]:
    """The casts that may change values, tied tensors once: of an exact one nothing has to be read."""
    found: dict[object, CastOf] = {}
    for each in casts:
        entry = each.source.entry
        if entry.view is not None and entry.numel and not holds(each.after, entry.dtype):
            found.setdefault(_identity(each), each)
    return found


def _identity(each: CastOf) -> object:
    return id(each.source.origin), identity_of(each.source.entry), each.after


def nbytes_of(casts: Sequence[CastOf]) -> int:
    """Bytes that ``examined`` reads."""
    return sum([each.source.nbytes for each in _sifted(casts).values()])


def cast(checkpoint: Checkpoint, dtype: str) -> Casting:
    """The checkpoint with its floats in that dtype (``bfloat16``, ``bf16`` …); nothing is read yet.

    Raises ``RuleError`` for a dtype that tensors can't be cast to.
    """
    from statedict.recipes.casting import Cast

    after = float_named(dtype)
    if after.kind != "float":
        raise RuleError("only floats are cast, and to floats", found=after, hint="Name one such as bfloat16")
    changed, findings = _chosen(checkpoint, after)
    draft = Draft(checkpoint)

    def leaf(node: Node) -> Node:
        entry = changed.get(node.path) if isinstance(node, TensorEntry) else None
        if entry is None:
            return node
        if entry.view is None:
            return entry._replace(dtype=after, digest=None)
        made = draft.computed_once(identity_of(entry), entry, lambda: Cast(draft.lazy(entry), after))
        # A cast keeps the strides, as torch's does, where they leave no gaps.
        keeps = is_dense(entry.shape, entry.stride) and not is_packed(entry.shape, entry.stride)
        return made._replace(memory_stride=entry.stride if keeps else None)

    draft.root = fold(checkpoint.manifest.structure, leaf, _container)
    draft.settle()
    return Casting(draft.checkpoint(owns_files=False), after, changed, tuple(findings))


def _container(node: Container, children: list[Node]) -> Container:
    return Container(node.kind, node.keys, children, type=node.type, attributes=node.attributes)


# ---------------------------------------------------------------- which tensors


def _chosen(checkpoint: Checkpoint, after: DType) -> tuple[dict[Path, TensorEntry], list[Finding]]:
    """The tensors that are cast, by path, and what is to be said of the others."""
    tensors = checkpoint.manifest.tensors
    names = {path: key for key, path in display(tensors).items()}
    scales, optimizers = _scales(tensors), _optimizers(checkpoint.manifest.structure)
    chosen: dict[Path, TensorEntry] = {}
    left: dict[str, list[str]] = {}
    for path, entry in tensors.items():
        what = _left_alone(path, entry, scales, optimizers)
        if what:
            left.setdefault(what, []).append(names[path])
        elif entry.dtype is not after:
            chosen[path] = entry
    findings = [
        Finding("cast-left-alone", "info", f"{plural(len(keys), 'tensor')} {what} not cast: {named(keys)}", tuple(keys))
        for what, keys in left.items()
    ]
    state = tuple([names[path] for path in chosen if _is_inside(path, optimizers)])
    if state:
        message = f"the state of an optimizer is cast too, {plural(len(state), 'tensor')}: --weights-only leaves it out"
        findings.append(Finding("cast-optimizer", "warning", message, state))
    return chosen, findings


def _left_alone(path: Path, entry: TensorEntry, scales: Collection[str], optimizers: Collection[Path]) -> str:
    """What a tensor is that isn't cast, as it continues a count of tensors; empty for one that is."""
    if entry.layout != "strided":
        return f"of the layout {entry.layout},"
    if entry.dtype.kind in ("int", "uint", "bool"):
        return "of integers or booleans,"
    if entry.dtype.kind != "float":
        return f"of {entry.dtype},"
    if entry.dtype.bits <= 8:
        return f"of {entry.dtype}, which mean nothing without their scales,"
    if entry.key in scales:
        return "that belong to quantised weights, such as scales,"
    if entry.shape == () and path[-1:] == ("step",) and _is_inside(path, optimizers):
        return "that count the steps of an optimizer,"
    return ""


def _scales(tensors: Mapping[Path, TensorEntry]) -> set[str]:
    """The keys of floats that stand beside quantised weights and belong to them."""
    quantised = {entry.key for entry in tensors.values() if _is_quantised(entry)}
    if not quantised:
        return set()
    modules = {key.rpartition(".")[0] for key in quantised}
    found: set[str] = set()
    for entry in tensors.values():
        key = entry.key
        module, _, last = key.rpartition(".")
        beside = module in modules and last in _BESIDE
        if beside or module in quantised or any(key.endswith(end) and key[: -len(end)] in quantised for end in _BEHIND):
            found.add(key)
    return found


def _is_quantised(entry: TensorEntry) -> bool:
    """Whether the numbers of a tensor mean nothing without others."""
    if entry.dtype.kind in ("int", "uint"):
        return entry.dtype.bits <= 8 or entry.key.rpartition(".")[2] in _PACKED
    return entry.dtype.kind == "float" and entry.dtype.bits <= 8


def _optimizers(root: Node) -> set[Path]:
    """Where the state dicts of optimizers stand (torch ``optim/optimizer.py``: ``state`` and ``param_groups``)."""
    found: set[Path] = set()
    pending: list[tuple[Path, Node]] = [((), root)]
    while pending:
        path, node = pending.pop()
        if not isinstance(node, Container):
            continue
        if "param_groups" in node.keys:
            found.add(path)
            continue
        pending += [((*path, part), child) for part, child in zip(components(node.keys), node.children)]
    return found


def _is_inside(path: Path, optimizers: Collection[Path]) -> bool:
    return bool(optimizers) and any(path[:at] in optimizers for at in range(len(path)))


# ---------------------------------------------------------------- what it does to the values


def examined(casts: Sequence[CastOf], on_progress: Callable[[int], object]) -> list[TensorCast]:
    """What each cast does to its tensor, in their order.

    Reads the values once, in bounded memory and on two threads; of a cast that is exact whatever the values are, nothing.
    ``on_progress`` is told the bytes that are done.
    """
    sifted = _sifted(casts)
    known = dict(zip(sifted, _tallied(list(sifted.values()), on_progress)))
    made = []
    for each in casts:
        found = known.get(_identity(each))
        facts = () if found is None else (found.overflowed, found.underflowed, found.max_abs, found.max_rel)
        made.append(TensorCast(each.key, each.source.entry.dtype, each.after, *facts))
    return made


def _tallied(casts: Sequence[CastOf], on_progress: Callable[[int], object]) -> list[CastTally]:
    """What each cast does to its tensor. The threads take pieces of the tensors, one after the other."""
    if not casts:
        return []
    from statedict.numerics.casting import CastTally
    from statedict.numerics.rounding import BLOCK_NBYTES, Rounding
    from statedict.recipes.derived import Packed

    totals = [CastTally(each.source.entry.dtype, each.after) for each in casts]
    sources = [Packed(each.source) for each in casts]
    pieces = _pieces(sources, BLOCK_NBYTES)
    lock, done = Lock(), [0]

    def work() -> None:
        roundings: dict[tuple[DType, DType], Rounding] = {}
        buffer = memoryview(bytearray(BLOCK_NBYTES))
        while not workers.stopped:
            with lock:
                piece = next(pieces, None)
            if piece is None:
                return
            at, first, nbytes = piece
            source, after = sources[at], casts[at].after
            block = buffer[:nbytes] if nbytes <= len(buffer) else memoryview(bytearray(nbytes))
            source.read_into(first, block)
            kinds = source.dtype, after
            rounding = roundings.setdefault(kinds, Rounding(*kinds))
            rounding.add(block, first // source.dtype.itemsize)
            with lock:
                totals[at].merge(rounding.tally)
                done[0] += nbytes
                on_progress(done[0])
            rounding.tally = CastTally(*kinds)

    workers = Workers(_THREADS if sum([source.nbytes for source in sources]) > BLOCK_NBYTES else 1)
    workers.run(work)
    return totals


def _pieces(sources: Sequence[Packed], nbytes: int) -> Iterator[tuple[int, int, int]]:
    """The tensors cut into pieces: number of the tensor, offset in it, length. Scattered ones are gathered in larger pieces."""
    for at, source in enumerate(sources):
        step = nbytes if source.is_plain else source.block * source.dtype.itemsize
        for first in range(0, source.nbytes, step):
            yield at, first, min(step, source.nbytes - first)


def refuse_overflow(casts: Sequence[TensorCast], source: Checkpoint) -> None:
    """Raise ``RuleError`` if a number would become Inf, with the tensors that have such numbers."""
    over = sorted([each for each in casts if each.overflowed], key=lambda each: -each.overflowed)
    if not over:
        return
    shown = ", ".join([f"'{one_line(each.key)}' ({each.overflowed:,})" for each in over[:_LISTED]])
    more = f" and {len(over) - _LISTED} more" if len(over) > _LISTED else ""
    raise RuleError(
        f"{over[0].after} doesn't reach {plural(sum([each.overflowed for each in over]), 'number')} of "
        f"{plural(len(over), 'tensor')}, which would become Inf: {shown}{more}",
        path=source.source,
        hint="bfloat16 reaches as far as float32. To write them so: --allow-overflow",
    )

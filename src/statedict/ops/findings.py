"""What a person should know about a checkpoint, told by its manifest alone: no tensor byte is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from statedict.errors import one_line
from statedict.keys import Path, dotted
from statedict.manifest import Finding, Manifest, Storage, TensorEntry
from statedict.ops.training import Optimizer, Training
from statedict.ops.values import brief, exact
from statedict.report.units import human_bytes, plural
from statedict.tree import fold
from statedict.views import reach

__all__ = ["Evidence", "command", "findings_of", "named"]

# A storage is worth a word when its views leave this much of it unused: less is padding that some writers add.
_WASTED_NBYTES = 64
_WASTED_SHARE = 10  # one tenth
# Equal check sums of fewer bytes say little: many biases are one constant.
_COMPARED_NBYTES = 64
# Names that one sentence lists.
_NAMED = 3

_LEVELS = {"error": 0, "warning": 1, "info": 2}


class Evidence(NamedTuple):
    """What the findings are made from."""

    manifest: Manifest
    source: str
    names: Mapping[Path, str]  # the key that each tensor is shown as
    tied: Sequence[tuple[Path, ...]]
    training: Training
    stats: Mapping[Path, Mapping[str, object]]


def findings_of(evidence: Evidence) -> tuple[Finding, ...]:
    """The manifest's own notes and everything found here, the gravest first."""
    used = _by_storage(evidence.manifest.tensors)
    found = [
        *evidence.manifest.notes,
        *_training(evidence),
        *_bloat(evidence, used),
        *_expanded(evidence),
        *_non_finite(evidence),
        *_tied(evidence),
        *_overlaps(evidence, used),
        *_duplicates(evidence, used),
        *_empty(evidence),
    ]
    return tuple(sorted(found, key=lambda finding: _LEVELS.get(finding.level, 2)))


def command(*words: str) -> str:
    """A command line to type, between backticks, its words quoted for a shell."""
    from shlex import quote

    return f"`statedict {' '.join([quote(one_line(word)) for word in words])}`"


def named(keys: Sequence[str]) -> str:
    """The keys in a sentence: folded, and the first few of them."""
    groups = fold((key, None) for key in keys)
    shown = ", ".join([f"'{one_line(group.key)}'" for group in groups[:_NAMED]])
    rest = sum(group.times for group in groups[_NAMED:])
    return f"{shown} and {rest:,} more" if rest else shown


def _by_storage(tensors: Mapping[Path, TensorEntry]) -> dict[int, list[tuple[Path, TensorEntry]]]:
    """The tensors that view each storage, with the parts of those that are made of parts."""
    used: dict[int, list[tuple[Path, TensorEntry]]] = {}
    for path, entry in tensors.items():
        if entry.view is not None:
            used.setdefault(entry.view.storage.id, []).append((path, entry))
        for part in entry.parts.values():
            if part.view is not None:
                used.setdefault(part.view.storage.id, []).append((path, part))
    return used


_Views = Sequence[tuple[Path, TensorEntry]]


def _storage(views: _Views) -> Storage:
    view = views[0][1].view
    assert view is not None
    return view.storage


def _span(entry: TensorEntry) -> tuple[int, int]:
    """The bytes of its storage that a view reaches over: from, to."""
    view = entry.view
    assert view is not None
    end = view.offset + reach(entry.shape, view.stride)
    return entry.dtype.nbytes(view.offset), entry.dtype.nbytes(end)


def _used_nbytes(views: _Views) -> int:
    """Bytes of a storage that its views need at most: what they reach over, or what they hold, if that is less."""
    covered = end = 0
    for low, high in sorted([_span(entry) for _, entry in views]):
        covered += max(0, high - max(low, end))
        end = max(end, high)
    distinct = {_identity(entry): entry.nbytes for _, entry in views}
    return min(covered, sum(distinct.values()))


def _bloat(evidence: Evidence, used: Mapping[int, _Views]) -> Iterator[Finding]:
    if evidence.manifest.format == "npz":
        return  # a compressed entry is its array and a short header: nothing is wasted
    held = needed = 0
    paths: list[Path] = []
    for views in used.values():
        nbytes = _storage(views).nbytes
        if len(views) == 1 and nbytes - views[0][1].nbytes < _WASTED_NBYTES:
            continue
        taken = _used_nbytes(views)
        if nbytes - taken >= max(_WASTED_NBYTES, nbytes // _WASTED_SHARE):
            held += nbytes
            needed += taken
            paths.extend(path for path, _ in views)
    if not paths:
        return
    keys = _keys(evidence, paths)
    if len(keys) == 1:
        what = f"1 tensor is a view of a storage of {human_bytes(held)}, but shows {human_bytes(needed)} of it"
    else:
        what = f"{len(keys):,} tensors are views of storages of {human_bytes(held)}, but show {human_bytes(needed)} of them"
    message = (
        f"{what}: {named(keys)}. "
        f"{human_bytes(held - needed)} would go with {command('convert', evidence.source, 'TARGET.pth')}"
    )
    yield Finding("view-bloat", "warning", message, keys)


def _keys(evidence: Evidence, paths: Iterable[Path]) -> tuple[str, ...]:
    return tuple(evidence.names[path] for path in dict.fromkeys(paths))


def _tied(evidence: Evidence) -> Iterator[Finding]:
    if not evidence.tied:
        return
    keys = tuple(evidence.names[path] for group in evidence.tied for path in group)
    if len(evidence.tied) == 1:
        message = f"{len(keys)} tensors are tied, they show the same bytes: {named(keys)}"
    else:
        message = f"{len(evidence.tied):,} groups of tensors are tied, each shows the same bytes: {named(keys)}"
    yield Finding("tied", "info", message, keys)


def _overlaps(evidence: Evidence, used: Mapping[int, _Views]) -> Iterator[Finding]:
    paths: list[Path] = []
    count = 0
    for views in used.values():
        together = _overlapping(views) if len(views) > 1 else []
        paths.extend(together)
        count += bool(together)
    if paths:
        keys = _keys(evidence, paths)
        message = (
            f"{len(keys):,} tensors are different views that reach over the same bytes of {plural(count, 'storage')}: "
            f"{named(keys)}. In memory, a change of one can change another"
        )
        yield Finding("shared-storage", "info", message, keys)


def _overlapping(views: _Views) -> list[Path]:
    """The views of one storage whose range runs into that of a different view."""
    spans = sorted([(*_span(entry), at) for at, (_, entry) in enumerate(views) if entry.numel])
    seen: dict[int, None] = {}
    widest: tuple[int, int] | None = None  # the end of the bytes reached so far, and whose it is
    for low, high, at in spans:
        if widest is not None and low < widest[0] and _identity(views[at][1]) != _identity(views[widest[1]][1]):
            seen[widest[1]] = seen[at] = None
        if widest is None or high > widest[0]:
            widest = (high, at)
    return [views[at][0] for at in sorted(seen)]


def _identity(entry: TensorEntry) -> tuple[object, ...]:
    """What makes two views of one storage the same."""
    view = entry.view
    assert view is not None
    return view.offset, view.stride, view.bits, entry.shape, entry.dtype.code


def _duplicates(evidence: Evidence, used: Mapping[int, _Views]) -> Iterator[Finding]:
    equal: dict[tuple[int, int | str], list[_Views]] = {}
    for views in used.values():
        storage = _storage(views)
        recorded = storage.digest or storage.crc
        if recorded is not None and storage.nbytes >= _COMPARED_NBYTES:
            equal.setdefault((storage.nbytes, recorded), []).append(views)
    groups = [group for group in equal.values() if len(group) > 1]
    if not groups:
        return
    keys = _keys(evidence, [path for group in groups for views in group for path, _ in views])
    extra = sum(_storage(group[0]).nbytes * (len(group) - 1) for group in groups)
    message = (
        f"{plural(sum(map(len, groups)), 'storage')} have the size and check sum of another, probably the same tensor stored "
        f"more than once ({human_bytes(extra)} too many): {named(keys)}"
    )
    yield Finding("duplicate-tensors", "info", message, keys)


def _empty(evidence: Evidence) -> Iterator[Finding]:
    keys = tuple(evidence.names[path] for path, entry in evidence.manifest.tensors.items() if 0 in entry.shape)
    if keys:
        verb = "has" if len(keys) == 1 else "have"
        yield Finding("zero-elements", "info", f"{plural(len(keys), 'tensor')} {verb} no elements: {named(keys)}", keys)


def _expanded(evidence: Evidence) -> Iterator[Finding]:
    found = [
        (path, entry)
        for path, entry in evidence.manifest.tensors.items()
        if entry.view is not None and 0 in entry.view.stride and entry.nbytes > entry.view.storage.nbytes
    ]
    if not found:
        return
    keys = _keys(evidence, [path for path, _ in found])
    shown = sum(entry.nbytes for _, entry in found)
    stored = sum({entry.view.storage.id: entry.view.storage.nbytes for _, entry in found if entry.view}.values())
    what = "1 tensor repeats" if len(keys) == 1 else f"{len(keys):,} tensors repeat"
    message = f"{what} its elements by a stride of 0: {named(keys)}. Shown are {human_bytes(shown)}, stored {human_bytes(stored)}"
    yield Finding("expanded-view", "warning", message, keys)


def _non_finite(evidence: Evidence) -> Iterator[Finding]:
    for code, name in (("nan", "NaN"), ("inf", "infinite values")):
        paths = [path for path, figures in evidence.stats.items() if figures.get(code) and path in evidence.names]
        if paths:
            keys = _keys(evidence, paths)
            counts = [evidence.stats[path][code] for path in paths]
            count = exact(sum(each for each in counts if isinstance(each, int)))
            message = f"{plural(len(keys), 'tensor')} with {name} ({count} in all): {named(keys)}"
            yield Finding("non-finite", "warning", message, keys)


def _training(evidence: Evidence) -> Iterator[Finding]:
    training = evidence.training
    if training.is_checkpoint:
        yield Finding("training-checkpoint", "info", " ".join(_sentences(evidence)), _parts(training))
    elif training.weights is not None:
        key = dotted(training.weights)
        message = f"the weights are under '{one_line(key)}': {command('inspect', evidence.source, '--at', key)}"
        yield Finding("nested-weights", "info", message, (key,))


def _parts(training: Training) -> tuple[str, ...]:
    paths = [training.weights, training.averages, *(optimizer.path for optimizer in training.optimizers)]
    return tuple(dotted(path) for path in paths if path)


def _sentences(evidence: Evidence) -> Iterator[str]:
    training, tensors = evidence.training, evidence.manifest.tensors
    total = sum(entry.nbytes for entry in tensors.values())
    done = [f"{name} {brief(value, 20)}" for name, value in training.progress.items()]
    rates = dict.fromkeys(rate for optimizer in training.optimizers for rate in optimizer.rates)
    done += [f"lr {', '.join([brief(rate, 20) for rate in rates][:4])}"] if rates else []
    yield "a training checkpoint" + (f" ({', '.join(done)})." if done else ".")
    if training.weights is not None:
        count, nbytes = _share(tensors, training.weights)
        key = dotted(training.weights)
        see = command("inspect", evidence.source, "--at", key)
        yield f"The weights are under '{one_line(key)}', {plural(count, 'tensor')} of {human_bytes(nbytes)}: {see}."
    else:
        yield "It holds no weights that stand alone."
    if training.averages is not None:
        count, nbytes = _share(tensors, training.averages)
        yield f"Averaged weights are under '{one_line(dotted(training.averages))}', {human_bytes(nbytes)}."
    for optimizer in training.optimizers:
        yield _optimizer(optimizer, *_share(tensors, optimizer.path), total)


def _share(tensors: Mapping[Path, TensorEntry], under: Path) -> tuple[int, int]:
    inside = [entry.nbytes for path, entry in tensors.items() if path[: len(under)] == under]
    return len(inside), sum(inside)


def _optimizer(optimizer: Optimizer, count: int, nbytes: int, total: int) -> str:
    place = f"under '{one_line(dotted(optimizer.path))}'" if optimizer.path else "the rest"
    share = f", {100 * nbytes // total}% of all" if total else ""
    proofs = {
        "param_names": "its tensors are named by the file",
        "keys": "its tensors are named by the file",
        "shapes": "its tensors are named by their order and shapes",
        "": "its tensors can't be named",
    }
    return f"The optimizer's state is {place}, {plural(count, 'tensor')} of {human_bytes(nbytes)}{share}" + (
        f"; {proofs[optimizer.proof]}." if count else "."
    )

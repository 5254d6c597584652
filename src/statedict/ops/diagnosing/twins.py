"""State dicts of one file with the same names: copies that are equal, copies that share their memory, averages and how far they are."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from math import sqrt

from statedict.errors import FormatError, StateDictError, one_line
from statedict.io.ranges import BLOCK_NBYTES, LocalFile
from statedict.manifest import Finding, TensorEntry
from statedict.ops.comparing.scans import pairs_with_same_bytes
from statedict.ops.comparing.walks import Room, Side, Walk
from statedict.ops.diagnosing.subject import Part, Subject

__all__ = ["sibling_faults", "twins_of"]

# State dicts with the same names that are compared: real files have two or three.
_MOST_TWINS = 6
# Words by which people name the best file and the last one.
_WORDS = ("best", "last", "final", "latest", "newest", "current")


def twins_of(subject: Subject) -> tuple[list[Finding], str]:
    """What is to be said about state dicts that hold the same tensors, and the question that only a person can answer."""
    found: list[Finding] = []
    question = ""
    for one, two in _pairs(subject.parts):
        names = _names(two, one)
        shared = [name for name, other in names.items() if _is_shared(one.tensors[name], two.tensors[other])]
        if 2 * len(shared) > len(names):
            found.append(_alias(subject, one, two, shared))
        elif subject.figures and _look_equal(subject, one, two, names) and _are_equal(subject, one, two, names):
            found.append(_equal(subject, one, two))
        else:
            question = question or f"Which weights are meant, those under '{one.key}' or those under '{two.key}'?"
            found.append(_apart(subject, one, two, names))
    return found, question


def _pairs(parts: Sequence[Part]) -> Iterator[tuple[Part, Part]]:
    """The first state dict of each set of names with each other one that has the same names and shapes."""
    first: dict[frozenset[tuple[str, tuple[int, ...]]], Part] = {}
    for part in parts[:_MOST_TWINS]:
        mark = frozenset((_plain(name), entry.shape) for name, entry in part.tensors.items() if name != "n_averaged")
        if mark in first:
            yield first[mark], part
        elif len(mark) > 1:
            first[mark] = part


def _plain(name: str) -> str:
    return name.removeprefix("module.")


def _names(part: Part, like: Part) -> Mapping[str, str]:
    """The name in ``part`` of each tensor of ``like``."""
    by_plain = {_plain(name): name for name in part.tensors}
    return {name: by_plain[_plain(name)] for name in like.tensors if _plain(name) in by_plain}


def _is_shared(one: TensorEntry, two: TensorEntry) -> bool:
    return (
        one.view is not None and two.view is not None and one.numel > 0 and one.view.storage.id == two.view.storage.id
    )


def _both(one: Part, two: Part) -> str:
    return f"'{one_line(one.key)}' and '{one_line(two.key)}'"


def _alias(subject: Subject, one: Part, two: Part, shared: Sequence[str]) -> Finding:
    message = (
        f"{_both(one, two)} show the same memory ({len(shared):,} of {len(one.tensors):,} tensors): two names for "
        "one set of weights. If one of them was to keep an earlier state, it didn't: `best = model.state_dict()` "
        "goes on changing with the model. Keep copies: copy.deepcopy(model.state_dict())"
    )
    return Finding("aliased-copies", "warning", message, subject.keys([one.tensors[name] for name in shared]))


def _look_equal(subject: Subject, one: Part, two: Part, names: Mapping[str, str]) -> bool:
    """Whether all figures are the same, so that bytes are worth a comparison."""
    return all(
        one.tensors[name].dtype is two.tensors[other].dtype
        and subject.figures.get(one.tensors[name].path) == subject.figures.get(two.tensors[other].path)
        for name, other in names.items()
    )


def _sides(subject: Subject, one: Part, two: Part, names: Mapping[str, str]) -> list[tuple[Side, Side]]:
    return [
        (Side(one.tensors[name], subject.checkpoint), Side(two.tensors[other], subject.checkpoint))
        for name, other in names.items()
        if one.tensors[name].view is not None and two.tensors[other].view is not None
    ]


def _are_equal(subject: Subject, one: Part, two: Part, names: Mapping[str, str]) -> bool:
    sides = _sides(subject, one, two, names)
    try:
        return bool(sides) and all(pairs_with_same_bytes(sides))
    except FormatError:
        return False  # what can't be read has been said


def _equal(subject: Subject, one: Part, two: Part) -> Finding:
    if one.is_average != two.is_average:
        why = (
            "the averages were never updated, or were written over by the weights; right at the start of a training that is as it "
            "should be"
        )
    else:
        why = "either the last state was also the best, or the best one was kept without a copy and went on changing with the model"
    message = f"{_both(one, two)} are the same, byte for byte: {why}"
    return Finding("equal-copies", "warning", message, subject.keys(two.tensors.values()))


def _apart(subject: Subject, one: Part, two: Part, names: Mapping[str, str]) -> Finding:
    average = next((part for part in (one, two) if part.is_average), None)
    far = _distance(subject, one, two, names) if subject.figures else None
    how = "" if far is None else f", and differ by {100 * far:.3g} % (‖a − b‖ / ‖a‖)"
    whose = (
        f" '{one_line(average.key)}' are averages, which are what a paper's figures are as a rule."
        if average is not None
        else ""
    )
    takes = " and ".join(
        [subject.command("convert", "SOURCE", "weights.safetensors", "--at", part.key) for part in (one, two)]
    )
    message = f"{_both(one, two)} have the same names and shapes{how}: only you can say which are meant.{whose} To take one: {takes}"
    return Finding("two-candidates", "info", message, (one.key, two.key))


def _distance(subject: Subject, one: Part, two: Part, names: Mapping[str, str]) -> float | None:
    """How far the floats of the two are apart, by the length of the first."""
    from statedict.numerics.oddities import distance

    apart = size = 0.0
    room = Room()
    floats = [
        (a, b)
        for a, b in _sides(subject, one, two, names)
        if a.entry.dtype is b.entry.dtype and a.entry.dtype.kind == "float" and a.entry.dtype.numpy not in ("", "u1")
    ]
    try:
        for a, b in floats:
            for left, right, _ in Walk(a, b).blocks(room=room):
                more = distance(left, right, a.entry.dtype)
                apart, size = apart + more[0], size + more[1]
    except FormatError:
        return None
    return sqrt(apart / size) if size > 0 and apart / size < float("inf") else None


# -------------------------------------------------------------------- files


def sibling_faults(path: str) -> Iterator[Finding]:
    """Whether the best file and the last one beside each other are the same bytes. Two names of one file say nothing."""
    folder, name = os.path.split(path)
    word = next((each for each in _WORDS if re.search(rf"(?<![a-z]){each}(?![a-z])", name.lower())), None)
    if word is None:
        return
    for other in _WORDS:
        beside = os.path.join(folder, re.sub(word, other, name, flags=re.IGNORECASE))
        if ("best" in (word, other)) and other != word and os.path.isfile(beside) and _are_same_files(path, beside):
            message = (
                f"'{one_line(os.path.basename(beside))}' beside it holds the same bytes: either the last epoch was "
                "also the best, or the best weights were kept without a copy (`best = model.state_dict()` goes on "
                "changing with the model)"
            )
            yield Finding("same-as-sibling", "info", message)


def _are_same_files(path: str, other: str) -> bool:
    if os.path.samefile(path, other) or os.path.getsize(path) != os.path.getsize(other):
        return False
    one, two = LocalFile(path), LocalFile(other)
    try:
        return all(
            one.read(at, size) == two.read(at, size)
            for at in range(0, one.nbytes, BLOCK_NBYTES)
            for size in [min(BLOCK_NBYTES, one.nbytes - at)]
        )
    except StateDictError:
        return False
    finally:
        one.close()
        two.close()

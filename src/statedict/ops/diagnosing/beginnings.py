"""Networks, and parts of them, that are as they were made: no training has touched them.

A batch norm counts its batches and gathers their statistics, so mean 0, variance 1 and a count of 0 say that it never saw one. Where
there is none, all weights must look exactly as some initialisation draws them, and all norms and biases as they are made: a trained
network has many tensors that don't. Sources of the distributions: torch ``nn/init.py`` and the ``reset_parameters`` of its modules;
transformers draws with a deviation of 0.02.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from math import prod, sqrt
from typing import NamedTuple

from statedict.keys import Path
from statedict.manifest import Finding, TensorEntry
from statedict.ops.diagnosing.subject import Part, Subject
from statedict.ops.findings import named
from statedict.report.units import plural

__all__ = ["beginnings"]

# Deviations that libraries draw weights with, whatever their shape.
_DEVIATIONS = (0.02, 0.01, 0.006, 0.001)
# Weights of fewer values are too small a sample to say anything.
_FEWEST = 256
# Values of all weights together from which on they do.
_ENOUGH = 4096
# How far the deviation of a sample may be from that of the distribution, in its own standard errors.
_ERRORS = 4.5
_RECURRENT = re.compile(r"weight_[ih]h_l\d+(_reverse)?$")


class _Norm(NamedTuple):
    """One norm: its tensors by leaf name."""

    stem: str
    tensors: Mapping[str, TensorEntry]

    @property
    def is_batch(self) -> bool:
        """Whether it gathers statistics."""
        return "running_mean" in self.tensors and "running_var" in self.tensors


def beginnings(subject: Subject) -> tuple[list[Finding], set[Path]]:
    """Findings about parts that were never trained, and the state dicts of which all is untrained."""
    found: list[Finding] = []
    untrained: set[Path] = set()
    for part in subject.parts:
        finding = _part(subject, part)
        if finding is not None:
            found.append(finding)
            if finding.code == "never-trained":
                untrained.add(part.path)
    return found, untrained


def _part(subject: Subject, part: Part) -> Finding | None:
    norms = list(_norms(part))
    batch = [norm for norm in norms if norm.is_batch]
    fresh = [norm for norm in batch if _is_fresh(subject, norm)]
    if batch and len(fresh) == len(batch):
        return _never(subject, part, fresh)
    if fresh:
        message = (
            f"{part.where}{len(fresh):,} of {plural(len(batch), 'batch norm')} have mean 0, variance 1 and no batch "
            f"counted: {_stems(fresh)}. That part was never run in training mode: it is new, or another file was "
            "loaded without it"
        )
        return Finding("fresh-statistics", "warning", message, _tensors(subject, fresh))
    if batch or not _is_drawn(subject, part, norms):
        return None
    also = f", and {plural(len(norms), 'norm')} have weight 1 and bias 0" if norms else ""
    message = (
        f"{part.where}this model was never trained, by its values: all weights have the range or spread that new "
        f"ones are drawn with, all biases are what they begin with{also}. Or the file was written before the trained "
        "weights were loaded into the model"
    )
    return Finding("never-trained", "info", message)


def _never(subject: Subject, part: Part, fresh: Sequence[_Norm]) -> Finding:
    counted = any("num_batches_tracked" in norm.tensors for norm in fresh)
    count = "the batch norm has" if len(fresh) == 1 else f"all {len(fresh):,} batch norms have"
    zero = ", and no batch counted" if counted else ""
    message = (
        f"{part.where}this model was never trained: {count} mean 0 and variance 1{zero} ({_stems(fresh)}). Or the "
        "file was written before the trained weights were loaded into the model"
    )
    return Finding("never-trained", "warning", message, _tensors(subject, fresh))


def _stems(norms: Sequence[_Norm]) -> str:
    return named([norm.stem for norm in norms])


def _tensors(subject: Subject, norms: Sequence[_Norm]) -> tuple[str, ...]:
    return subject.keys([norm.tensors[name] for norm in norms for name in ("running_mean", "running_var")])


# -------------------------------------------------------------------- norms


def _norms(part: Part) -> Iterator[_Norm]:
    """Modules whose weight has one dimension; a bias, statistics and a count may stand beside it."""
    modules: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in part.tensors.items():
        stem, _, leaf = name.rpartition(".")
        modules.setdefault(stem, {})[leaf] = entry
    for stem, tensors in modules.items():
        weight = tensors.get("weight")
        if "running_var" in tensors or (
            weight is not None and len(weight.shape) == 1 and set(tensors) <= {"weight", "bias"}
        ):
            yield _Norm(stem, tensors)


def _is_fresh(subject: Subject, norm: _Norm) -> bool:
    """Whether a batch norm never saw a batch.

    Without a count, statistics of 0 and 1 may also be those that were folded into its weight (Caffe's and detectron2's files), so that
    must be as it was made.
    """
    if not (_is(subject, norm.tensors["running_mean"], 0) and _is(subject, norm.tensors["running_var"], 1)):
        return False
    count = norm.tensors.get("num_batches_tracked")
    return _is_made(subject, norm) if count is None else _is(subject, count, 0)


def _is_made(subject: Subject, norm: _Norm) -> bool:
    """Whether weight and bias are those of a new norm, as far as it has them."""
    weight, bias = norm.tensors.get("weight"), norm.tensors.get("bias")
    return (weight is None or _is(subject, weight, 1)) and (bias is None or _is(subject, bias, 0))


def _is(subject: Subject, entry: TensorEntry, value: int) -> bool:
    return entry.numel > 0 and subject.figure(entry, "min") == value == subject.figure(entry, "max")


# -------------------------------------------------------------------- weights as they are drawn


def _is_drawn(subject: Subject, part: Part, norms: Sequence[_Norm]) -> bool:
    """Whether all weights look as if they had just been drawn, and there are enough to say so."""
    if not all(_is_made(subject, norm) for norm in norms):
        return False
    own = {id(entry) for norm in norms for entry in norm.tensors.values()}
    depth = _depth(part)
    evidence = 0
    for name, entry in part.tensors.items():
        if id(entry) in own or entry.dtype.kind != "float":
            continue
        constant = subject.figure(entry, "min") == subject.figure(entry, "max")
        if len(entry.shape) < 2:
            if not constant and not _is_bias(subject, part, name, entry):
                return False
        elif not constant:
            if not _is_sample(subject, name, entry, depth):
                return False
            evidence += entry.numel if entry.numel >= _FEWEST else 0
    return evidence >= _ENOUGH


def _depth(part: Part) -> int:
    """How many blocks the longest list has: some initialisations divide by it."""
    numbers = [int(piece) for name in part.tensors for piece in name.split(".") if piece.isdecimal() and len(piece) < 5]
    return max(numbers, default=0) + 1


def _is_bias(subject: Subject, part: Part, name: str, entry: TensorEntry) -> bool:
    """Whether a bias lies in the range that torch draws it from: that of the weight beside it."""
    leaf = name.rpartition(".")[2]
    weight = part.tensors.get(name[: len(name) - len(leaf)] + leaf.replace("bias", "weight"))
    if "bias" not in leaf or weight is None or len(weight.shape) < 2:
        return False
    inputs = max(1, prod(weight.shape[1:]))
    if _RECURRENT.search(leaf.replace("bias", "weight")):
        inputs = max(1, weight.shape[0] // 4)
    return _largest(subject, entry) <= 1.001 / sqrt(inputs)


def _largest(subject: Subject, entry: TensorEntry) -> float:
    low, high = subject.figure(entry, "min"), subject.figure(entry, "max")
    if not isinstance(low, (int, float)) or not isinstance(high, (int, float)):
        return float("inf")
    return max(-float(low), float(high))


def _is_sample(subject: Subject, name: str, entry: TensorEntry, depth: int) -> bool:
    """Whether a weight has the mean, spread and range of some initialisation. Small samples pass more easily."""
    mean, std = subject.figure(entry, "mean"), subject.figure(entry, "std")
    if not isinstance(mean, float) or not isinstance(std, float) or not std:
        return False
    count = entry.numel
    error = _ERRORS / sqrt(2 * count)
    if abs(mean) > _ERRORS * std / sqrt(count):
        return False
    ratio = _largest(subject, entry) / std
    inputs, outputs = max(1, prod(entry.shape[1:])), max(1, entry.shape[0] * prod(entry.shape[2:]))
    if ratio < 1.74 * (1 + error):
        return any(abs(std * sqrt(3) / bound - 1) < error + 0.002 for bound in _bounds(name, entry, inputs, outputs))
    # A row of zeros (the padding of an embedding) narrows the spread a little.
    slack = error + 0.75 / entry.shape[0] + _rounding(entry)
    embedded = (1.0,) if re.search(r"emb|wte|wpe|tok|pos", name, re.IGNORECASE) else ()
    return any(abs(std / each - 1) < slack for each in (*embedded, *_spreads(inputs, outputs, depth)))


def _rounding(entry: TensorEntry) -> float:
    return 0.004 if entry.dtype.bits < 32 else 0.0005


def _bounds(name: str, entry: TensorEntry, inputs: int, outputs: int) -> Iterator[float]:
    """Ends of the ranges that uniform initialisations draw from."""
    yield from (1 / sqrt(inputs), sqrt(6 / (inputs + outputs)), sqrt(3 / inputs), sqrt(6 / inputs), sqrt(6 / outputs))
    if _RECURRENT.search(name):
        yield from (1 / sqrt(max(1, entry.shape[0] // gates)) for gates in (1, 3, 4))


def _spreads(inputs: int, outputs: int, depth: int) -> Iterator[float]:
    """Deviations that normal initialisations draw with; torch cuts some off at two of them, which narrows them by 0.88."""
    shaped = (sqrt(2 / inputs), sqrt(2 / outputs), sqrt(1 / inputs), sqrt(2 / (inputs + outputs)))
    for each in (*_DEVIATIONS, *shaped):
        yield from (each, 0.88 * each)
    yield 0.02 / sqrt(2 * depth)

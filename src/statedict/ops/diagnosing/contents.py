"""One checkpoint alone: what it really is, where its weights are, what it was saved from, and what looks wrong in it.

The header is read, then every value once for its figures, and the bytes of storages whose check sums the file records. Tensors
that look odd are read once more. Memory stays bounded. Nothing of the file is run, and it isn't changed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from statedict.checkpoint import Checkpoint
from statedict.checkpoint import open as open_checkpoint
from statedict.errors import FormatError, LimitExceeded, StateDictError
from statedict.keys import Path
from statedict.limits import Limits
from statedict.manifest import Finding
from statedict.ops.diagnosing.examination import Examination
from statedict.ops.diagnosing.forms import adapter_faults, forms_of
from statedict.ops.diagnosing.gaps import gaps_of
from statedict.ops.diagnosing.integrity import integrity_faults
from statedict.ops.diagnosing.networks import network_of, network_sentence
from statedict.ops.diagnosing.origins import Origin, origins_of
from statedict.ops.diagnosing.packing import packed_origins, packing_faults
from statedict.ops.diagnosing.subject import Figures, Subject, subject_of
from statedict.ops.diagnosing.surroundings import optimizer_kind, surroundings_of
from statedict.ops.diagnosing.twins import sibling_faults, twins_of
from statedict.ops.diagnosing.unreadable import unreadable_findings
from statedict.ops.diagnosing.values import value_faults
from statedict.ops.inspect import Inspection, inspection_of
from statedict.ops.statistics import Progress, statistics_of
from statedict.ops.values import json_value

__all__ = ["Examination", "examine"]


def examine(
    source: Any,
    *,
    at: str | Path | None = None,
    quick: bool = False,
    limits: Limits | None = None,
    on_progress: Progress | None = None,
) -> Examination:
    """What is to be said about one checkpoint, of any kind that ``open`` takes; ``quick`` reads no values.

    A file that is no checkpoint, or a damaged one, is a finding too. Raises what ``open`` raises where the reason lies elsewhere: no such
    file, no such key, a limit.
    """
    try:
        checkpoint = open_checkpoint(source, at=at, limits=limits)
    except StateDictError as error:
        found = unreadable_findings(source, error, limits)
        if not found:
            raise
        return _refused(source, found, error)
    try:
        return _examined(checkpoint, quick, on_progress)
    finally:
        # A checkpoint that was passed in is open for its owner, who closes it.
        if not isinstance(source, Checkpoint):
            checkpoint.close()


def _refused(source: Any, findings: list[Finding], error: StateDictError) -> Examination:
    path = error.path or os.fspath(source)
    nbytes = os.path.getsize(path) if os.path.isfile(path) else None
    facts: dict[str, object] = {"readable": False, "format": None, "nbytes": nbytes, "error": str(error)}
    return Examination(os.fspath(source), findings, facts)


def _examined(checkpoint: Checkpoint, quick: bool, on_progress: Progress | None) -> Examination:
    figures: Mapping[Path, Figures] = {}
    found: list[Finding] = []
    if not quick:
        try:
            figures, notes = statistics_of(checkpoint, on_progress)
            found += notes
        except LimitExceeded:
            raise
        except FormatError as error:
            found.append(_unread(error))
    subject = subject_of(checkpoint, figures)
    inspection = inspection_of(checkpoint.manifest, checkpoint.source, stats=figures)
    found += _kept(inspection, subject)
    origins = [*origins_of(subject), *packed_origins(subject), *forms_of(subject)]
    found += [origin.finding for origin in origins if origin.finding is not None]
    twins, question = twins_of(subject)
    found += [*twins, *surroundings_of(subject), *packing_faults(subject), *gaps_of(subject)]
    if figures:
        found += _read(subject)
    return Examination(
        checkpoint.source, _distinct(found), _facts(subject, inspection, origins, bool(figures)), question
    )


def _read(subject: Subject) -> list[Finding]:
    """What only the values show. Damage that is met on the way ends the look at them, and is said."""
    found: list[Finding] = []
    for check in (value_faults, adapter_faults, integrity_faults):
        found += _carried_out(check, subject)
    files = subject.checkpoint.manifest.files
    return [*found, *sibling_faults(files[0].path)] if len(files) == 1 and os.path.isfile(files[0].path) else found


def _carried_out(check: Callable[[Subject], Iterable[Finding]], subject: Subject) -> list[Finding]:
    try:
        return list(check(subject))
    except LimitExceeded:
        raise
    except FormatError as error:
        return [_unread(error)]


def _unread(error: FormatError) -> Finding:
    keys = () if error.key is None else (error.key,)
    return Finding("damaged", "error", f"the values can't be read: {error}", keys)


def _kept(inspection: Inspection, subject: Subject) -> list[Finding]:
    """What an inspection finds, but for what is said here with more."""
    said = {"non-finite", "zero-elements", "nested-weights"} if subject.parts else {"non-finite"}
    return [
        finding
        for finding in inspection.findings
        if finding.code not in said or (finding.code == "nested-weights" and subject.training.weights is not None)
        if not (finding.code == "duplicate-tensors" and subject.figures and _are_constant(subject, finding.keys))
    ]


def _are_constant(subject: Subject, keys: Iterable[str]) -> bool:
    """Whether these tensors have one value each, as new biases have: equal ones say nothing."""
    paths = {key: path for path, key in subject.names.items()}
    figures = [subject.figures.get(paths[key], {}) for key in keys if key in paths]
    return all(each.get("min") is not None and each.get("min") == each.get("max") for each in figures)


def _distinct(findings: Iterable[Finding]) -> list[Finding]:
    """The findings, each once."""
    return list({(finding.code, finding.message): finding for finding in findings}.values())


def _facts(subject: Subject, inspection: Inspection, origins: Iterable[Origin], has_values: bool) -> dict[str, object]:
    totals = inspection.totals
    weights = [
        {
            "key": part.key,
            "tensors": len(part.tensors),
            "parameters": json_value(sum(entry.numel for entry in part.tensors.values())),
            "is_average": part.is_average,
        }
        for part in subject.parts
    ]
    facts: dict[str, object] = {
        "readable": True,
        "format": inspection.format,
        "nbytes": totals.file_nbytes or totals.nbytes,
        "tensors": totals.tensors,
        "parameters": json_value(sum(entry.numel for entry in subject.parts[0].tensors.values()))
        if subject.parts
        else 0,
        "dtypes": list(totals.by_dtype),
        "weights": weights,
        "saved_from": list(dict.fromkeys([origin.name for origin in origins])),
        "optimizer": optimizer_kind(subject) or ("an optimizer" if subject.training.optimizers else ""),
        "progress": json_value(dict(subject.training.progress)),
        "read": "values" if has_values else "header",
    }
    network = network_of(subject.parts[0]) if subject.parts else {}
    if network:
        facts |= {"network": network, "looks_like": network_sentence(network)}
    return facts

"""What changed in a training state beside the weights, one sentence each: hyperparameters, moments, progress, generators.

An optimizer's hyperparameters are known by their place, ``param_groups.<number>.<name>`` (torch ``optim/optimizer.py``, ``state_dict``);
schedulers and the states of random generators by the words that people use for them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from statedict.errors import one_line
from statedict.keys import dotted
from statedict.manifest import Finding
from statedict.ops.comparing.changes import Change
from statedict.ops.comparing.evidence import Evidence
from statedict.ops.comparing.keyed import Keyed
from statedict.ops.findings import named
from statedict.ops.training import training_of
from statedict.report.units import plural

__all__ = ["is_training", "training_changes"]

_CODES = {
    "hyperparameter": "info",
    "moments": "warning",
    "progress": "info",
    "random-state": "info",
    "scheduler": "info",
}
_GROUP = re.compile(r"(?:(?P<owner>.+)\.)?param_groups\.(?P<group>\d+)\.(?P<name>[^.]+)(?:\.\d+)*")
# Lists of the ids and names of a group's parameters: those that differ are told by the tensors.
_MEMBERS = ("params", "param_names")
_SCHEDULER = re.compile(r"(?:^|[._])(?:lr_)?scheduler")
_RANDOM = re.compile(r"(?:^|[._])(?:rng|random|generator|seed)(?:[._]|s?$|s?_)")
_PROGRESS = re.compile(
    r"(?:^|\.)(?:epoch|current_epoch|step|global_step|iteration|iter|epochs_completed|num_updates|best_\w+|loss)$"
)
# Sentences of one kind before the rest is only counted.
_MOST = 12


def is_training(finding: Finding) -> bool:
    """Whether it is one of the sentences that are made here."""
    return finding.code in _CODES


def training_changes(evidence: Evidence) -> list[Finding]:
    """The sentences, in the order of the keys; moments first."""
    found = list(_moments(evidence))
    kinds: dict[str, list[tuple[str, str]]] = {}
    names = _group_names(evidence.a)
    for change in evidence.changed:
        code, text = _sentence(change, names)
        if code:
            kinds.setdefault(code, []).append((change.key, text))
    for code, said in kinds.items():
        found += [Finding(code, _CODES[code], text, (key,)) for key, text in said[:_MOST]]
        if len(said) > _MOST:
            keys = tuple([key for key, _ in said[_MOST:]])
            found.append(Finding(code, _CODES[code], f"and {plural(len(keys), 'more change')} of that kind", keys))
    return found


def _sentence(change: Change, names: dict[str, str]) -> tuple[str, str]:
    """The code and the sentence of one change; empty where it is none of a training state."""
    key = change.key
    shown = one_line(key)
    if change.kind == "object":
        values = f"{change.a} → {change.b}"
        match = _GROUP.fullmatch(key)
        if match is not None and match["name"] in _MEMBERS:
            return "", ""
        if match is not None:
            owner = one_line(match["owner"] or "optimizer")
            group = f"{match['owner'] or ''}.{match['group']}"
            return "hyperparameter", f"{owner}, group {match['group']}{names.get(group, '')}: {match['name']} {values}"
        if _SCHEDULER.search(key):
            owner, _, last = shown.rpartition(".")
            return "scheduler", f"{owner}: {last} {values}" if owner else f"{last} {values}"
        if _RANDOM.search(key):
            return "random-state", f"the state of a random generator differs: {shown}"
        if _PROGRESS.search(key):
            return "progress", f"{shown} {values}"
    elif change.kind in ("value", "shape") and _RANDOM.search(key) and not change.is_equal:
        return "random-state", f"the state of a random generator differs: {shown}"
    return "", ""


def _group_names(side: Keyed) -> dict[str, str]:
    """What a group of an optimizer holds, where there are several and they have names: by ``<owner>.<number>``."""
    found: dict[str, list[str]] = {}
    for entry in side.checkpoint.manifest.objects.values():
        path = entry.path
        if "param_groups" in path and "param_names" in path:
            at = path.index("param_groups")
            group = found.setdefault(f"{dotted(path[:at])}.{path[at + 1]}", [])
            values = entry.value if isinstance(entry.value, (list, tuple)) else [entry.value]
            group += [value for value in values if isinstance(value, str)]
    return {group: f" ({named(tuple(names))})" for group, names in found.items() if names and len(found) > 1}


def _moments(evidence: Evidence) -> Iterator[Finding]:
    """Tensors of an optimizer's state that only one side has."""
    sides = (evidence.a, evidence.only[0], "B"), (evidence.b, evidence.only[1], "A")
    for own, keys, other in sides:
        here = [key for key in keys if ".state." in f".{key}"]
        for optimizer in training_of(own.checkpoint.manifest).optimizers if here else ():
            start = (*optimizer.path, "state")
            states: dict[object, list[str]] = {}
            for key in here:
                path = own.leaves[key].path
                if path[: len(start)] == start and len(path) > len(start) + 1:
                    states.setdefault(path[len(start)], []).append(key)
            if states:
                members = tuple([key for found in states.values() for key in found])
                kinds = ", ".join(dict.fromkeys([str(own.leaves[key].path[-1]) for key in members]))
                owners = [
                    optimizer.parameters.get(own.leaves[found[0]].path, str(number)) for number, found in states.items()
                ]
                what = f"moments missing in {other} for {plural(len(states), 'parameter')} ({kinds})"
                yield Finding("moments", "warning", f"{what}: {named(tuple(owners))}", members)

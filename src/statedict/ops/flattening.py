"""One state dict as people publish it: flat, of plain tensors, and without the components that wrappers put into its keys."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence

from statedict import rules
from statedict.checkpoint import Checkpoint
from statedict.errors import KeyMismatch
from statedict.keys import dotted
from statedict.manifest import Container, Finding, ObjectEntry, TensorEntry
from statedict.nodes import walk
from statedict.ops.models import StateDict
from statedict.prefixes.wrappers import COUNTER, in_source
from statedict.report.units import plural
from statedict.rules import Rule, Rules

__all__ = ["Flat"]

# The attributes in which people's LightningModules hold the model.
_LIGHTNING = ("model.", "net.", "network.")
# Where each prefix comes from.
_WRAPPED_BY = {"module.": "as DataParallel and its like have it"}
_ATTRIBUTE = "the name that the LightningModule has for its model"
# Wrappers around one another that are taken away: real models have two or three.
_MOST_WRAPPERS = 8


class Flat:
    """The tensors of a part by their flat names.

    ``objects`` are the keys of what is no tensor, ``counters`` the counters of averages that went with their wrapper, ``findings`` what
    was done to the names. Raises ``KeyMismatch`` where two tensors would get one name.
    """

    def __init__(self, part: StateDict, source: Checkpoint, spared: Rules) -> None:
        """``spared`` are rules that come after: a wrapper that one of them names is left to it."""
        made = source.with_root(part.node)
        lightning = ("pytorch-lightning_version",) in source.manifest.objects
        self.part = part
        self.findings: list[Finding] = []
        self.counters: list[TensorEntry] = []
        for rule, why in _unwrapping(part, spared, lightning):
            if rule.name == "drop":
                self.counters += [leaf for leaf in made.manifest.tensors.values() if leaf.key == COUNTER]
            made = rules.apply(made, rule)
            self.findings.append(Finding("wrapper-stripped", "info", f"{rule}: {why}"))
        self.tensors: dict[str, TensorEntry] = {}
        self.objects: list[str] = []
        root = made.manifest.structure
        for path, leaf in walk(root):
            name = dotted(path)
            if isinstance(leaf, ObjectEntry):
                self.objects.append(name)
            elif name in self.tensors:
                hint = f"To keep the nesting, take the part as it is: --at {dotted(part.path)}, without --weights-only"
                raise KeyMismatch("two tensors would have one key in a flat state dict", key=name, hint=hint)
            else:
                self.tensors[name] = leaf
        self._root = root

    def node(self, tensors: dict[str, TensorEntry]) -> Container:
        """The state dict of these tensors, a plain dict or an OrderedDict with its ``_metadata``."""
        root = self._root
        is_ordered = isinstance(root, Container) and root.kind == "OrderedDict"
        known = root.attributes if isinstance(root, Container) else {}
        metadata = {name: value for name, value in known.items() if name == "_metadata"}
        entries = [_plain(entry) for entry in tensors.values()]
        return Container("OrderedDict" if is_ordered else "dict", list(tensors), entries, attributes=metadata)


def _plain(entry: TensorEntry) -> TensorEntry:
    """The tensor as a state dict has it, on the CPU: no Parameter, no Python attributes, no gradient wanted."""
    device = entry.device if entry.view is None and not entry.parts else "cpu"
    attributes = entry.attributes if entry.layout != "strided" else {}
    kind = entry.kind if entry.layout == "wrapper" else "Tensor"
    return entry._replace(kind=kind, requires_grad=False, device=device, attributes=attributes)


def _unwrapping(part: StateDict, spared: Rules, lightning: bool) -> Iterator[tuple[Rule, str]]:
    """The rules that take wrappers out of the keys, each with the reason, in the order in which they are to be applied.

    Those that begin with an underscore are nobody's own names. ``module.``, and in a file of Lightning's the attribute that holds
    the model, are taken where every key begins so.
    """
    names = [dotted(path) for path, _ in walk(part.node)]
    for word in in_source(names, {}):
        if word.startswith("_") and not _is_named(word, spared):
            rule = rules.strip_wrapper(word)
            renamed = [rule.renamed(name) or name for name in names]
            count = sum(map(str.__ne__, names, renamed))
            yield rule, f"{plural(count, 'key')} had this component of a wrapper of torch's"
            names = renamed
    prefixes = ("module.", *_LIGHTNING) if lightning else ("module.",)
    for _ in range(_MOST_WRAPPERS):
        prefix = _common(names, prefixes)
        if prefix is None or _is_named(prefix[:-1], spared):
            return
        if COUNTER in names:
            yield rules.drop(COUNTER), "the counter of an AveragedModel"
            names.remove(COUNTER)
        yield rules.strip_prefix(prefix), f"all keys began so, {_WRAPPED_BY.get(prefix, _ATTRIBUTE)}"
        names = [name[len(prefix) :] for name in names]


def _is_named(word: str, spared: Rules) -> bool:
    """Whether one of the rules is about keys with that component."""
    component = re.compile(rf"(?<![\w.]){re.escape(word)}(\\*\.|')")
    return any(component.search(str(rule)) for rule in spared if rule.name not in ("add_prefix", "add_wrapper"))


def _common(names: Collection[str], prefixes: Sequence[str]) -> str | None:
    """Which of the prefixes all names begin with; the counter of an AveragedModel may stand beside ``module.``."""
    for prefix in prefixes:
        inside = [name for name in names if not (name == COUNTER and prefix == "module.")]
        if inside and all(name.startswith(prefix) and len(name) > len(prefix) for name in inside):
            return prefix
    return None

"""What a comparison found: the records of what differs, what they come to, and the rules that turn one side into the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from statedict.ops.comparing.changes import Change, Found
from statedict.ops.comparing.exports import rules_of, steps_of
from statedict.ops.comparing.parts import Part, parts_of
from statedict.ops.comparing.tables import blocks_of
from statedict.report.document import Document
from statedict.report.result import Result
from statedict.report.units import plural

if TYPE_CHECKING:
    from statedict.rules import Rules

__all__ = ["Comparison"]

# Parts of a network that the summary names, and characters of their names; where there are more, it names none.
_PLACES = 3
_PLACES_LENGTH = 100


class Comparison(Result):
    """Two checkpoints side by side. ``bool()`` says whether they are equal.

    Attributes: ``equal``, ``only_in_a`` and ``only_in_b`` (keys), ``changed`` (a ``Change`` for each key that differs, also within
    the tolerance), ``renamed`` (``{a, b, proof}``: what only one side seemed to have), ``rules`` (that give A the names and
    shapes of B), ``counts``, ``findings``, ``source_a``, ``source_b``.
    """

    __slots__ = ("_found", "changed", "counts", "findings", "only_in_a", "only_in_b", "renamed", "source_a", "source_b")

    schema = "statedict.comparison/1"

    def __init__(self, sources: tuple[str, str], found: Found) -> None:
        self._found = found
        self.source_a, self.source_b = sources
        self.changed = list(found.changed)
        self.only_in_a, self.only_in_b = list(found.only[0]), list(found.only[1])
        self.renamed: list[dict[str, object]] = [rename.to_dict() for rename in found.renamed]
        self.counts = dict(found.counts)
        self.findings = found.findings

    @property
    def equal(self) -> bool:
        """Whether keys, shapes, dtypes, values and ties are the same; values within the tolerance are."""
        if self.only_in_a or self.only_in_b or self.renamed:
            return False
        return all(change.is_equal for change in self.changed)

    def __bool__(self) -> bool:
        return self.equal

    def __repr__(self) -> str:
        return f"Comparison({'equal' if self.equal else 'different'}: {self.summary})"

    @property
    def rules(self) -> Rules:
        """The rules that turn A into B as far as rules can: names, order of dimensions, parts, dtypes and ties, no values."""
        return rules_of(steps_of(self.changed, self._found.renamed, self._found.tensors))

    def to_dict(self) -> dict[str, object]:
        """The facts, JSON-ready: ``statedict.comparison/1``."""
        return {
            "schema": self.schema,
            "equal": self.equal,
            "summary": self.summary,
            "counts": dict(self.counts),
            "only_in_a": list(self.only_in_a),
            "only_in_b": list(self.only_in_b),
            "changed": [change.to_dict() for change in self.changed],
            "renamed": list(self.renamed),
            "findings": [finding.to_dict() for finding in self.findings],
        }

    @property
    def parts(self) -> list[Part]:
        """Where tensors changed: the largest subtrees in which all did (``layers.{0…11}.attn.*``), or single keys."""
        return parts_of([change.key for change in self._changed_tensors], self._found.tensors[0])

    @property
    def _changed_tensors(self) -> list[Change]:
        kinds = ("aliasing", "object")
        return [change for change in self.changed if change.kind not in kinds and not change.is_equal]

    @property
    def summary(self) -> str:
        """What differs, in one sentence."""
        counts = self.counts
        tensors, values = counts["tensors"], counts["objects"]
        if self.equal and not counts["within_tolerance"]:
            if not tensors:
                return f"The same {plural(values, 'value')}." if values else "Both are empty."
            also = f" and {plural(values, 'other value')}" if values else ""
            return f"The same {plural(tensors, 'tensor')}{also}."
        real = self._changed_tensors
        said = [f"{len(real):,} of {plural(tensors, 'tensor')} changed{self._place(real)}"] if real else []
        said += self._beside()
        rest = tensors - len(real) - counts["within_tolerance"] - counts["without_values"]
        if rest:
            is_whole = counts["identical"] == rest
            said.append(f"{'the rest ' if said else ''}{'byte-identical' if is_whole else 'the same'}")
        elif values and not counts["object"]:
            said.append("the rest the same")
        text = "; ".join(said) + "."
        return f"Same network; {text}" if tensors and self._is_same_network else text[:1].upper() + text[1:]

    @property
    def _is_same_network(self) -> bool:
        """Whether both have the same tensors by name and shape."""
        return not (self.counts["shape"] or self.renamed or self.only_in_a or self.only_in_b)

    def _beside(self) -> list[str]:
        """What differs beside the values of tensors."""
        counts = self.counts
        others, ties, near = counts["object"], counts["aliasing"], counts["within_tolerance"]
        said = [f"{plural(others, 'other value')} changed"] if others else []
        said += [f"{plural(len(self.renamed), 'tensor')} renamed"] if self.renamed else []
        sides = ("A", self.only_in_a), ("B", self.only_in_b)
        said += [f"{plural(len(keys), 'key')} only in {side}" for side, keys in sides if keys]
        said += [f"{plural(ties, 'tensor')} tied otherwise"] if ties else []
        said += [f"{plural(near, 'tensor')} within the tolerance"] if near else []
        return said

    def _place(self, changes: Sequence[Change]) -> str:
        """Where the changes are, if that is a few places and not everywhere."""
        if len(changes) == 1:
            return f": {changes[0].key}"
        parts = self.parts
        names = [part.name for part in parts]
        if len(changes) == self.counts["tensors"] or len(names) > _PLACES or len(", ".join(names)) > _PLACES_LENGTH:
            return _shared(changes) if len(changes) < self.counts["tensors"] else ""
        return f", all in {', '.join(names[:-1])}{' and ' if len(names) > 1 else ''}{names[-1]}"

    def document(self) -> Document:
        """The summary, then a table of each kind of difference; keys that differ in their numbers alone share a line."""
        return Document(f"A: {self.source_a}, B: {self.source_b}", blocks_of(self._found, self.summary, self.parts))


def _shared(changes: Sequence[Change]) -> str:
    """The module that all changes are in, if there is one."""
    parts = [change.key.split(".")[:-1] for change in changes]
    shared = 0
    while all(len(part) > shared and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    return f", all in {'.'.join(parts[0][:shared])}.*" if shared else ""

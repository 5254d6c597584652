"""What loading into a model or an optimizer has done: facts by key, and how much of the target they cover."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from statedict.manifest import Finding
from statedict.report.document import Block, Column, Document, Facts, Table
from statedict.report.result import Result
from statedict.report.units import plural

__all__ = ["Coverage", "LoadReport"]


class Coverage(NamedTuple):
    """The share of the target that was loaded, from 0 to 1: of its keys, of their elements, of their bytes."""

    keys: float = 1.0
    parameters: float = 1.0
    bytes: float = 1.0


class LoadReport(Result):
    """What was loaded, and everything that was not or not as it was.

    The lists hold keys of the target, ``unexpected`` those of the source:

    - ``loaded``: filled from the source, under whatever name it had there
    - ``missing``: the source has nothing for them
    - ``unexpected``: of the source, and the target has no such key
    - ``mismatched``: another shape, left as they were (only with ``strict=False``)
    - ``cast``: loaded, and of another dtype in the source
    - ``tied``: one tensor of the target under several keys; filled through one of them, and still tied
    - ``untouched``: everything of the target that is as it was before

    ``coverage`` is the share by ``keys``, ``parameters`` and ``bytes``; ``rules`` are those that were applied; ``details`` say of
    a key what was another in the source; ``overridden`` has each hyperparameter of an optimizer that the source has changed,
    as ``(before, after)`` by its name; ``matched_by`` is ``name`` or ``position``; ``findings`` are sentences for people;
    ``method`` says how the bytes were read.
    """

    schema = "statedict.load-report/1"

    def __init__(
        self,
        *,
        source: str,
        target: str,
        loaded: Iterable[str] = (),
        missing: Iterable[str] = (),
        unexpected: Iterable[str] = (),
        mismatched: Iterable[str] = (),
        cast: Iterable[str] = (),
        tied: Iterable[str] = (),
        untouched: Iterable[str] = (),
        coverage: Coverage = Coverage(),  # noqa: B008
        rules: Sequence[object] = (),
        details: Mapping[str, str] | None = None,
        overridden: Mapping[str, tuple[object, object]] | None = None,
        matched_by: str = "name",
        findings: Sequence[Finding] = (),
        method: Mapping[str, object] | None = None,
    ) -> None:
        self.source = source
        self.target = target
        self.loaded = tuple(loaded)
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.mismatched = tuple(mismatched)
        self.cast = tuple(cast)
        self.tied = tuple(tied)
        self.untouched = tuple(untouched)
        self.coverage = coverage
        self.rules = tuple(rules)
        self.details = dict(details or {})
        self.overridden = dict(overridden or {})
        self.matched_by = matched_by
        self.findings = tuple(findings)
        self.method = dict(method or {})

    def __repr__(self) -> str:
        return (
            f"LoadReport({len(self.loaded)} loaded, {len(self.missing)} missing, {len(self.unexpected)} unexpected, "
            f"{len(self.mismatched)} mismatched)"
        )

    @property
    def _lists(self) -> dict[str, tuple[str, ...]]:
        names = ("loaded", "missing", "unexpected", "mismatched", "cast", "tied", "untouched")
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, object]:
        """The facts, JSON-ready: ``statedict.load-report/1``."""
        return {
            "schema": self.schema,
            "source": self.source,
            "target": self.target,
            **{name: list(keys) for name, keys in self._lists.items()},
            "coverage": self.coverage._asdict(),
            "rules": [str(rule) for rule in self.rules],
            "details": dict(self.details),
            "overridden": {name: [repr(old), repr(new)] for name, (old, new) in self.overridden.items()},
            "matched_by": self.matched_by,
            "findings": [finding.to_dict() for finding in self.findings],
            "method": dict(self.method),
        }

    def document(self) -> Document:
        """The facts as a document; what was loaded as it was is only counted."""
        from statedict.ops.listing import notes_of  # only who shows it waits for that

        share = self.coverage
        pairs = [
            ("loaded", f"{plural(len(self.loaded), 'key')} of {self.target}"),
            (
                "covers",
                f"{share.keys:.1%} of the keys, {share.parameters:.1%} of the parameters, {share.bytes:.1%} of the bytes",
            ),
        ]
        pairs += [("rule", str(rule)) for rule in self.rules]
        if self.matched_by != "name":
            pairs.append(("matched", f"by {self.matched_by}: the source has no names"))
        blocks: list[Block] = [Facts(pairs)]
        rows = [
            [key, name, self.details.get(key, "")]
            for name, keys in self._lists.items()
            if name not in ("loaded", "untouched")
            for key in keys
        ]
        if rows:
            blocks.append(Table([Column("key", "key"), Column("what"), Column("how")], rows))
        changed = [[name, repr(old), repr(new)] for name, (old, new) in self.overridden.items()]
        if changed:
            blocks.append(Table([Column("hyperparameter", "key"), Column("was"), Column("is")], changed))
        return Document(f"Loaded {self.source}", [*blocks, *notes_of(self.findings)])

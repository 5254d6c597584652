"""What the doctor found: about one checkpoint, or about what makes one of another."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from statedict.aligning.alignment import Left, Mapped
from statedict.errors import KeyMismatch, one_line
from statedict.manifest import Finding
from statedict.ops.diagnosing.wording import findings_of, op_in_words, question_of, sentence_of
from statedict.ops.findings import command, named
from statedict.ops.listing import notes_of
from statedict.ops.load_report import Coverage
from statedict.report.document import Block, Column, Document, Facts, Heading, Paragraph, Table
from statedict.report.result import Result
from statedict.report.units import plural
from statedict.rules import Rules
from statedict.tree import fold

if TYPE_CHECKING:
    from statedict.ops.conversion import Conversion
    from statedict.ops.diagnosing.examination import Examination
    from statedict.ops.diagnosing.outline import Outline

__all__ = ["Diagnosis"]

# Rows of the plan, and rules, that are shown before the rest is only counted.
_ROWS = 60
_RULES = 40
# Sources that a row names.
_NAMED = 3


class Diagnosis(Result):
    """What was found, and what to do.

    Attributes: ``source`` and ``target`` (their names; no target: None), ``sentence`` (the first thing to say), ``findings`` (the gravest
    first), ``plan`` (for each key of the target that something can be said about, what makes it: ``target``, ``op``, ``sources``, ``args``,
    ``tier``, ``reasons``, ``alternatives``, ``question``), ``dropped`` and ``unfilled`` (keys that no sure mapping uses or fills, each with
    the reason), ``rules`` (what carries out the sure part of the plan), ``coverage`` (of the target: shares of keys, parameters and
    bytes), ``question`` (what a person has to decide first; empty where nothing is open), ``refusal`` (why nothing is mapped).

    ``bool()`` says that nothing has to be done: one checkpoint looks right, or has what the other has under the same names.
    """

    schema = "statedict.diagnosis/1"

    def __init__(
        self,
        source: object,
        name: str,
        *,
        examination: Examination | None = None,
        wanted: object = None,
        target: str | None = None,
        outline: Outline | None = None,
    ) -> None:
        self._source = source
        self._typed = source, wanted
        self._outline = outline
        self.examination = examination
        self.source = name
        self.target = target
        self.plan: tuple[Mapped, ...] = () if outline is None else outline.mapped
        self.dropped: tuple[Left, ...] = () if outline is None else outline.dropped
        self.unfilled: tuple[Left, ...] = () if outline is None else outline.unfilled
        self.rules = Rules() if outline is None else outline.rules
        self.refusal = "" if outline is None else outline.refusal
        self.coverage = None if outline is None else outline.coverage()
        own: Sequence[Finding] = () if examination is None else examination.findings
        made = [] if outline is None else list(findings_of(outline))
        order = {"error": 0, "warning": 1}
        self.findings = tuple(sorted([*made, *own], key=lambda finding: order.get(finding.level, 2)))
        self.question = (
            question_of(self.plan) if outline is not None else "" if examination is None else examination.question
        )

    def __repr__(self) -> str:
        return f"Diagnosis({self.sentence})"

    def __bool__(self) -> bool:
        if self._outline is not None:
            return self._outline.fits
        return self.examination is None or bool(self.examination)

    @property
    def sentence(self) -> str:
        """The first thing to say, in one sentence."""
        if self._outline is not None:
            return sentence_of(self._outline)
        return "" if self.examination is None else self.examination.sentence

    def to_dict(self) -> dict[str, object]:
        """The facts, JSON-ready: ``statedict.diagnosis/1``."""
        if self._outline is None and self.examination is not None:
            found = self.examination.to_dict()
            return found if self.target is None else {**found, "target": self.target, "sentence": self.sentence}
        made: dict[str, object] = {
            "schema": self.schema,
            "source": self.source,
            "target": self.target,
            "sentence": self.sentence,
            "findings": [finding.to_dict() for finding in self.findings],
            "plan": [_entry(mapped) for mapped in self.plan],
            "dropped": [left._asdict() for left in self.dropped],
            "unfilled": [left._asdict() for left in self.unfilled],
            "rules": self.rules.to_dict(),
            "coverage": {} if self.coverage is None else self.coverage._asdict(),
        }
        made.update({"question": self.question} if self.question else {})
        return {**made, "refusal": self.refusal} if self.refusal else made

    def fix(self, path: str | os.PathLike[str], *, overwrite: bool = False, allow_partial: bool = False) -> Conversion:
        """Write the checkpoint that the rules make, which has the target's names and shapes, as ``convert`` writes.

        Only what is proven or corroborated is in it. Where a tensor of the target would be missing, because nothing fills it or a person
        has to decide, nothing is written and ``KeyMismatch`` says what is open, unless ``allow_partial``; what a model makes again by
        itself may be missing. Dtypes stay those of the source. Raises what ``convert`` raises.
        """
        from statedict.ops.convert import convert

        outline = self._outline
        hint = "statedict doctor SOURCE --for TARGET shows what is different"
        if outline is None or not outline.claims:
            raise KeyMismatch(f"there is nothing to write: {one_line(self.sentence)}", path=self.source, hint=hint)
        if outline.problem:
            raise KeyMismatch(f"no rules make this plan: {outline.problem}", path=self.source)
        if outline.open_keys and not allow_partial:
            asked = f": {one_line(self.question)}" if self.question else ""
            raise KeyMismatch(
                f"{plural(len(outline.open_keys), 'tensor')} of the target would be missing ({named(outline.open_keys)}){asked}",
                path=self.source,
                missing=outline.open_keys,
                hint="allow_partial=True writes the rest",
            )
        return convert(self._source, path, rules=self.rules, overwrite=overwrite)

    def document(self) -> Document:
        """At most five lines, then the plan, the rules, and what was found."""
        if self._outline is None:
            return Document(self.source, [] if self.examination is None else [*self.examination.blocks()])
        blocks: list[Block] = [Facts(list(self._lines())), *self._plan(), *self._rules(), *notes_of(self.findings)]
        return Document(f"{self.source} for {self.target}", blocks)

    def _lines(self) -> Iterator[tuple[str, str]]:
        yield "Verdict", self.sentence
        if self.coverage is not None and not self.refusal:
            yield "Covers", _share(self.coverage)
        if self.question:
            yield "Open", self.question
        typed = [os.fspath(each) for each in self._typed if isinstance(each, (str, os.PathLike))]
        if self.rules and not self and len(typed) == 2:
            yield "To do", command("doctor", typed[0], "--for", typed[1], "--fix", "OUT.safetensors")

    def _plan(self) -> Iterator[Block]:
        """What changes, layers folded; what stays as it is is only counted."""
        changing = [
            each for each in self.plan if each.op != "copy" or each.sources != (each.target,) or not each.is_claim
        ]
        if not changing:
            return
        rows = []
        for group in fold((each.target, _facts(each)) for each in changing):
            first, last = (changing[group.members[at]] for at in (0, -1))
            count = f"×{group.times:,}" if group.times > 1 else ""
            rows.append([group.key, count, op_in_words(first.op, first.args), _sources(first, last), first.tier])
        yield Heading("Plan")
        columns = [Column("Target", "key"), Column("Count"), Column("Made by"), Column("Of", "key"), Column("How sure")]
        yield Table(columns, rows[:_ROWS], sortable=False)
        same = len(self.plan) - len(changing)
        notes = [f"{len(rows) - _ROWS:,} lines more"] if len(rows) > _ROWS else []
        notes += [f"{plural(same, 'tensor')} stay as they are"] if same else []
        if notes:
            yield Paragraph("; ".join(notes))

    def _rules(self) -> Iterator[Block]:
        if self.rules:
            shown = [(str(at), one_line(str(rule))) for at, rule in enumerate(self.rules, 1)]
            yield Heading("Rules")
            yield Facts(shown[:_RULES])
            if len(shown) > _RULES:
                yield Paragraph(f"{len(shown) - _RULES:,} rules more")


def _share(coverage: Coverage) -> str:
    return f"{coverage.keys:.1%} of the target's keys, {coverage.parameters:.1%} of its parameters, {coverage.bytes:.1%} of its bytes"


def _facts(mapped: Mapped) -> tuple[str, ...]:
    """What layers share that are one row."""
    from statedict.keys import template

    forms = [template(key)[0] for key in mapped.sources[:1]]
    return (*forms, op_in_words(mapped.op, mapped.args), mapped.tier, str(len(mapped.sources)))


def _sources(first: Mapped, last: Mapped) -> str:
    """The sources of a row: of the first layer, and of the last where there are several."""
    if not first.sources:
        return " or ".join(["+".join(keys[:_NAMED]) for keys in first.alternatives[:_NAMED]])
    more = f" and {len(first.sources) - _NAMED:,} more" if len(first.sources) > _NAMED else ""
    shown = ", ".join(first.sources[:_NAMED]) + more
    if last.target == first.target or len(first.sources) > 1:
        return shown
    return f"{first.sources[0]} … {last.sources[0]}" if last.sources[0] != first.sources[0] else shown


def _entry(mapped: Mapped) -> dict[str, object]:
    """One entry of the plan, JSON-ready."""
    made: dict[str, object] = {
        "target": mapped.target,
        "op": mapped.op,
        "sources": list(mapped.sources),
        "args": dict(mapped.args),
        "tier": mapped.tier,
        "reasons": list(mapped.reasons),
    }
    if mapped.alternatives:
        made["alternatives"] = [list(keys) for keys in mapped.alternatives]
    return {**made, "question": mapped.question} if mapped.question else made

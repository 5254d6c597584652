"""What the doctor found in one checkpoint: findings, facts, and the few lines that come first."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from statedict.errors import one_line
from statedict.manifest import Finding
from statedict.ops.listing import notes_of
from statedict.report.document import Block, Document, Facts
from statedict.report.result import Result
from statedict.report.units import human_bytes, human_count, plural

__all__ = ["Examination"]

_LEVELS = {"error": 0, "warning": 1, "info": 2}
# What is nothing wrong, but the first thing to know.
_NOTABLE = frozenset(
    {"never-trained", "optimizer-only", "scheduler-only", "lora-adapter", "two-candidates", "training-checkpoint"}
)
# Columns that one of the first lines has, and how many of them the verdict may take: all are five lines at most.
_LINE = 84
_VERDICT_LINES = 2


class Examination(Result):
    """The findings about one checkpoint, the gravest first, and the facts.

    ``facts`` are JSON-ready: ``readable``, ``format``, ``nbytes``, ``tensors``, ``parameters`` (of the first state dict), ``dtypes``,
    ``weights`` (of each state dict ``key``, ``tensors``, ``parameters``, ``is_average``), ``saved_from``, ``optimizer``, ``progress``,
    ``network`` and ``looks_like`` where shapes say something, and ``read``: ``values`` or ``header``.

    ``question`` is what only a person can decide; empty where there is nothing. ``bool()`` says whether nothing looks wrong.
    """

    __slots__ = ("facts", "findings", "question", "source")

    schema = "statedict.diagnosis/1"

    def __init__(
        self, source: str, findings: Sequence[Finding], facts: Mapping[str, object], question: str = ""
    ) -> None:
        self.source = source
        self.findings = tuple(sorted(findings, key=lambda finding: _LEVELS.get(finding.level, 2)))
        self.facts = facts
        self.question = question

    def __bool__(self) -> bool:
        return not self.wrong

    def __repr__(self) -> str:
        return f"Examination({self.source!r}, {len(self.wrong)} of {plural(len(self.findings), 'finding')} are grave)"

    @property
    def wrong(self) -> tuple[Finding, ...]:
        """The findings that aren't only worth knowing."""
        return tuple([finding for finding in self.findings if finding.level != "info"])

    @property
    def sentence(self) -> str:
        """The first thing to say, in one sentence."""
        if not self.findings or not self.wrong:
            seen = "" if self.facts.get("read") == "values" else " in its header; the values weren't read"
            note = next((finding for finding in self.findings if finding.code in _NOTABLE), None)
            return f"Nothing looks wrong{seen}." + (f" {_first_sentence(note.message)}" if note is not None else "")
        first = _first_sentence(self.wrong[0].message)
        others = len(self.wrong) - 1
        return (
            first
            if not others
            else f"{first} And {plural(others, 'other thing')} {'looks' if others == 1 else 'look'} wrong."
        )

    def to_dict(self) -> dict[str, object]:
        """The facts, JSON-ready, in the form of a diagnosis without a target: ``statedict.diagnosis/1``."""
        made: dict[str, object] = {
            "schema": self.schema,
            "source": self.source,
            "findings": [finding.to_dict() for finding in self.findings],
            "facts": dict(self.facts),
            "plan": [],
            "rules": [],
            "coverage": {},
        }
        return {**made, "question": self.question} if self.question else made

    def document(self) -> Document:
        """At most five lines, then the findings."""
        return Document(self.source, [*self.blocks()])

    def blocks(self) -> Iterator[Block]:
        """The lines and the findings, as parts of a document."""
        yield Facts(list(self._lines()))
        yield from notes_of(self.findings)

    def _lines(self) -> Iterator[tuple[str, str]]:
        yield "Verdict", _cut(self.sentence, _VERDICT_LINES * _LINE)
        for name, value in (
            ("File", self._file()),
            ("From", self._from()),
            ("Network", str(self.facts.get("looks_like", ""))),
        ):
            if value:
                yield name, _cut(value, _LINE)

    def _file(self) -> str:
        facts = self.facts
        if not facts.get("readable"):
            nbytes = facts.get("nbytes")
            return human_bytes(nbytes) if isinstance(nbytes, int) else ""
        sizes = [facts.get(name) for name in ("nbytes", "tensors", "parameters")]
        nbytes, tensors, parameters = [each if isinstance(each, int) else 0 for each in sizes]
        words = [str(facts.get("format"))]
        words += [human_bytes(nbytes)] if nbytes else []
        words.append(plural(tensors, "tensor"))
        words += [f"{human_count(parameters)} parameters"] if parameters else []
        dtypes = facts.get("dtypes")
        return ", ".join([*words, *(dtypes if isinstance(dtypes, list) else [])[:3]])

    def _from(self) -> str:
        words: list[str] = []
        weights = self.facts.get("weights")
        if isinstance(weights, list):
            keys = [one_line(each["key"]) for each in weights if each["key"]]
            words += [f"weights under {', '.join([repr(key) for key in keys[:3]])}"] if keys else []
        origins = self.facts.get("saved_from")
        words += [str(name) for name in origins] if isinstance(origins, list) else []
        optimizer = self.facts.get("optimizer")
        words += [f"the state of {optimizer}"] if optimizer else []
        progress = self.facts.get("progress")
        words += (
            [f"{name} {one_line(value)}" for name, value in progress.items()][:2] if isinstance(progress, dict) else []
        )
        return ", ".join(words)


def _first_sentence(message: str) -> str:
    """Up to the first full stop that ends a sentence."""
    found = re.match(r".*?[.!](?= [A-Z`]|$)", message)
    text = found[0] if found is not None else message
    text = text if text.endswith((".", "!")) else f"{text}."
    return text[:1].upper() + text[1:]


def _cut(text: str, most: int) -> str:
    """The text, cut behind a word where it is longer."""
    return text if len(text) <= most else text[: text.rfind(" ", most // 2, most)].rstrip(",;:") + " …"

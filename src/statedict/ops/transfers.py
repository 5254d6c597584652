"""What saving and loading have done: how the bytes went, what was checked, and what isn't as it was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from statedict.manifest import Finding
from statedict.report.document import Block, Document, Facts
from statedict.report.result import Result
from statedict.report.units import human_bytes, plural

__all__ = ["ReadReport", "SaveReport"]


class ReadReport(Result):
    """What ``load`` has read, given to its ``on_report``.

    Attributes: ``source``, ``format``, ``tensors`` and ``objects`` (counts), ``nbytes`` (of the storages loaded), ``method`` (how they
    were read: threads, block size, file system, bytes mapped), ``unchecked`` (keys whose file has a digest or CRC that wasn't
    looked at: mapped, read in part, or ``check=False``), ``kept_on_cpu`` (keys of random states, which no ``map_location``
    moves), ``findings``.
    """

    schema = "statedict.read-report/1"

    def __init__(
        self,
        *,
        source: str,
        format: str,
        tensors: int,
        objects: int,
        method: Mapping[str, object],
        unchecked: Iterable[str] = (),
        kept_on_cpu: Iterable[str] = (),
        findings: Sequence[Finding] = (),
    ) -> None:
        self.source = source
        self.format = format
        self.tensors = tensors
        self.objects = objects
        self.nbytes = int(str(method.get("nbytes", 0)))
        self.method = dict(method)
        self.unchecked = tuple(unchecked)
        self.kept_on_cpu = tuple(kept_on_cpu)
        self.findings = tuple(findings)

    def __repr__(self) -> str:
        return f"ReadReport({self.source!r}, {self.tensors} tensors, {self.nbytes} bytes)"

    def to_dict(self) -> dict[str, object]:
        """The facts, JSON-ready: ``statedict.read-report/1``."""
        return {
            "schema": self.schema,
            "source": self.source,
            "format": self.format,
            "tensors": self.tensors,
            "objects": self.objects,
            "nbytes": self.nbytes,
            "method": dict(self.method),
            "unchecked": list(self.unchecked),
            "kept_on_cpu": list(self.kept_on_cpu),
            "findings": [finding.to_dict() for finding in self.findings],
        }

    def document(self) -> Document:
        """The facts as a document."""
        from statedict.ops.listing import notes_of  # only who shows it waits for that

        pairs = [
            ("from", f"{self.source} ({self.format})"),
            (
                "loaded",
                f"{human_bytes(self.nbytes)}, {plural(self.tensors, 'tensor')}, {plural(self.objects, 'other value')}",
            ),
        ]
        pairs += [(name.replace("_", " "), str(value)) for name, value in self.method.items() if name != "nbytes"]
        pairs += [("not checked", plural(len(self.unchecked), "tensor"))] if self.unchecked else []
        pairs += [("kept on the CPU", ", ".join(self.kept_on_cpu))] if self.kept_on_cpu else []
        blocks: list[Block] = [Facts(pairs), *notes_of(self.findings)]
        return Document(f"Loaded {self.source}", blocks)


class SaveReport(Result):
    """What ``save`` has written.

    Attributes: ``path``, ``format``, ``tensors`` and ``objects`` (counts), ``nbytes`` (of the file), ``removed_nbytes`` (of storages
    that no tensor shows, left out), ``digests``, ``atomic`` (it appeared at once, complete), ``durable`` (it outlives a power
    cut), ``method`` (bytes by the way they took, threads, block size, file system), ``seconds``, ``findings``.
    """

    schema = "statedict.save-report/1"

    def __init__(
        self,
        *,
        path: str,
        format: str,
        tensors: int,
        objects: int,
        nbytes: int,
        removed_nbytes: int,
        digests: bool,
        atomic: bool,
        durable: bool,
        method: Mapping[str, object],
        seconds: float,
        findings: Sequence[Finding] = (),
    ) -> None:
        self.path = path
        self.format = format
        self.tensors = tensors
        self.objects = objects
        self.nbytes = nbytes
        self.removed_nbytes = removed_nbytes
        self.digests = digests
        self.atomic = atomic
        self.durable = durable
        self.method = dict(method)
        self.seconds = seconds
        self.findings = tuple(findings)

    def __repr__(self) -> str:
        return f"SaveReport({self.path!r}, {self.tensors} tensors, {self.nbytes} bytes)"

    def to_dict(self) -> dict[str, object]:
        """The facts, JSON-ready: ``statedict.save-report/1``."""
        return {
            "schema": self.schema,
            "path": self.path,
            "format": self.format,
            "tensors": self.tensors,
            "objects": self.objects,
            "nbytes": self.nbytes,
            "removed_nbytes": self.removed_nbytes,
            "digests": self.digests,
            "atomic": self.atomic,
            "durable": self.durable,
            "method": dict(self.method),
            "seconds": round(self.seconds, 3),
            "findings": [finding.to_dict() for finding in self.findings],
        }

    def document(self) -> Document:
        """The facts as a document."""
        from statedict.ops.listing import notes_of  # only who shows it waits for that

        size = f"{human_bytes(self.nbytes)}, {plural(self.tensors, 'tensor')}, {plural(self.objects, 'other value')}"
        pairs = [("to", f"{self.path} ({self.format})"), ("written", size)]
        if self.removed_nbytes:
            pairs.append(("left out", f"{human_bytes(self.removed_nbytes)} that no tensor needs"))
        pairs.append(("digests", "one of each tensor, xxh3-128" if self.digests else "none"))
        pairs.append(("atomic", "yes" if self.atomic else "no: an open file is written in order"))
        pairs.append(("durable", "yes" if self.durable else "no: after a power cut it may be missing or damaged"))
        blocks: list[Block] = [Facts(pairs), *notes_of(self.findings)]
        return Document(f"Saved {self.path}", blocks)

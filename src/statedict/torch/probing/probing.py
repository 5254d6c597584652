"""A plan tried on a model that can be run: what is used, what comes out, where it goes wrong, and what that decides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from statedict.aligning.alignment import PROVEN, Alignment, Mapped
from statedict.errors import StateDictError, one_line
from statedict.manifest import Finding
from statedict.ops.diagnosing.carrying import Misfit
from statedict.ops.diagnosing.probes import Probe
from statedict.ops.diagnosing.weights import Weights
from statedict.ops.mismatches import listed
from statedict.report.units import plural
from statedict.torch.probing.divergence import Trace, first_difference, traced
from statedict.torch.probing.effects import without_effect
from statedict.torch.probing.filling import Filling
from statedict.torch.probing.questions import decide
from statedict.torch.probing.running import closeness, copied, is_close, outputs_of, recorded, run, tensors_in
from statedict.torch.targets import can_make_again

__all__ = ["Probed", "probed"]


class Probed(NamedTuple):
    """The plan with what the probe has decided or proven, and what is to be said."""

    alignment: Alignment
    findings: tuple[Finding, ...]


def probed(module: torch.nn.Module, source: Weights, alignment: Alignment, probe: object) -> Probed:
    """Fill a copy of the module as the plan says, and run it. The module is not changed; the claims are read, one tensor at a time.

    Raises ``StateDictError`` where the model can't be copied or run.
    """
    return _Probing(module, source, alignment, Probe.of(probe)).result()


class _Probing:
    def __init__(self, module: torch.nn.Module, source: Weights, alignment: Alignment, probe: Probe) -> None:
        self._probe = probe
        self._alignment = alignment
        self._filling = Filling(copied(module), source)
        self._findings: list[Finding] = []
        self._trace: Trace = ()
        self._expected: list[torch.Tensor] = []

    def result(self) -> Probed:
        """The plan and the findings."""
        claims = [mapped for mapped in self._alignment.mapped if mapped.is_claim]
        if not claims and not self._probe.knows_the_answer:
            return self._end("probe-not-run", "info", "nothing of the plan is sure, so there is nothing to try")
        try:
            self._filling.fill(claims)
        except Misfit as error:
            return self._end("probe-not-run", "warning", f"the plan can't be carried out: {error}")
        questions = [mapped for mapped in self._alignment.mapped if not mapped.is_claim and mapped.sources]
        names = [mapped.target for mapped in questions]
        waiting = set(self._filling.empty).difference(names)
        if waiting:
            what = (
                f"the model can't be run: {listed(sorted(waiting))} {'has' if len(waiting) == 1 else 'have'} no values"
            )
            return self._end("probe-not-run", "warning", what)
        self._learn()
        decided = self._decided(questions)
        if self._filling.empty or not (claims or decided):
            return self._end(
                "probe-not-run",
                "warning",
                f"the model isn't run: {listed(self._filling.empty or names)} aren't decided",
            )
        return self._judged([*claims, *decided])

    def _end(self, code: str, level: str, message: str, keys: Iterable[str] = ()) -> Probed:
        self._findings.append(Finding(code, level, message, tuple(keys)))
        return Probed(self._alignment, tuple(self._findings))

    # ---------------------------------------------------------------- what is right

    def _learn(self) -> None:
        """Run the reference, if there is one."""
        expected = self._probe.expected
        if self._probe.reference is not None:
            self._trace, output = traced(self._probe.reference, self._probe.inputs)
            expected = output if expected is None else expected
        self._expected = [tensor.detach() for tensor in tensors_in(expected)]
        if self._probe.knows_the_answer and not self._expected:
            raise StateDictError(
                "there is no tensor in the expected output of the probe",
                hint="Give a tensor, or what the model returns",
            )

    def _pairs(self, outputs: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each expected tensor with the one of the output that it is meant for; empty where one is missing."""
        if len(outputs) == len(self._expected):
            return list(zip(outputs, self._expected))
        found = []
        for wanted in self._expected:
            same = [tensor for tensor in outputs if tensor.shape == wanted.shape]
            if not same:
                return []
            found.append((same[0], wanted))
        return found

    def _is_right(self, outputs: Sequence[torch.Tensor]) -> bool:
        pairs = self._pairs(outputs)
        return bool(pairs) and all(is_close(one, other) for one, other in pairs)

    # ---------------------------------------------------------------- questions

    def _decided(self, questions: Sequence[Mapped]) -> tuple[Mapped, ...]:
        """Entries for what was open, where one way alone is right; the model has these values then."""
        if not questions or not self._expected:
            return ()

        def is_right(entries: Sequence[Mapped]) -> bool:
            try:
                self._filling.fill(entries)
            except Misfit:
                return False
            return not self._filling.empty and self._is_right(outputs_of(self._filling.model, self._probe.inputs))

        before = self._filling.values_of(entry.target for entry in questions)
        found = decide(questions, self._filling.target.shapes, is_right)
        self._filling.put_back(before)
        if found.entries:
            self._filling.fill(found.entries)
            names = [entry.target for entry in found.entries]
            message = f"of {found.tried} ways to fill {listed(names)} one alone gives the expected output"
            self._findings.append(Finding("probe-decides", "info", message, tuple(names)))
        elif found.right > 1:
            message = (
                f"{found.right} of {found.tried} ways give the expected output: this input doesn't tell them apart"
            )
            self._findings.append(
                Finding("probe-decides-nothing", "warning", message, tuple(entry.target for entry in questions))
            )
        return found.entries

    # ---------------------------------------------------------------- the verdict

    def _judged(self, entries: Sequence[Mapped]) -> Probed:
        model, inputs = self._filling.model, self._probe.inputs
        outputs = outputs_of(model, inputs)
        names = [entry.target for entry in entries]
        if not all(_is_finite(tensor) for tensor in outputs):
            return self._end("probe-not-finite", "error", f"the output has NaN or Inf, {self._first_bad()}")
        again = outputs_of(model, inputs)
        if not all(torch.equal(one, other) for one, other in zip(outputs, again)):
            self._findings.append(
                Finding(
                    "probe-varies",
                    "warning",
                    "the output is another each time, so it can't be said which tensors matter",
                )
            )
            idle: list[str] = []
        else:
            idle = self._idle(names, outputs)
        proven = self._compared(outputs) if self._expected else False
        sure = {entry.target for entry in entries if entry.target not in idle} if proven else set()
        given = {entry.target: entry for entry in entries}
        mapped = [
            _proven(given.get(each.target, each)) if each.target in sure else given.get(each.target, each)
            for each in self._alignment.mapped
        ]
        used = {key for each in mapped if each.is_claim for key in each.sources}
        filled = {each.target for each in mapped if each.is_claim}
        self._alignment = self._alignment._replace(
            mapped=tuple(mapped),
            dropped=tuple(left for left in self._alignment.dropped if left.key not in used),
            unfilled=tuple(left for left in self._alignment.unfilled if left.key not in filled),
        )
        return Probed(self._alignment, tuple(self._findings))

    def _idle(self, names: Sequence[str], outputs: Sequence[torch.Tensor]) -> list[str]:
        """The loaded tensors without an effect, and what is to be said of all."""
        slots = self._filling.target.slots
        named = {
            id(value): key for key in reversed(names) if (value := slots[key].tensor) is not None
        }  # tied ones once
        tensors = {key: value for key in names if (value := slots[key].tensor) is not None and named[id(value)] == key}
        idle = without_effect(self._filling.model, tensors, self._probe.inputs, outputs)
        counted = [key for key, value in tensors.items() if value.is_floating_point() or value.is_complex()]
        matter = len(counted) - len(idle)
        kind = "" if self._expected else ": they are used, which doesn't show that they are right"
        message = f"{matter:,} of {plural(len(counted), 'loaded tensor')} change the output on this input{kind}"
        self._findings.append(Finding("probe-use", "info", message))
        if idle:
            message = (
                f"{plural(len(idle), 'loaded tensor')} {'has' if len(idle) == 1 else 'have'} no effect on the output: "
                f"{listed(idle)}. The model doesn't use them, or this input doesn't reach them"
            )
            self._findings.append(Finding("probe-no-effect", "warning", message, tuple(idle)))
        return idle

    def _first_bad(self) -> str:
        """Where NaN or Inf comes from, in words."""
        bad: list[str] = []

        def see(path: str, tensor: torch.Tensor) -> None:
            if not bad and not _is_finite(tensor):
                bad.append(path)

        with recorded(self._filling.model, see):
            run(self._filling.model, self._probe.inputs)
        return f"first in the output of '{one_line(bad[0])}'" if bad and bad[0] else "made outside of its modules"

    def _compared(self, outputs: Sequence[torch.Tensor]) -> bool:
        """Whether the output is the expected one; both ways it is said."""
        pairs = self._pairs(outputs)
        if not pairs:
            shapes = ", ".join(str(list(tensor.shape)) for tensor in self._expected[:3])
            found = ", ".join(str(list(tensor.shape)) for tensor in outputs[:3])
            self._findings.append(
                Finding("probe-differs", "error", f"the output has the shape {found}, and {shapes} was expected")
            )
            return False
        furthest = max(closeness(one, other) for one, other in pairs)
        if all(is_close(one, other) for one, other in pairs):
            message = (
                f"the output is the expected one (largest difference {furthest:.1e} of the largest number): "
                "as far as this input reaches, the plan is right"
            )
            self._findings.append(Finding("probe-agrees", "info", message))
            return True
        self._findings.append(Finding("probe-differs", "error", "".join(self._difference(furthest))))
        return False

    def _difference(self, furthest: float) -> Iterator[str]:
        yield f"the output isn't the expected one: it differs by {furthest:.2g} of the largest number"
        if self._trace:
            path = first_difference(self._filling.model, self._probe.inputs, self._trace)
            if path:
                yield f". The first module whose output is another is '{one_line(path)}'"
            else:
                yield ". Its modules give what those of the reference do: the difference is made outside of them"
        else:
            yield ". Probe(inputs, reference=model) would say in which module it begins"
        slots, loaded = self._filling.target, self._filling.loaded
        own = [
            key
            for key in slots.shapes
            if not any(twin in loaded for twin in slots.tied_with(key)) and not can_make_again(slots.slots[key])
        ]
        if own:
            yield f". {plural(len(own), 'tensor')} of the model {'is' if len(own) == 1 else 'are'} not filled by the plan: {listed(own)}"


def _is_finite(tensor: torch.Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex()) or bool(torch.isfinite(tensor).all())


def _proven(entry: Mapped) -> Mapped:
    if not entry.is_claim or entry.tier == PROVEN:
        return entry
    return entry._replace(tier=PROVEN, reasons=(*entry.reasons, "with it the model gives the expected output"))

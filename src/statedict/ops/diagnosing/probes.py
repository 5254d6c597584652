"""What a probe is: inputs that a model is run on, and what is known of a right answer."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["Probe"]


class Probe(NamedTuple):
    """Inputs for a model, and what a right model makes of them.

    ``inputs`` is a tensor, a tuple of arguments, a dict of keyword arguments, or a function that is given the model and returns its output.
    ``expected`` is the output of a model that is right: a tensor, or what the model returns. ``reference`` is such a model itself; it is
    run on the same inputs, and its modules' outputs tell where the two part. Without either, a probe shows that tensors are used, not that
    they are right.
    """

    inputs: Any
    expected: Any = None
    reference: Any = None

    @staticmethod
    def of(value: Any) -> Probe:
        """A probe, or one that has these inputs alone."""
        return value if isinstance(value, Probe) else Probe(value)

    @property
    def knows_the_answer(self) -> bool:
        """Whether anything says what is right."""
        return self.expected is not None or self.reference is not None

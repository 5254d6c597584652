"""When two numbers count as equal, said without a number being looked at: this module imports no numpy."""

from __future__ import annotations

from typing import NamedTuple

from statedict.dtypes import DType

__all__ = ["Rule", "Tolerances"]

# rtol and atol that torch.testing.assert_close takes where none are given (torch/testing/_comparison.py, _DTYPE_PRECISIONS, 2.13);
# all other dtypes have to be equal.
_CLOSE = {
    "F16": (1e-3, 1e-5),
    "BF16": (1.6e-2, 1e-5),
    "F32": (1.3e-6, 1e-5),
    "F64": (1e-7, 1e-7),
    "C32": (1e-3, 1e-5),
    "C64": (1.3e-6, 1e-5),
    "C128": (1e-7, 1e-7),
    "QUINT8": (1.3e-6, 1e-5),
    "QUINT2X4": (1.3e-6, 1e-5),
    "QUINT4X2": (1.3e-6, 1e-5),
    "QINT8": (1.3e-6, 1e-5),
    "QINT32": (1.3e-6, 1e-5),
}


class Rule(NamedTuple):
    """When two numbers are equal: ``|a - b| <= atol + rtol * |b|`` for finite ones, as ``torch.allclose`` has it.

    ``ulp`` also takes finite floats of one dtype as equal that are at most that many representable numbers apart.
    """

    rtol: float = 0.0
    atol: float = 0.0
    equal_nan: bool = True
    ulp: int = 0

    @property
    def is_exact(self) -> bool:
        """Whether there is no tolerance."""
        return not (self.rtol or self.atol or self.ulp)


class Tolerances(NamedTuple):
    """The rule of every dtype. What is None is 0, or with ``close`` what ``torch.testing.assert_close`` has for the dtype."""

    rtol: float | None = None
    atol: float | None = None
    equal_nan: bool = True
    ulp: int = 0
    close: bool = False

    def rule(self, a: DType, b: DType) -> Rule:
        """The rule for numbers of these two dtypes; the wider tolerance of the two, as torch has it."""
        usual = (0.0, 0.0)
        if self.close:
            one, two = _CLOSE.get(a.code, usual), _CLOSE.get(b.code, usual)
            usual = max(one[0], two[0]), max(one[1], two[1])
        rtol = usual[0] if self.rtol is None else self.rtol
        return Rule(rtol, usual[1] if self.atol is None else self.atol, self.equal_nan, self.ulp)

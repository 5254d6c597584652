"""Which dtypes a rule can cast to, and which hold every value of which."""

from __future__ import annotations

from statedict.dtypes import BY_TORCH, DType
from statedict.errors import RuleError, one_line

__all__ = ["float_named", "holds", "is_number"]

# What people write besides torch's own names.
_SHORT = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64", "fp8": "float8_e4m3fn"}
# Bits of the exponent and of the mantissa (IEEE 754; bfloat16; the eight-bit formats of OCP and of the ml_dtypes README), and
# whether there are infinities. The eight-bit ones with "uz" have another bias, so they stand by themselves.
_SHAPES = {
    "float64": (11, 52, True),
    "float32": (8, 23, True),
    "float16": (5, 10, True),
    "bfloat16": (8, 7, True),
    "float8_e4m3fn": (4, 3, False),
    "float8_e5m2": (5, 2, True),
}
_FLOATS = (*_SHAPES, "float8_e4m3fnuz", "float8_e5m2fnuz")
_COMPLEX = ("complex64", "complex128")


def float_named(name: object) -> DType:
    """The dtype that numbers can be cast to. Raises ``RuleError`` for a name of none."""
    text = name if isinstance(name, str) else str(name)
    text = text.removeprefix("torch.").lower()
    found = BY_TORCH.get(_SHORT.get(text, text))
    if found is None or found.torch not in (*_FLOATS, *_COMPLEX):
        known = ", ".join([*_FLOATS, *_COMPLEX])
        raise RuleError("tensors can't be cast to that", found=one_line(repr(name)), hint=f"There is {known}")
    return found


def holds(wide: DType, narrow: DType) -> bool:
    """Whether every value of the one is a value of the other."""
    if wide is narrow:
        return True
    if wide.kind == "complex" or narrow.kind == "complex":
        return wide.kind == narrow.kind and wide.bits >= narrow.bits
    one, two = _SHAPES.get(wide.torch), _SHAPES.get(narrow.torch)
    if one is None or two is None:
        # The "uz" formats reach no further than float16 does.
        return narrow.torch in _FLOATS and two is None and wide.torch in ("float16", "bfloat16", "float32", "float64")
    return one[0] >= two[0] and one[1] >= two[1] and (one[2] or not two[2])


def is_number(dtype: DType) -> bool:
    """Whether a tensor of it can be cast: exponents alone and packed pairs mean something only with other tensors."""
    return dtype.torch in (*_FLOATS, *_COMPLEX)

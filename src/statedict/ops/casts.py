"""Which changes of dtype destroy what a tensor means, and are refused when it is loaded."""

from __future__ import annotations

from collections.abc import Collection

from statedict.dtypes import DType

__all__ = ["refusal"]

# What the scale of a tensor of eight bits is called, behind the tensor's own name or in its place.
_SCALES = ("_scale_inv", "_scale", ".scale", ".weight_scale", "_scales", ".absmax", ".SCB")


def refusal(key: str, before: DType, after: DType, *, is_parameter: bool, keys: Collection[str] = ()) -> str | None:
    """Why a tensor of one dtype must not become one of another; None where it may.

    ``keys`` are those of the source: the scale that goes with a tensor is named if it is there.
    """
    if before == after:
        return None
    if before.kind == "complex" and after.kind != "complex":
        return "the imaginary part would be lost"
    small = before.kind in ("int", "uint", "quantized", "bits") and before.bits <= 8
    if after.kind in ("float", "complex") and (before.kind == "quantized" or (small and is_parameter)):
        return f"these are quantised weights{_scale(key, keys)}: as floats they mean something else"
    if before.kind == "float" and before.bits <= 8 and not (after.kind == "float" and after.bits <= 8):
        return f"a tensor of {before} is nothing without its scale{_scale(key, keys)}"
    return None


def _scale(key: str, keys: Collection[str]) -> str:
    stem = key.rpartition(".")[0]
    for name in [f"{key}{end}" for end in _SCALES] + [f"{stem}{end}" for end in _SCALES if end.startswith(".")]:
        if name in keys:
            return f" (its scale is '{name}')"
    return ""

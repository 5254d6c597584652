"""One table: every element type, in each spelling that a format or library has for it.

The code is the safetensors library's (``BF16``) where it has one, and ours in the same style where it has none
(``C128``, ``QI8``). Sources: safetensors ``tensor.rs`` (enum Dtype), torch ``c10/core/ScalarType.h``,
torch ``serialization._dtype_to_storage_type_map``, the ml_dtypes README.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["BY_CODE", "BY_NUMPY", "BY_STORAGE", "BY_TORCH", "DType"]


class DType(NamedTuple):
    """One element type. ``str()`` gives torch's spelling without the prefix."""

    code: str  # ours; equal to safetensors' where `safetensors` is true
    torch: str  # as torch spells it, without "torch."; a name in its style where torch has none
    numpy: str  # numpy's or ml_dtypes' name of an array of it, little-endian; "" where neither has one
    bits: int  # bits of one element; of one pair or group for the packed kinds (`float4_e2m1fn_x2`: 8)
    kind: str  # "float" | "int" | "uint" | "bool" | "complex" | "quantized" | "bits"
    swap: int  # bytes that change places between byte orders: of one component for complex numbers
    safetensors: bool  # the safetensors format has a code for it
    in_torch: bool  # torch has a dtype of that name

    def __str__(self) -> str:
        return self.torch

    def __repr__(self) -> str:
        return f"DType({self.torch})"

    def nbytes(self, numel: int) -> int:
        """Bytes of that many elements, packed; a last partial byte counts whole."""
        return (numel * self.bits + 7) // 8

    @property
    def itemsize(self) -> int:
        """Bytes of one element; 0 where an element is smaller than a byte."""
        return self.bits // 8


def _table() -> tuple[DType, ...]:
    rows: list[DType] = []

    def add(code: str, torch: str, numpy: str, bits: int, kind: str, *, st: bool = True, known: bool = True) -> None:
        swap = bits // 8 // (2 if kind == "complex" else 1)
        rows.append(DType(code, torch, numpy, bits, kind, max(swap, 1), st, known))

    for bits in (64, 32, 16):
        add(f"F{bits}", f"float{bits}", f"<f{bits // 8}", bits, "float")
    add("BF16", "bfloat16", "bfloat16", 16, "float")
    add("F8_E4M3", "float8_e4m3fn", "float8_e4m3fn", 8, "float")
    add("F8_E5M2", "float8_e5m2", "float8_e5m2", 8, "float")
    add("F8_E8M0", "float8_e8m0fnu", "float8_e8m0fnu", 8, "float")
    add("F8_E4M3FNUZ", "float8_e4m3fnuz", "float8_e4m3fnuz", 8, "float")
    add("F8_E5M2FNUZ", "float8_e5m2fnuz", "float8_e5m2fnuz", 8, "float")
    # safetensors counts single 4-bit numbers; torch stores pairs, so its last dimension is half as long.
    add("F4_X2", "float4_e2m1fn_x2", "u1", 8, "float", st=False)
    add("F4", "float4_e2m1fn", "", 4, "float", known=False)
    add("F6_E2M3", "float6_e2m3fn", "", 6, "float", known=False)
    add("F6_E3M2", "float6_e3m2fn", "", 6, "float", known=False)
    for bits in (64, 32, 16, 8):
        add(f"I{bits}", f"int{bits}", f"<i{bits // 8}" if bits > 8 else "i1", bits, "int")
        add(f"U{bits}", f"uint{bits}", f"<u{bits // 8}" if bits > 8 else "u1", bits, "uint")
    add("BOOL", "bool", "?", 8, "bool")
    add("C64", "complex64", "<c8", 64, "complex")
    add("C128", "complex128", "<c16", 128, "complex", st=False)
    # No array library has them: an array of pairs with fields `real` and `imag`.
    add("C32", "complex32", "[('real', '<f2'), ('imag', '<f2')]", 32, "complex", st=False)
    for name, bits, numpy in (("qint8", 8, "i1"), ("quint8", 8, "u1"), ("qint32", 32, "<i4")):
        add(name.upper(), name, numpy, bits, "quantized", st=False)
    # Two and four numbers in a byte; the shape counts single numbers.
    add("QUINT4X2", "quint4x2", "", 4, "quantized", st=False)
    add("QUINT2X4", "quint2x4", "", 2, "quantized", st=False)
    for name, bits in (("bits1x8", 8), ("bits2x4", 8), ("bits4x2", 8), ("bits8", 8), ("bits16", 16)):
        add(name.upper(), name, "u1" if bits == 8 else "<u2", bits, "bits", st=False)
    # Shells that torch names for its compilers; each element takes a whole byte.
    for bits in range(1, 8):
        add(f"UINT{bits}", f"uint{bits}", "u1", 8, "bits", st=False)
        add(f"INT{bits}", f"int{bits}", "u1", 8, "bits", st=False)
    return tuple(rows)


TABLE = _table()
BY_CODE = {row.code: row for row in TABLE}
BY_TORCH = {row.torch: row for row in TABLE} | {
    alias: next(row for row in TABLE if row.torch == name)
    for alias, name in {
        "float": "float32",
        "double": "float64",
        "half": "float16",
        "long": "int64",
        "int": "int32",
        "short": "int16",
        "cfloat": "complex64",
        "cdouble": "complex128",
        "chalf": "complex32",
    }.items()
}
# numpy's letters without the byte order: what the header of an .npy file and a pickled array hold.
BY_NUMPY = {
    row.numpy.lstrip("<"): row
    for row in reversed(TABLE)
    if row.numpy and row.kind in {"float", "int", "uint", "complex"}
} | {"b1": BY_CODE["BOOL"], "?": BY_CODE["BOOL"], "u1": BY_CODE["U8"], "i1": BY_CODE["I8"]}
# torch's typed storages: the class names in its files (a closed list; newer dtypes use UntypedStorage).
BY_STORAGE = {
    f"{name}Storage": BY_TORCH[dtype]
    for name, dtype in {
        "Double": "float64",
        "Float": "float32",
        "Half": "float16",
        "Long": "int64",
        "Int": "int32",
        "Short": "int16",
        "Char": "int8",
        "Byte": "uint8",
        "Bool": "bool",
        "BFloat16": "bfloat16",
        "ComplexDouble": "complex128",
        "ComplexFloat": "complex64",
        "QInt8": "qint8",
        "QInt32": "qint32",
        "QUInt8": "quint8",
        "QUInt4x2": "quint4x2",
        "QUInt2x4": "quint2x4",
        "Untyped": "uint8",
    }.items()
}

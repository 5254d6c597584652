"""The constructors of numpy's arrays, scalars and dtypes, as records.

Source: numpy ``_core/src/multiarray/methods.c`` (``array_setstate``), ``descriptor.c`` (``arraydescr_setstate``),
``_core/numeric.py`` (``_frombuffer``).
"""

from __future__ import annotations

from statedict.dtypes import BY_NUMPY, BY_TORCH
from statedict.formats.records import ArrayRecord, Builder, Global, NumpyDType, Unfit
from statedict.formats.tensor_constructors import sizes
from statedict.manifest import NumpyScalar

__all__ = ["ARRAY_CONSTRUCTORS", "fill_array", "fill_dtype"]

# Letters of a plain dtype are fewer; a long name isn't looked at.
_LONGEST_NAME = 64


def _numpy_dtype(args: tuple[object, ...]) -> NumpyDType:
    name = args[0] if args else None
    if isinstance(name, Global):
        # ml_dtypes' own types, by class.
        return NumpyDType(name.name, BY_TORCH.get(name.name))
    if not isinstance(name, (str, bytes)) or len(name) > _LONGEST_NAME:
        raise Unfit
    if isinstance(name, bytes):
        name = name.decode("latin-1")
    made = NumpyDType(name.lstrip("<>=|"), BY_NUMPY.get(name.lstrip("<>=|")))
    made.byteorder = "big" if name.startswith(">") else "little"
    return made


def _numpy_reconstruct(args: tuple[object, ...]) -> ArrayRecord:
    cls = args[0] if args else None
    if not isinstance(cls, Global):
        raise Unfit
    return ArrayRecord("ndarray" if cls.name == "ndarray" else cls.type)


def _numpy_frombuffer(args: tuple[object, ...]) -> ArrayRecord:
    """(buffer, dtype, shape, order): how arrays are written by pickle protocol 5."""
    if len(args) < 4 or not isinstance(args[1], NumpyDType):
        raise Unfit
    record = ArrayRecord()
    record.data, record.dtype, record.shape, record.fortran = args[0], args[1], sizes(args[2], "shape"), args[3] == "F"
    return record


def _numpy_scalar(args: tuple[object, ...]) -> NumpyScalar:
    if len(args) != 2 or not isinstance(args[0], NumpyDType) or args[0].structured:
        raise Unfit
    kind, raw = args[0], args[1]
    if not isinstance(raw, (str, bytes)) or kind.dtype is None or len(raw) > kind.dtype.itemsize:
        raise Unfit
    # Python 2 wrote the bytes as a text.
    data = raw.encode("utf-8", "surrogatepass") if isinstance(raw, str) else raw
    if len(data) != kind.dtype.itemsize:
        raise Unfit
    if kind.byteorder == "big":
        step = kind.dtype.swap
        data = b"".join(data[i : i + step][::-1] for i in range(0, len(data), step))
    return NumpyScalar.of(kind.letters, data)


def fill_array(target: ArrayRecord, state: object) -> None:
    """numpy's ``ndarray.__setstate__``: (version, shape, dtype, is_fortran, raw data); the version came later."""
    if not isinstance(state, tuple) or len(state) not in (4, 5):
        raise ValueError("an array's state")
    shape, dtype, fortran, data = state[-4:]
    if not isinstance(dtype, NumpyDType):
        raise ValueError("an array's dtype")
    target.shape, target.dtype, target.fortran, target.data = sizes(shape, "shape"), dtype, bool(fortran), data


def fill_dtype(target: NumpyDType, state: object) -> None:
    """numpy's ``dtype.__setstate__``: (version, byte order, subarray, names, fields, size, alignment, flags …)."""
    if not isinstance(state, tuple) or len(state) < 5:
        raise ValueError("a dtype's state")
    target.byteorder = "big" if state[1] in (">", b">") else "little"
    target.structured = state[2] is not None or state[3] is not None


def _table() -> dict[tuple[str, str], Builder]:
    table: dict[tuple[str, str], Builder] = {("numpy", "dtype"): _numpy_dtype}
    for core in ("numpy.core", "numpy._core"):
        table[f"{core}.multiarray", "_reconstruct"] = _numpy_reconstruct
        table[f"{core}.multiarray", "scalar"] = _numpy_scalar
        table[f"{core}.numeric", "_frombuffer"] = _numpy_frombuffer
    return table


ARRAY_CONSTRUCTORS = _table()

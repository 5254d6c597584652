"""The constructors that the interpreter of pickles carries out itself: a closed table of this program's own functions.

Each takes the arguments that the file gives and makes an inert value or record. Those of tensors and arrays are in modules
of their own. Sources: torch 2.13 ``torch/_weights_only_unpickler.py`` (its list), CPython ``Lib/datetime.py`` (the pickled
state), ``Lib/copyreg.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from statedict.dtypes import BY_TORCH
from statedict.formats.array_constructors import ARRAY_CONSTRUCTORS, fill_array, fill_dtype
from statedict.formats.records import ArrayRecord, Builder, Global, MappingRecord, NumpyDType, TensorRecord, Unfit
from statedict.formats.tensor_constructors import TENSOR_CONSTRUCTORS, set_attributes, set_state
from statedict.manifest import NumpyScalar, Opaque, TorchValue

__all__ = ["CONSTANTS", "CONSTRUCTORS", "COPYING", "apply_state"]

# The packed state of a datetime has 10 bytes.
_LONGEST_DATE = 16


def apply_state(target: object, state: object) -> object:
    """What BUILD does to a value: fills a record, or keeps the state as facts. Gives the value to go on with."""
    if isinstance(target, Opaque):
        target.state = state
    elif isinstance(target, TensorRecord):
        set_state(target, state)
    elif isinstance(target, MappingRecord):
        if target.kind == "Namespace" and isinstance(state, dict):
            target.update(state)
        else:
            set_attributes(target, state)
    elif isinstance(target, ArrayRecord):
        fill_array(target, state)
    elif isinstance(target, NumpyDType):
        fill_dtype(target, state)
    elif isinstance(target, Global):
        return Opaque(target.module, target.name, (), state)
    elif state is not None and not isinstance(target, (TorchValue, NumpyScalar)):
        return Opaque("builtins", type(target).__name__, (target,), state)
    return target


# -------------------------------------------------------------------- containers


def _ordered(kind: str) -> Builder:
    def build(args: tuple[object, ...]) -> MappingRecord:
        record = MappingRecord(kind)
        if kind == "defaultdict" and args:
            record.attributes = {"default_factory": args[0]}
            args = args[1:]
        if len(args) > 1:
            raise Unfit
        if args and isinstance(args[0], dict):
            record.update(args[0])
        elif args:
            _fill_pairs(record, args[0])
        return record

    return build


def _fill_pairs(record: MappingRecord, pairs: object) -> None:
    """Python 2 wrote an OrderedDict as a list of two-element lists."""
    if not isinstance(pairs, (list, tuple)):
        raise Unfit
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise Unfit
        record[pair[0]] = pair[1]


def _namespace(name: str) -> Builder:
    def build(args: tuple[object, ...]) -> MappingRecord:
        if args and args != ({},):
            raise Unfit
        return MappingRecord("Namespace", name)

    return build


def _reconstructor(args: tuple[object, ...]) -> object:
    """``copyreg._reconstructor(class, base, state)``: how protocols 0 and 1 make an instance."""
    if len(args) != 3 or not isinstance(args[0], Global):
        raise Unfit
    cls, base, state = args[0], args[1], args[2]
    if isinstance(base, Global) and base.name == "object" and state is None:
        return cls.build(()) if cls.build is not None else Opaque(cls.module, cls.name)
    return Opaque(cls.module, cls.name, (state,))


def _plain(make: Callable[..., object], *kinds: type) -> Builder:
    """A constructor of the standard library without side effects, for arguments of these types only."""

    def build(args: tuple[object, ...]) -> object:
        if not all(arg is None or isinstance(arg, kinds) for arg in args):
            raise Unfit
        try:
            return make(*args)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise Unfit from error

    return build


def _collection(make: Callable[[list[object]], object]) -> Builder:
    """``set([…])`` and its kin, as protocols below 4 write them."""

    def build(args: tuple[object, ...]) -> object:
        if len(args) > 1 or (args and not isinstance(args[0], (list, tuple, set))):
            raise Unfit
        return make(list(args[0]) if args else [])  # type: ignore[call-overload]

    return build


def _bytearray(args: tuple[object, ...]) -> bytearray:
    """From bytes, or from a text and its encoding; a length (``bytearray(10**12)``) is no data and stays a record."""
    if len(args) == 1 and isinstance(args[0], bytes):
        return bytearray(args[0])
    if len(args) == 2 and isinstance(args[0], str) and args[1] in ("latin-1", "latin1"):
        return bytearray(args[0].encode("latin-1"))
    if not args:
        return bytearray()
    raise Unfit


def _bytes(args: tuple[object, ...]) -> bytes:
    if args and args != ([],):
        raise Unfit
    return b""


def _empty_dict(args: tuple[object, ...]) -> dict[object, object]:
    if args:
        raise Unfit
    return {}


def _encode(args: tuple[object, ...]) -> object:
    """``_codecs.encode(text, 'latin1')``: how protocol 2 writes bytes. Any other codec stays a record."""
    if len(args) != 2 or not isinstance(args[0], str) or args[1] not in ("latin1", "latin-1"):
        raise Unfit
    try:
        return args[0].encode("latin-1")
    except UnicodeEncodeError as error:
        raise Unfit from error


def _late(module: str, name: str, *kinds: type) -> Builder:
    """A class of the standard library's that is imported when a file holds one. The names are ours, not the file's."""

    def build(args: tuple[object, ...]) -> object:
        import importlib

        return _plain(getattr(importlib.import_module(module), name), *kinds)(args)

    return build


def _date_time(name: str) -> Builder:
    def build(args: tuple[object, ...]) -> object:
        import datetime

        state = args[0] if args else None
        if not isinstance(state, (str, bytes)) or len(state) > _LONGEST_DATE:
            raise Unfit
        # Python 2 wrote the packed state as a text.
        raw = state.encode("utf-8", "surrogatepass") if isinstance(state, str) else state
        if not all(isinstance(arg, datetime.tzinfo) for arg in args[1:]):
            raise Unfit
        return _plain(getattr(datetime, name), bytes, datetime.tzinfo)((raw, *args[1:]))

    return build


def _timezone(args: tuple[object, ...]) -> object:
    import datetime

    return _plain(datetime.timezone, datetime.timedelta, str)(args)


# -------------------------------------------------------------------- torch's small values


def _torch_value(kind: str) -> Builder:
    def build(args: tuple[object, ...]) -> TorchValue:
        if kind == "Size" and len(args) == 1 and isinstance(args[0], (tuple, list)) and _are_numbers(args[0]):
            # A size of its own may hold any numbers; as the shape of a tensor it is checked there.
            return TorchValue("Size", tuple(args[0]))
        if kind == "device" and args and isinstance(args[0], str):
            index = f":{args[1]}" if len(args) == 2 and type(args[1]) is int else ""
            return TorchValue("device", args[0] + index)
        if kind == "layout" and len(args) == 1 and isinstance(args[0], str):
            return TorchValue("layout", args[0])
        raise Unfit

    return build


def _are_numbers(items: Iterable[object]) -> bool:
    return all(type(item) is int for item in items)


def _version(args: tuple[object, ...]) -> str:
    if len(args) != 1 or not isinstance(args[0], str):
        raise Unfit
    return args[0]


def _identity(args: tuple[object, ...]) -> object:
    if not args:
        raise Unfit
    return args[0]


def _table() -> dict[tuple[str, str], Builder]:
    table: dict[tuple[str, str], Builder] = {
        **TENSOR_CONSTRUCTORS,
        **ARRAY_CONSTRUCTORS,
        ("torch.serialization", "_get_layout"): _torch_value("layout"),
        ("torch", "Size"): _torch_value("Size"),
        ("torch", "device"): _torch_value("device"),
        ("torch.torch_version", "TorchVersion"): _version,
        ("torch.jit._pickle", "restore_type_tag"): _identity,
        ("torch.jit._pickle", "build_intlist"): _identity,
        ("torch.jit._pickle", "build_doublelist"): _identity,
        ("torch.jit._pickle", "build_boollist"): _identity,
        ("torch.jit._pickle", "build_tensorlist"): _identity,
        ("_codecs", "encode"): _encode,
        ("collections", "OrderedDict"): _ordered("OrderedDict"),
        ("collections", "Counter"): _ordered("Counter"),
        ("collections", "defaultdict"): _ordered("defaultdict"),
        ("argparse", "Namespace"): _namespace("argparse.Namespace"),
        ("types", "SimpleNamespace"): _namespace("types.SimpleNamespace"),
        ("decimal", "Decimal"): _late("decimal", "Decimal", str),
        ("datetime", "datetime"): _date_time("datetime"),
        ("datetime", "date"): _date_time("date"),
        ("datetime", "time"): _date_time("time"),
        ("datetime", "timedelta"): _late("datetime", "timedelta", int),
        ("datetime", "timezone"): _timezone,
    }
    for module in ("builtins", "__builtin__"):
        table |= {
            (module, "set"): _collection(set),
            (module, "frozenset"): _collection(frozenset),
            (module, "list"): _collection(list),
            (module, "tuple"): _collection(tuple),
            (module, "dict"): _empty_dict,
            (module, "bytearray"): _bytearray,
            (module, "bytes"): _bytes,
            (module, "complex"): _plain(complex, float, int),
            (module, "slice"): _plain(slice, int),
            (module, "range"): _plain(range, int),
            (module, "xrange"): _plain(range, int),
        }
    for module in ("copyreg", "copy_reg"):
        table[module, "_reconstructor"] = _reconstructor
    for module in ("pathlib", "pathlib._local"):
        for name in ("PosixPath", "PurePosixPath"):
            table[module, name] = _late("pathlib", "PurePosixPath", str)
        for name in ("WindowsPath", "PureWindowsPath"):
            table[module, name] = _late("pathlib", "PureWindowsPath", str)
    return table


CONSTRUCTORS = _table()


def _members(args: tuple[object, ...]) -> Iterable[object]:
    return args[0] if args and isinstance(args[0], (list, tuple)) else ()


def _pair_keys(args: tuple[object, ...]) -> Iterable[object]:
    pairs = args[-1] if args and isinstance(args[-1], (list, tuple)) else ()
    return [pair[0] for pair in pairs if isinstance(pair, (list, tuple)) and len(pair) == 2]


def _no_keys(args: tuple[object, ...]) -> Iterable[object]:
    return ()


# The constructors that copy an argument of any length, with what of it becomes a key. A pickle may hand the same long argument
# to one of them again and again, so the interpreter keeps account of these.
COPYING: dict[tuple[str, str], Callable[[tuple[object, ...]], Iterable[object]]] = {
    key: _no_keys
    for key in CONSTRUCTORS
    if key[0] in ("_codecs", "builtins", "__builtin__", "decimal", "pathlib", "pathlib._local")
    or key[1].startswith(("_rebuild_from_type", "_rebuild_parameter_with"))
    or key == ("torch", "Size")
}
COPYING |= {key: _members for key in CONSTRUCTORS if key[1] in ("set", "frozenset")}
COPYING |= {("collections", name): _pair_keys for name in ("OrderedDict", "Counter", "defaultdict")}
# Names that stand for a value and not for a function.
CONSTANTS: dict[tuple[str, str], object] = {
    ("torch", row.torch): TorchValue("dtype", row.torch) for row in BY_TORCH.values() if row.in_torch
}
CONSTANTS |= {
    ("torch", name): TorchValue(kind, f"torch.{name}")
    for kind, names in {
        "layout": ("strided", "sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc", "jagged"),
        "qscheme": (
            "per_tensor_affine",
            "per_channel_affine",
            "per_tensor_symmetric",
            "per_channel_symmetric",
            "per_channel_affine_float_qparams",
        ),
        "memory_format": ("contiguous_format", "channels_last", "channels_last_3d", "preserve_format"),
    }.items()
    for name in names
}
for _module in ("builtins", "__builtin__"):
    CONSTANTS[_module, "Ellipsis"] = Ellipsis
    CONSTANTS[_module, "NotImplemented"] = NotImplemented
    CONSTANTS[_module, "None"] = None

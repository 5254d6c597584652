"""The constructors that the interpreter of pickles carries out itself: a closed table of this program's own functions.

Each takes the arguments that the file gives and makes an inert value or record. Sources: torch 2.13 ``torch/_utils.py``
(the rebuild functions), ``torch/_weights_only_unpickler.py`` (its list), numpy ``_core/src/multiarray/methods.c``
(``__setstate__``), CPython ``Lib/datetime.py`` (the pickled state).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from statedict.dtypes import BY_NUMPY, BY_STORAGE, BY_TORCH, DType
from statedict.errors import CorruptFile
from statedict.formats.records import (
    ArrayRecord,
    Builder,
    Global,
    MappingRecord,
    NumpyDType,
    StorageRef,
    TensorRecord,
    Unfit,
)
from statedict.manifest import NumpyScalar, Opaque, TorchValue

__all__ = ["CONSTANTS", "CONSTRUCTORS", "apply_state", "dtype_of", "storage_dtype"]


def _bad(what: str) -> NoReturn:
    raise CorruptFile(f"a tensor can't be rebuilt: {what}")


def dtype_of(value: object) -> DType:
    """The dtype that a value of the file names."""
    if isinstance(value, TorchValue) and value.kind == "dtype" and value.value in BY_TORCH:
        return BY_TORCH[str(value.value)]
    _bad(f"{value!r} is no dtype")


def storage_dtype(storage_class: object) -> DType | None:
    """The dtype of a storage class such as ``torch.FloatStorage``, ``torch.cuda.HalfStorage``; None for another."""
    name = storage_class.name if isinstance(storage_class, Global) else str(storage_class).rpartition(".")[2]
    return BY_STORAGE.get(name)


def _sizes(value: object, what: str) -> tuple[int, ...]:
    """A shape or strides: plain non-negative integers."""
    items = value.value if isinstance(value, TorchValue) and value.kind == "Size" else value
    if not isinstance(items, (tuple, list)):
        _bad(f"its {what} is no tuple")
    for item in items:
        if type(item) is not int or item < 0:
            _bad(f"its {what} holds {item!r}")
    return tuple(items)


# -------------------------------------------------------------------- tensors


def _tensor(args: tuple[object, ...], dtype: DType | None = None, metadata: object = None) -> TensorRecord:
    storage, offset, shape, stride, requires_grad = args
    if type(storage) is not StorageRef:
        _bad("its storage is none")
    if type(offset) is not int or offset < 0:
        _bad(f"its storage offset is {offset!r}")
    bits = ""
    if isinstance(metadata, dict):
        bits = ("c" if metadata.get("conj") else "") + ("n" if metadata.get("neg") else "")
    record = TensorRecord(
        storage,
        storage.dtype if dtype is None else dtype,
        offset,
        _sizes(shape, "shape"),
        _sizes(stride, "stride"),
        bool(requires_grad),
        bits,
    )
    if len(record.shape) != len(record.stride):
        _bad(f"shape {list(record.shape)} and stride {list(record.stride)} are of different lengths")
    return record


def _rebuild_tensor(args: tuple[object, ...]) -> TensorRecord:
    if len(args) != 4:
        _bad("wrong number of arguments")
    return _tensor((*args, False))


def _rebuild_tensor_v2(args: tuple[object, ...]) -> TensorRecord:
    if len(args) not in (5, 6, 7):
        _bad("wrong number of arguments")
    return _tensor(args[:5], None, args[6] if len(args) == 7 else None)


def _rebuild_tensor_v3(args: tuple[object, ...]) -> TensorRecord:
    if len(args) not in (7, 8):
        _bad("wrong number of arguments")
    return _tensor(args[:5], dtype_of(args[6]), args[7] if len(args) == 8 else None)


def _rebuild_parameter(args: tuple[object, ...]) -> TensorRecord:
    if len(args) not in (3, 4) or not isinstance(args[0], TensorRecord):
        raise Unfit
    record = _copy(args[0])
    record.requires_grad = bool(args[1])
    if record.kind == "Tensor":
        record.kind = "Parameter"
    if len(args) == 4:
        apply_state(record, args[3])
    return record


def _parameter(args: tuple[object, ...]) -> TensorRecord:
    if not args or not isinstance(args[0], TensorRecord):
        raise Unfit
    return _rebuild_parameter((args[0], args[1] if len(args) > 1 else True, None))


def _copy(record: TensorRecord) -> TensorRecord:
    """A parameter shares its data with the tensor it is made of, which may be used elsewhere as well."""
    made = TensorRecord(
        record.storage, record.dtype, record.offset, record.shape, record.stride, record.requires_grad, record.bits
    )
    made.kind, made.layout, made.device = record.kind, record.layout, record.device
    made.parts, made.attributes = record.parts, record.attributes
    return made


def _rebuild_from_type(args: tuple[object, ...]) -> object:
    """A subclass, or a tensor with Python attributes: (function, type, arguments, state)."""
    if len(args) not in (3, 4) or not isinstance(args[0], Global) or not isinstance(args[2], tuple):
        raise Unfit
    function, cls, inner = args[0], args[1], args[2]
    if function.build is None:
        raise Unfit
    made = function.build(inner)
    if not isinstance(made, TensorRecord):
        raise Unfit
    if isinstance(cls, Global) and cls.type not in ("torch.Tensor", "torch._tensor.Tensor"):
        made.kind = {"torch.nn.parameter.Parameter": "Parameter", "torch.nn.parameter.Buffer": "Buffer"}.get(
            cls.type, cls.type
        )
    return apply_state(made, args[3]) if len(args) == 4 else made


_SPARSE = {
    "torch.sparse_csr": "crow",
    "torch.sparse_bsr": "crow",
    "torch.sparse_csc": "ccol",
    "torch.sparse_bsc": "ccol",
}


def _rebuild_sparse(args: tuple[object, ...]) -> TensorRecord:
    """(layout, (indices, values, size[, is_coalesced])) or (layout, (compressed, plain, values, size))."""
    if len(args) != 2 or not isinstance(args[0], TorchValue) or not isinstance(args[1], tuple):
        raise Unfit
    layout, data = str(args[0].value), args[1]
    names: tuple[str, ...]
    if layout == "torch.sparse_coo" and len(data) in (3, 4):
        names = ("indices", "values")
    elif layout in _SPARSE and len(data) == 4:
        row = _SPARSE[layout] == "crow"
        names = ("crow_indices", "col_indices", "values") if row else ("ccol_indices", "row_indices", "values")
    else:
        raise Unfit
    parts = dict(zip(names, data))
    made = _composite(layout.removeprefix("torch."), parts, "values", _sizes(data[len(names)], "shape"))
    if len(data) == 4 and layout == "torch.sparse_coo":
        made.attributes = {"is_coalesced": bool(data[3])}
    return made


def _composite(layout: str, parts: dict[str, object], like: str, shape: tuple[int, ...]) -> TensorRecord:
    tensors = {name: part for name, part in parts.items() if isinstance(part, TensorRecord)}
    if len(tensors) != len(parts):
        _bad(f"a part of its {layout} layout is no tensor")
    made = TensorRecord(None, tensors[like].dtype, 0, shape, ())
    made.layout, made.parts = layout, tensors
    storage = tensors[like].storage
    made.device = tensors[like].device or (storage.device if storage is not None else None)
    return made


def _rebuild_quantized(args: tuple[object, ...]) -> TensorRecord:
    """(storage, offset, size, stride, (qscheme, scale, zero point[, axis]), requires_grad, hooks)."""
    if len(args) < 6 or not isinstance(args[4], tuple) or not args[4]:
        raise Unfit
    inner = _tensor((*args[:4], args[5]))
    scheme, *params = args[4]
    parts: dict[str, object] = {"int_repr": inner}
    facts: dict[str, object] = {"qscheme": scheme}
    names = ("scale", "zero_point", "axis") if len(params) > 2 else ("scale", "zero_point")
    for name, value in zip(names, params):
        if isinstance(value, TensorRecord):
            parts[name] = value
        else:
            facts[name] = value
    made = _composite("quantized", parts, "int_repr", inner.shape)
    made.stride, made.requires_grad = inner.stride, inner.requires_grad
    made.attributes = facts
    return made


def _rebuild_nested(args: tuple[object, ...]) -> TensorRecord:
    """(buffer, sizes, strides, storage offsets): tensors of different sizes behind one another."""
    if len(args) != 4:
        raise Unfit
    parts = dict(zip(("buffer", "sizes", "strides", "storage_offsets"), args))
    buffer = args[0]
    return _composite("nested", parts, "buffer", buffer.shape if isinstance(buffer, TensorRecord) else ())


def _rebuild_meta(args: tuple[object, ...]) -> TensorRecord:
    if len(args) != 4:
        raise Unfit
    record = TensorRecord(
        None, dtype_of(args[0]), 0, _sizes(args[1], "shape"), _sizes(args[2], "stride"), bool(args[3])
    )
    record.device = "meta"
    return record


def _rebuild_wrapper(args: tuple[object, ...]) -> TensorRecord:
    """(class, dtype, size, stride, storage offset, layout, device, requires_grad): a subclass without data of its own."""
    if len(args) != 8 or not isinstance(args[0], Global):
        raise Unfit
    record = TensorRecord(
        None, dtype_of(args[1]), 0, _sizes(args[2], "shape"), _sizes(args[3], "stride"), bool(args[7])
    )
    record.kind, record.layout = args[0].type, "wrapper"
    record.device = str(args[6].value) if isinstance(args[6], TorchValue) else None
    return record


def _rebuild_on_device(args: tuple[object, ...]) -> object:
    """(data, dtype, device, requires_grad): a tensor of an accelerator, saved as an array or a CPU tensor."""
    if len(args) != 4 or not isinstance(args[0], (TensorRecord, ArrayRecord)):
        raise Unfit
    data = args[0]
    if isinstance(data, ArrayRecord):
        data.torch_dtype = dtype_of(args[1])
        return data
    made = _copy(data)
    made.device, made.requires_grad = str(args[2]), bool(args[3])
    return made


def _unbuilt_tensor(name: str) -> Builder:
    """``torch.FloatTensor()``, filled by BUILD with (storage, offset, size, stride): torch 0.1 to 0.3."""

    def build(args: tuple[object, ...]) -> TensorRecord:
        if args:
            raise Unfit
        record = TensorRecord(
            None, BY_STORAGE.get(name.replace("Tensor", "Storage"), BY_TORCH["float32"]), 0, (0,), (1,)
        )
        record.kind = "unbuilt"
        return record

    return build


def apply_state(target: object, state: object) -> object:
    """What BUILD does to a value: fills a record, or keeps the state as facts. Gives the value to go on with."""
    if isinstance(target, Opaque):
        target.state = state
    elif isinstance(target, TensorRecord) and target.kind == "unbuilt" and isinstance(state, tuple) and len(state) == 4:
        return _tensor((*state, False))
    elif isinstance(target, (MappingRecord, TensorRecord)):
        _set_attributes(target, state)
    elif isinstance(target, ArrayRecord):
        _fill_array(target, state)
    elif isinstance(target, NumpyDType):
        _fill_dtype(target, state)
    elif isinstance(target, Global):
        return Opaque(target.module, target.name, (), state)
    elif state is not None and not isinstance(target, (TorchValue, NumpyScalar)):
        return Opaque("builtins", type(target).__name__, (target,), state)
    return target


def _set_attributes(target: MappingRecord | TensorRecord, state: object) -> None:
    if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):
        # (the instance's dict, its slots)
        state = {**state[0], **state[1]} if isinstance(state[0], dict) else state[1]
    if not isinstance(state, dict):
        return
    if isinstance(target, MappingRecord) and target.kind == "Namespace":
        target.update(state)
    else:
        target.attributes = {**target.attributes, **{str(key): value for key, value in state.items()}}


def _fill_array(target: ArrayRecord, state: object) -> None:
    """numpy's ``ndarray.__setstate__``: (version, shape, dtype, is_fortran, raw data); the version came later."""
    if not isinstance(state, tuple) or len(state) not in (4, 5):
        raise ValueError("an array's state")
    shape, dtype, fortran, data = state[-4:]
    if not isinstance(dtype, NumpyDType):
        raise ValueError("an array's dtype")
    target.shape, target.dtype, target.fortran, target.data = _sizes(shape, "shape"), dtype, bool(fortran), data


def _fill_dtype(target: NumpyDType, state: object) -> None:
    """numpy's ``dtype.__setstate__``: (version, byte order, subarray, names, fields, size, alignment, flags …)."""
    if not isinstance(state, tuple) or len(state) < 5:
        raise ValueError("a dtype's state")
    target.byteorder = "big" if state[1] in (">", b">") else "little"
    target.structured = state[2] is not None or state[3] is not None


# -------------------------------------------------------------------- numpy


def _numpy_dtype(args: tuple[object, ...]) -> NumpyDType:
    name = args[0] if args else None
    if isinstance(name, Global):
        # ml_dtypes' own types, by class.
        return NumpyDType(name.name, BY_TORCH.get(name.name))
    if isinstance(name, bytes):
        name = name.decode("latin-1")
    if not isinstance(name, str):
        raise Unfit
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
    record.data, record.dtype, record.shape, record.fortran = args[0], args[1], _sizes(args[2], "shape"), args[3] == "F"
    return record


def _numpy_scalar(args: tuple[object, ...]) -> NumpyScalar:
    if len(args) != 2 or not isinstance(args[0], NumpyDType) or args[0].structured:
        raise Unfit
    kind, raw = args[0], args[1]
    data = raw.encode("utf-8") if isinstance(raw, str) else raw
    if not isinstance(data, bytes) or kind.dtype is None or len(data) != kind.dtype.itemsize:
        raise Unfit
    if kind.byteorder == "big":
        step = kind.dtype.swap
        data = b"".join(data[i : i + step][::-1] for i in range(0, len(data), step))
    return NumpyScalar(kind.letters, data, _python_number(kind.dtype, data))


_STRUCT = {"F64": "<d", "F32": "<f", "F16": "<e", "BOOL": "<?", "C64": "<2f", "C128": "<2d"}


def _python_number(dtype: DType, data: bytes) -> object:
    import struct

    if dtype.kind in ("int", "uint"):
        return int.from_bytes(data, "little", signed=dtype.kind == "int")
    if dtype.code not in _STRUCT:
        return None
    values = struct.unpack(_STRUCT[dtype.code], data)
    return complex(*values) if len(values) == 2 else values[0]


# -------------------------------------------------------------------- the standard library


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
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not isinstance(pair[0], (str, int, bytes)):
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
        items = list(args[0]) if args else []  # type: ignore[call-overload]
        if make in (set, frozenset) and any(isinstance(item, (list, dict, set, tuple, bytearray)) for item in items):
            raise Unfit
        return make(items)

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
        # Python 2 wrote the packed state as a text.
        raw = state.encode("latin-1") if isinstance(state, str) else state
        if not isinstance(raw, bytes) or not all(isinstance(arg, datetime.tzinfo) for arg in args[1:]):
            raise Unfit
        return _plain(getattr(datetime, name), bytes, datetime.tzinfo)((raw, *args[1:]))

    return build


def _timezone(args: tuple[object, ...]) -> object:
    import datetime

    return _plain(datetime.timezone, datetime.timedelta, str)(args)


# -------------------------------------------------------------------- torch's small values


def _torch_value(kind: str) -> Builder:
    def build(args: tuple[object, ...]) -> TorchValue:
        if kind == "Size":
            return TorchValue("Size", _sizes(args[0] if len(args) == 1 else None, "size"))
        if kind == "device" and args and isinstance(args[0], str):
            index = f":{args[1]}" if len(args) == 2 and type(args[1]) is int else ""
            return TorchValue("device", args[0] + index)
        if kind == "layout" and len(args) == 1 and isinstance(args[0], str):
            return TorchValue("layout", args[0])
        raise Unfit

    return build


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
        ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
        ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
        ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
        ("torch.nn.parameter", "Parameter"): _parameter,
        ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
        ("torch.tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
        ("torch.tensor", "_rebuild_from_type"): _rebuild_from_type,
        ("torch._tensor", "_rebuild_from_type"): _rebuild_from_type,
        ("torch._utils", "_rebuild_sparse_tensor"): _rebuild_sparse,
        ("torch._utils", "_rebuild_sparse_csr_tensor"): _rebuild_sparse,
        ("torch._utils", "_rebuild_qtensor"): _rebuild_quantized,
        ("torch._utils", "_rebuild_nested_tensor"): _rebuild_nested,
        ("torch._utils", "_rebuild_meta_tensor_no_storage"): _rebuild_meta,
        ("torch._utils", "_rebuild_wrapper_subclass"): _rebuild_wrapper,
        ("torch._utils", "_rebuild_device_tensor_from_numpy"): _rebuild_on_device,
        ("torch._utils", "_rebuild_xla_tensor"): _rebuild_on_device,
        ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _rebuild_on_device,
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
        ("collections", "deque"): _late("collections", "deque", list, int),
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
    for core in ("numpy.core", "numpy._core"):
        table[f"{core}.multiarray", "_reconstruct"] = _numpy_reconstruct
        table[f"{core}.multiarray", "scalar"] = _numpy_scalar
        table[f"{core}.numeric", "_frombuffer"] = _numpy_frombuffer
    table["numpy", "dtype"] = _numpy_dtype
    for name in BY_STORAGE:
        tensor = name.replace("Storage", "Tensor")
        for module in ("torch", "torch.cuda"):
            table[module, tensor] = _unbuilt_tensor(tensor)
    table["torch", "Tensor"] = _unbuilt_tensor("Tensor")
    return table


CONSTRUCTORS = _table()
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

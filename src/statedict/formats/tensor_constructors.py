"""The constructors of tensors: from the arguments that a file gives to torch's rebuild functions, to an inert record.

Source: torch 2.13 ``torch/_utils.py`` (the rebuild functions and their arguments), ``torch/serialization.py`` (the classes of
storages), ``torch/_tensor.py`` (``_rebuild_from_type_v2``). Sizes, strides and offsets are those of int64, as there.
"""

from __future__ import annotations

from math import prod
from typing import NoReturn

from statedict.dtypes import BY_STORAGE, BY_TORCH, DType
from statedict.errors import CorruptFile
from statedict.formats.records import (
    ArrayRecord,
    Blob,
    Builder,
    Global,
    MappingRecord,
    StorageRef,
    TensorRecord,
    Unfit,
    shown,
)
from statedict.manifest import TorchValue
from statedict.views import packed_stride

__all__ = [
    "TENSOR_CONSTRUCTORS",
    "dtype_of",
    "rebuild_tensor",
    "set_attributes",
    "set_state",
    "sizes",
    "storage_dtype",
]

# torch counts in int64: nothing in a tensor's geometry is larger.
_MOST = 2**63 - 1
# No tensor has more dimensions; torch's own iterators stop at 64.
_MOST_DIMENSIONS = 1024


def _bad(what: str) -> NoReturn:
    raise CorruptFile(f"a tensor can't be rebuilt: {what}")


def dtype_of(value: object) -> DType:
    """The dtype that a value of the file names."""
    if isinstance(value, TorchValue) and value.kind == "dtype" and value.value in BY_TORCH:
        return BY_TORCH[str(value.value)]
    _bad(f"{shown(value)} is no dtype")


def storage_dtype(storage_class: object) -> DType | None:
    """The dtype of a storage class such as ``torch.FloatStorage``, ``torch.cuda.HalfStorage``; None for another."""
    return BY_STORAGE.get(storage_class.name) if isinstance(storage_class, Global) else None


def sizes(value: object, what: str) -> tuple[int, ...]:
    """A shape or strides: plain integers from 0 to 2**63 - 1. Raises ``CorruptFile`` for anything else."""
    if type(value) is tuple and len(value) <= 4:
        for item in value:
            if type(item) is not int or not 0 <= item <= _MOST:
                break
        else:
            return value
    items = value.value if isinstance(value, TorchValue) and value.kind == "Size" else value
    if not isinstance(items, (tuple, list)):
        _bad(f"its {what} is no tuple")
    if len(items) > _MOST_DIMENSIONS:
        _bad(f"its {what} has {len(items)} dimensions")
    for item in items:
        if type(item) is not int or item < 0 or item > _MOST:
            _bad(f"its {what} holds {shown(item)}")
    return tuple(items)


def rebuild_tensor(args: tuple[object, ...], dtype: DType | None = None, metadata: object = None) -> TensorRecord:
    """The tensor of (storage, offset, shape, stride, requires_grad), checked except for its storage's size."""
    storage, offset, shape, stride, requires_grad = args
    if type(storage) is not StorageRef:
        _bad("its storage is none")
    if type(offset) is not int or not 0 <= offset <= _MOST:
        _bad(f"its storage offset is {shown(offset)}")
    bits = ""
    if isinstance(metadata, dict):
        bits = ("c" if metadata.get("conj") else "") + ("n" if metadata.get("neg") else "")
    record = TensorRecord(
        storage,
        storage.dtype if dtype is None else dtype,
        offset,
        sizes(shape, "shape"),
        sizes(stride, "stride"),
        bool(requires_grad),
        bits,
    )
    if len(record.shape) != len(record.stride):
        _bad(f"shape {list(record.shape)} and stride {list(record.stride)} are of different lengths")
    return record


def _rebuild_tensor(args: tuple[object, ...]) -> TensorRecord:
    if len(args) != 4:
        _bad("wrong number of arguments")
    return rebuild_tensor((*args, False))


def _rebuild_tensor_v2(args: tuple[object, ...]) -> TensorRecord:
    if len(args) not in (5, 6, 7):
        _bad("wrong number of arguments")
    return rebuild_tensor(args[:5], None, args[6] if len(args) == 7 else None)


def _rebuild_tensor_v3(args: tuple[object, ...]) -> TensorRecord:
    if len(args) not in (7, 8):
        _bad("wrong number of arguments")
    return rebuild_tensor(args[:5], dtype_of(args[6]), args[7] if len(args) == 8 else None)


def _rebuild_parameter(args: tuple[object, ...]) -> TensorRecord:
    if len(args) not in (3, 4) or not isinstance(args[0], TensorRecord):
        raise Unfit
    record = _copied(args[0])
    record.requires_grad = bool(args[1])
    if record.kind == "Tensor":
        record.kind = "Parameter"
    if len(args) == 4:
        set_attributes(record, args[3])
    return record


def _parameter(args: tuple[object, ...]) -> TensorRecord:
    """``Parameter([data[, requires_grad]])``: torch 0.1 to 0.3 wrote the call, and BUILD with the rest."""
    data = args[0] if args else _unbuilt(BY_TORCH["float32"])
    if not isinstance(data, TensorRecord):
        raise Unfit
    return _rebuild_parameter((data, args[1] if len(args) > 1 else True, None))


def _variable(args: tuple[object, ...]) -> TensorRecord:
    """``Variable([data])``: torch 0.1 to 0.3."""
    data = args[0] if args else _unbuilt(BY_TORCH["float32"])
    if not isinstance(data, TensorRecord):
        raise Unfit
    return _copied(data)


def _copied(record: TensorRecord) -> TensorRecord:
    """A parameter shares its data with the tensor it is made of, which may be used elsewhere as well."""
    made = TensorRecord(
        record.storage, record.dtype, record.offset, record.shape, record.stride, record.requires_grad, record.bits
    )
    made.kind, made.layout, made.device = record.kind, record.layout, record.device
    made.parts, made.attributes = record.parts, record.attributes
    return made


def _fill(target: TensorRecord, source: TensorRecord) -> None:
    """Give a tensor the data of another one, in place: the pickle may refer to it again."""
    for name in ("storage", "dtype", "offset", "shape", "stride", "requires_grad", "bits", "layout", "parts", "device"):
        setattr(target, name, getattr(source, name))


def _rebuild_from_type(args: tuple[object, ...]) -> object:
    """A subclass, or a tensor with Python attributes: (function, type, arguments, state)."""
    if len(args) not in (3, 4) or not isinstance(args[0], Global) or not isinstance(args[2], tuple):
        raise Unfit
    function, cls, inner = args[0], args[1], args[2]
    # One level only: the function of a function could go on for as long as the file is.
    if function.build is None or function.build not in _REBUILDERS.values():
        raise Unfit
    made = function.build(inner)
    if not isinstance(made, TensorRecord):
        raise Unfit
    if isinstance(cls, Global) and cls.type not in ("torch.Tensor", "torch._tensor.Tensor"):
        made.kind = {"torch.nn.parameter.Parameter": "Parameter", "torch.nn.parameter.Buffer": "Buffer"}.get(
            cls.type, cls.type
        )
    if len(args) == 4:
        set_attributes(made, args[3])
    return made


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
    made = _composite(layout.removeprefix("torch."), parts, "values", sizes(data[len(names)], "shape"))
    if len(data) == 4 and layout == "torch.sparse_coo":
        made.attributes = {"is_coalesced": bool(data[3])}
    return made


def _composite(layout: str, parts: dict[str, object], like: str, shape: tuple[int, ...]) -> TensorRecord:
    tensors = {name: part for name, part in parts.items() if isinstance(part, TensorRecord)}
    if len(tensors) != len(parts):
        raise Unfit
    made = TensorRecord(None, tensors[like].dtype, 0, shape, ())
    made.layout, made.parts = layout, tensors
    storage = tensors[like].storage
    made.device = tensors[like].device or (storage.device if storage is not None else None)
    return made


def _rebuild_quantized(args: tuple[object, ...]) -> TensorRecord:
    """(storage, offset, size, stride, (qscheme, scale, zero point[, axis]), requires_grad, hooks)."""
    if len(args) < 6 or not isinstance(args[4], tuple) or not args[4]:
        raise Unfit
    inner = rebuild_tensor((*args[:4], args[5]))
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
    record = TensorRecord(None, dtype_of(args[0]), 0, sizes(args[1], "shape"), sizes(args[2], "stride"), bool(args[3]))
    record.device = "meta"
    return record


def _rebuild_wrapper(args: tuple[object, ...]) -> TensorRecord:
    """(class, dtype, size, stride, storage offset, layout, device, requires_grad): a subclass without data of its own."""
    if len(args) != 8 or not isinstance(args[0], Global):
        raise Unfit
    record = TensorRecord(None, dtype_of(args[1]), 0, sizes(args[2], "shape"), sizes(args[3], "stride"), bool(args[7]))
    record.kind, record.layout = args[0].type, "wrapper"
    record.device = str(args[6].value) if isinstance(args[6], TorchValue) else None
    return record


def _rebuild_on_device(args: tuple[object, ...]) -> TensorRecord:
    """(data, dtype, device, requires_grad): a tensor of an accelerator, saved as an array or a CPU tensor.

    torch converts the data to the dtype (``from_numpy(data).to(dtype)``); shown is the dtype in which they are stored.
    """
    if len(args) != 4:
        raise Unfit
    data = args[0]
    made = _of_array(data) if isinstance(data, ArrayRecord) else data
    if not isinstance(made, TensorRecord):
        raise Unfit
    made = _copied(made)
    device = args[2].value if isinstance(args[2], TorchValue) else args[2]
    made.device, made.requires_grad = str(device) if isinstance(device, str) else made.device, bool(args[3])
    return made


def _of_array(array: ArrayRecord) -> TensorRecord:
    """An array of the pickle as a tensor over the same bytes."""
    numpy, data = array.dtype, array.data
    if numpy is None or numpy.dtype is None or numpy.byteorder != "little" or not isinstance(data, (bytes, Blob)):
        raise Unfit
    storage = StorageRef("array", numpy.dtype, prod(array.shape), "cpu")
    storage.data = data
    stride = packed_stride(array.shape[::-1])[::-1] if array.fortran else packed_stride(array.shape)
    return TensorRecord(storage, numpy.dtype, 0, array.shape, stride)


def _unbuilt(dtype: DType) -> TensorRecord:
    """A tensor that BUILD will fill; left as it is, it is empty."""
    record = TensorRecord(None, dtype, 0, (0,), (1,))
    record.layout = "unbuilt"
    return record


def _unbuilt_tensor(name: str) -> Builder:
    """``torch.FloatTensor()``, filled by BUILD with (storage, offset, size, stride): torch 0.1 to 0.3."""
    dtype = BY_STORAGE.get(name.replace("Tensor", "Storage"), BY_TORCH["float32"])

    def build(args: tuple[object, ...]) -> TensorRecord:
        if args:
            raise Unfit
        return _unbuilt(dtype)

    return build


def set_state(target: TensorRecord, state: object) -> None:
    """What BUILD does to a tensor (``Tensor.__setstate__``); its Python attributes where the state is none of those.

    (storage, offset, size, stride) · (data, …, hooks, requires_grad, volatile) · (requires_grad, volatile, hooks), all
    of torch 0.1 to 0.3.
    """
    if not isinstance(state, tuple) or len(state) == 2:
        set_attributes(target, state)
    elif len(state) == 4:
        _fill(target, rebuild_tensor((*state, target.requires_grad)))
    elif len(state) == 5 and isinstance(state[0], TensorRecord):
        _fill(target, state[0])
        target.requires_grad = bool(state[3])
    elif len(state) == 3:
        target.requires_grad = bool(state[0])


def set_attributes(target: MappingRecord | TensorRecord, state: object) -> None:
    """Keep the attributes that a pickle sets on a value: a dict, or (the instance's dict, its slots)."""
    if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):
        state = {**state[0], **state[1]} if isinstance(state[0], dict) else state[1]
    if not isinstance(state, dict):
        return
    named = {name: value for name, value in state.items() if isinstance(name, str)}
    target.attributes = {**target.attributes, **named} if target.attributes else named


_REBUILDERS: dict[tuple[str, str], Builder] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch._utils", "_rebuild_sparse_tensor"): _rebuild_sparse,
    ("torch._utils", "_rebuild_sparse_csr_tensor"): _rebuild_sparse,
    ("torch._utils", "_rebuild_qtensor"): _rebuild_quantized,
    ("torch._utils", "_rebuild_nested_tensor"): _rebuild_nested,
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _rebuild_meta,
    ("torch._utils", "_rebuild_wrapper_subclass"): _rebuild_wrapper,
    ("torch._utils", "_rebuild_device_tensor_from_numpy"): _rebuild_on_device,
    ("torch._utils", "_rebuild_xla_tensor"): _rebuild_on_device,
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _rebuild_on_device,
}


def _table() -> dict[tuple[str, str], Builder]:
    table = dict(_REBUILDERS)
    table["torch.nn.parameter", "Parameter"] = _parameter
    table["torch.autograd.variable", "Variable"] = _variable
    for module in ("torch._tensor", "torch.tensor"):
        for name in ("_rebuild_from_type_v2", "_rebuild_from_type"):
            table[module, name] = _rebuild_from_type
    for name in (*BY_STORAGE, "Storage"):
        tensor = name.replace("Storage", "Tensor")
        for module in ("torch", "torch.cuda"):
            table[module, tensor] = _unbuilt_tensor(tensor)
    return table


TENSOR_CONSTRUCTORS = _table()

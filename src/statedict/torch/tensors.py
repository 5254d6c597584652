"""Tensors of torch as entries over their own memory, and lazy tensors as tensors of torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from statedict.dtypes import BY_TORCH, DType
from statedict.errors import CorruptFile, StateDictError, Unsupported, one_line
from statedict.manifest import StorageView, TensorEntry, TorchValue
from statedict.views import packed_stride

if TYPE_CHECKING:
    from statedict.bridge import StorageOf
    from statedict.lazy_tensor import LazyTensor

__all__ = ["entry_of", "small_value", "to_torch"]

_COMPRESSED = {
    torch.sparse_csr: ("crow_indices", "col_indices"),
    torch.sparse_bsr: ("crow_indices", "col_indices"),
    torch.sparse_csc: ("ccol_indices", "row_indices"),
    torch.sparse_bsc: ("ccol_indices", "row_indices"),
}


def dtype_of(tensor: torch.Tensor) -> DType:
    """The tensor's dtype in the program's own table."""
    return BY_TORCH[str(tensor.dtype).removeprefix("torch.")]


def small_value(value: object) -> TorchValue | None:
    """A dtype, device, size, layout, qscheme or memory format as an inert value; None for another value."""
    if isinstance(value, torch.Size):
        return TorchValue("Size", tuple(int(size) for size in value))
    kinds: tuple[tuple[type, str], ...] = (
        (torch.dtype, "dtype"),
        (torch.device, "device"),
        (torch.layout, "layout"),
        (torch.qscheme, "qscheme"),
        (torch.memory_format, "memory_format"),
    )
    for kind, name in kinds:
        if isinstance(value, kind):
            text = str(value)
            return TorchValue(name, text.removeprefix("torch.") if name == "dtype" else text)
    return None


def entry_of(tensor: torch.Tensor, storage_of: StorageOf) -> TensorEntry:
    """The tensor as an entry. Memory of the CPU is seen as it is, that of another device is copied to the CPU.

    The path is empty: whoever puts it into a tree gives it one. Raises ``Unsupported`` for layouts without visible memory.
    """
    value = tensor.detach() if type(tensor) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer) else tensor
    made = _layout(value, storage_of)
    kind = {torch.Tensor: "Tensor", torch.nn.Parameter: "Parameter", torch.nn.Buffer: "Buffer"}.get(type(tensor))
    attributes: Mapping[str, object] = {
        name: item for name, item in getattr(tensor, "__dict__", {}).items() if not name.startswith("_backward")
    }
    return made._replace(
        requires_grad=tensor.requires_grad,
        kind=kind or f"{type(tensor).__module__}.{type(tensor).__qualname__}",
        device=str(tensor.device),
        attributes={**made.attributes, **{name: item for name, item in attributes.items() if _is_inert(item)}},
    )


def _is_inert(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _layout(tensor: torch.Tensor, storage_of: StorageOf) -> TensorEntry:
    shape = tuple(tensor.shape)
    if tensor.device.type == "meta":
        stride = tuple(tensor.stride()) if tensor.layout == torch.strided else None
        made = TensorEntry((), dtype_of(tensor), shape, None, device="meta")
        return made if stride in (None, packed_stride(shape)) else made._replace(memory_stride=stride)
    if tensor.is_quantized:
        return _quantized(tensor, storage_of)
    if tensor.layout == torch.sparse_coo:
        parts = {"indices": tensor._indices(), "values": tensor._values()}
        return _composite("sparse_coo", tensor, parts, {"is_coalesced": tensor.is_coalesced()}, storage_of)
    if tensor.layout in _COMPRESSED:
        first, second = _COMPRESSED[tensor.layout]
        parts = {first: getattr(tensor, first)(), second: getattr(tensor, second)(), "values": tensor.values()}
        return _composite(str(tensor.layout).removeprefix("torch."), tensor, parts, {}, storage_of)
    if tensor.layout != torch.strided or tensor.is_nested:
        raise Unsupported(
            f"a tensor of layout {tensor.layout} can't be seen in memory", hint="Convert it to a dense one"
        )
    return _strided(tensor, dtype_of(tensor), storage_of)


def _strided(tensor: torch.Tensor, dtype: DType, storage_of: StorageOf) -> TensorEntry:
    bits = ("c" if tensor.is_conj() else "") + ("n" if tensor.is_neg() else "")
    storage = tensor.untyped_storage()
    key = (storage.data_ptr(), storage.nbytes(), str(storage.device))
    made = storage_of(key if storage.nbytes() else id(tensor), storage, lambda: (_bytes(storage), "little"))
    view = StorageView(made, int(tensor.storage_offset()), tuple(tensor.stride()), bits)
    return TensorEntry((), dtype, tuple(tensor.shape), view)


def _bytes(storage: torch.UntypedStorage) -> Any:
    """The storage's bytes; a view of them on the CPU."""
    if not storage.nbytes():
        return b""
    here = storage if storage.device.type == "cpu" else storage.cpu()  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=torch.uint8).set_(here).numpy()


def _composite(
    layout: str,
    tensor: torch.Tensor,
    parts: Mapping[str, torch.Tensor],
    facts: Mapping[str, object],
    storage_of: StorageOf,
) -> TensorEntry:
    entries = {name: entry_of(part, storage_of) for name, part in parts.items()}
    return TensorEntry(
        (), dtype_of(tensor), tuple(tensor.shape), None, layout=layout, parts=entries, attributes=dict(facts)
    )


def _quantized(tensor: torch.Tensor, storage_of: StorageOf) -> TensorEntry:
    inner = _strided(tensor, dtype_of(tensor), storage_of)
    scheme = tensor.qscheme()
    facts: dict[str, object] = {"qscheme": TorchValue("qscheme", str(scheme))}
    parts = {"int_repr": inner._replace(device=str(tensor.device), requires_grad=False)}
    if scheme in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        facts |= {"scale": tensor.q_scale(), "zero_point": tensor.q_zero_point()}
    else:
        parts["scale"] = entry_of(tensor.q_per_channel_scales(), storage_of)
        parts["zero_point"] = entry_of(tensor.q_per_channel_zero_points(), storage_of)
        facts["axis"] = tensor.q_per_channel_axis()
    return TensorEntry((), inner.dtype, inner.shape, None, layout="quantized", parts=parts, attributes=facts)


# -------------------------------------------------------------------- from a checkpoint


def to_torch(tensor: LazyTensor) -> torch.Tensor:
    """The values as a tensor on the CPU in memory of its own, with the strides that it had.

    A Parameter comes as a plain tensor; ``requires_grad`` is not set. Raises ``Unsupported`` for nested tensors, subclasses
    without data, and dtypes that torch has not.
    """
    entry = tensor.entry
    if entry.layout == "quantized" or entry.layout.startswith("sparse_"):
        return _to_layout(tensor)
    dtype = getattr(torch, entry.dtype.torch, None)
    if entry.layout != "strided" or not isinstance(dtype, torch.dtype):
        what = entry.layout if entry.layout != "strided" else f"of dtype {entry.dtype}"
        raise Unsupported(
            f"torch can't be given a tensor that is {what}", key=entry.key, hint="Its parts can be read: .parts"
        )
    if entry.view is None and entry.device == "meta":
        return torch.empty_strided(entry.shape, entry.stride, dtype=dtype, device="meta")
    tensor.check_readable()
    made = torch.empty(entry.shape, dtype=dtype)
    _fill(made, tensor)
    stride = entry.stride
    if stride == made.stride() or not entry.numel:
        return made
    strided = torch.empty_strided(entry.shape, _dense(entry.shape, stride), dtype=dtype)
    return strided.copy_(made)


def _dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in the same order of dimensions, without gaps, repetitions or overlaps."""
    steps = [1] * len(shape)
    step = 1
    for dim in sorted(range(len(shape)), key=lambda dim: (stride[dim], -dim)):
        steps[dim] = step
        step *= max(shape[dim], 1)
    return tuple(steps)


def _fill(made: torch.Tensor, tensor: LazyTensor) -> None:
    """Read the packed bytes straight into a packed tensor's memory."""
    if made.numel():
        raw = torch.empty(0, dtype=torch.uint8).set_(made.untyped_storage())
        tensor.read(out=raw.numpy())


def _to_layout(tensor: LazyTensor) -> torch.Tensor:
    """A tensor made of parts. torch itself checks whether they fit together, and says so in many ways."""
    try:
        return _to_quantized(tensor) if tensor.layout == "quantized" else _to_sparse(tensor)
    except StateDictError:
        raise
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CorruptFile(
            f"the parts of a {tensor.layout} tensor don't fit together: {one_line(error)}",
            path=tensor.origin.source,
            key=tensor.entry.key,
        ) from error


def _to_sparse(tensor: LazyTensor) -> torch.Tensor:
    entry, parts = tensor.entry, {name: to_torch(part) for name, part in tensor.parts.items()}
    if entry.layout == "sparse_coo":
        made = torch.sparse_coo_tensor(parts["indices"], parts["values"], entry.shape, check_invariants=True)
        return made._coalesced_(bool(entry.attributes.get("is_coalesced", False)))
    layout: torch.layout = getattr(torch, entry.layout)
    first, second = _COMPRESSED[layout]
    return torch.sparse_compressed_tensor(
        parts[first], parts[second], parts["values"], entry.shape, layout=layout, check_invariants=True
    )


def _to_quantized(tensor: LazyTensor) -> torch.Tensor:
    entry, parts = tensor.entry, tensor.parts
    plain = {"qint8": torch.int8, "quint8": torch.uint8, "qint32": torch.int32}.get(entry.dtype.torch)
    scheme = entry.attributes.get("qscheme")
    name = str(scheme.value) if isinstance(scheme, TorchValue) else ""
    if plain is None or "int_repr" not in parts:
        raise Unsupported(f"torch can't be given a tensor of dtype {entry.dtype}", key=entry.key)
    values = torch.empty(entry.shape, dtype=plain)
    _fill(values, parts["int_repr"])
    facts: Any = entry.attributes
    if name.startswith("torch.per_tensor"):
        return torch._make_per_tensor_quantized_tensor(values, facts["scale"], facts["zero_point"])
    scale, zero = to_torch(parts["scale"]), to_torch(parts["zero_point"])
    return torch._make_per_channel_quantized_tensor(values, scale, zero, facts["axis"])

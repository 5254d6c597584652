"""Tensors of torch as entries over their own memory, and lazy tensors as tensors of torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from statedict.dtypes import BY_TORCH, DType
from statedict.errors import StateDictError, Unsupported
from statedict.manifest import StorageView, TensorEntry, TorchValue
from statedict.torch.building import COMPRESSED, composite, dtype_in_torch
from statedict.torch.devices import DeviceFile, Ring, as_bytes, backend_of
from statedict.views import packed_stride

if TYPE_CHECKING:
    from statedict.bridge import StorageOf
    from statedict.lazy_tensor import LazyTensor

__all__ = ["entry_of", "small_value", "to_torch"]


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
    """The tensor as an entry. Memory of the CPU is seen as it is, that of another device is read
    through a ring of pinned buffers.

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
    if tensor.is_nested:
        raise Unsupported("a nested tensor can't be seen in memory", hint="Convert it to a dense one")
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
    if tensor.layout in COMPRESSED:
        first, second = COMPRESSED[tensor.layout]
        parts = {first: getattr(tensor, first)(), second: getattr(tensor, second)(), "values": tensor.values()}
        return _composite(str(tensor.layout).removeprefix("torch."), tensor, parts, {}, storage_of)
    if tensor.layout != torch.strided:
        raise Unsupported(
            f"a tensor of layout {tensor.layout} can't be seen in memory", hint="Convert it to a dense one"
        )
    return _strided(tensor, dtype_of(tensor), storage_of)


def _strided(tensor: torch.Tensor, dtype: DType, storage_of: StorageOf) -> TensorEntry:
    bits = ("c" if tensor.is_conj() else "") + ("n" if tensor.is_neg() else "")
    storage = tensor.untyped_storage()
    key = (storage.data_ptr(), storage.nbytes(), str(storage.device))
    made = storage_of(
        key if storage.nbytes() else id(tensor), storage, lambda shared: (_bytes(storage, shared), "little")
    )
    view = StorageView(made, int(tensor.storage_offset()), tuple(tensor.stride()), bits)
    return TensorEntry((), dtype, tuple(tensor.shape), view)


def _bytes(storage: torch.UntypedStorage, shared: dict[object, Any]) -> Any:
    """The storage's bytes: a view of them on the CPU, else a file that reads them through buffers of fixed size."""
    if not storage.nbytes():
        return b""
    if storage.device.type == "cpu":
        return as_bytes(storage).numpy()
    ring = shared.get(storage.device)
    if ring is None:
        ring = shared[storage.device] = Ring(backend_of(storage.device), ahead=bool(shared.get("still")))
    return DeviceFile(storage, ring)


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
    if entry.layout != "strided":
        try:
            return composite(entry, _parts(tensor))
        except StateDictError as error:
            raise error.located(tensor.origin.source) from error.__cause__
    dtype = dtype_in_torch(entry)
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
        raw = as_bytes(made.untyped_storage())
        tensor.read(out=raw.numpy())


def _parts(tensor: LazyTensor) -> dict[str, torch.Tensor]:
    """The parts of a tensor that is made of them; the numbers of a quantised one as plain integers."""
    plain = {"qint8": torch.int8, "quint8": torch.uint8, "qint32": torch.int32}.get(tensor.entry.dtype.torch)
    made = {}
    for name, part in tensor.parts.items():
        if name == "int_repr" and plain is not None:
            made[name] = torch.empty(part.shape, dtype=plain)
            _fill(made[name], part)
        elif name != "int_repr":
            made[name] = to_torch(part)
    return made

"""What torch gives for a file, and what a checkpoint shows of it, both in one plain form that ``==`` compares.

A tensor becomes its facts and its bytes, a container its kind and its items in order, a number its bytes, so that NaN and
minus zero are compared too.
"""

from __future__ import annotations

import struct
from argparse import Namespace
from collections import OrderedDict, defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

import statedict
from statedict import LazyTensor
from statedict.manifest import NumpyScalar, Opaque, TorchValue

__all__ = ["facts", "found", "found_facts", "found_sharing", "packed", "saved", "sharing"]

_SPARSE_PARTS = {
    torch.sparse_coo: ("indices", "values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}


def saved(value: object, path: Path, *, zipped: bool = True, **options: Any) -> Path:
    """The file that torch writes of the value."""
    torch.save(value, path, _use_new_zipfile_serialization=zipped, **options)
    return path


def packed(tensor: Any) -> bytes:
    """The bytes of a strided tensor in reading order, of any dtype, taken from its storage."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    if plain.numel() == 0:
        return b""
    memory = torch.tensor([], dtype=torch.uint8).set_(plain.untyped_storage()).numpy()
    size = plain.element_size()
    steps = [step * size for step in plain.stride()]
    window = memory[plain.storage_offset() * size :]
    seen = np.lib.stride_tricks.as_strided(window, (*plain.shape, size), (*steps, 1), writeable=False)
    return bytes(seen.tobytes())


def _parts(tensor: Any) -> dict[str, Any]:
    if tensor.is_quantized:
        if tensor.qscheme() == torch.per_tensor_affine:
            return {}
        return {"scale": tensor.q_per_channel_scales(), "zero_point": tensor.q_per_channel_zero_points()}
    names = _SPARSE_PARTS[tensor.layout]
    raw = {"indices": tensor._indices, "values": tensor._values} if tensor.layout == torch.sparse_coo else {}
    return {name: (raw.get(name) or getattr(tensor, name))() for name in names}


def _tensor(tensor: Any) -> tuple[object, ...]:
    dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
    device = str(tensor.device)
    if tensor.is_quantized or tensor.layout != torch.strided:
        parts = {name: _tensor(part) for name, part in _parts(tensor).items()}
        return ("parts", dtype, shape, parts)
    content = None if device == "meta" else packed(tensor)
    return ("tensor", dtype, shape, tensor.stride(), device, tensor.requires_grad, content)


def _array(values: np.ndarray[Any, Any]) -> tuple[object, ...]:
    little = values.astype(values.dtype.newbyteorder("<"))
    return ("array", little.dtype.name, values.shape, little.tobytes())


def _number(value: float | complex) -> object:
    parts = (value.real, value.imag) if isinstance(value, complex) else (value,)
    return type(value).__name__, struct.pack(f"<{len(parts)}d", *parts)


def _scalar(value: object) -> object:
    if isinstance(value, torch.Size):
        return TorchValue("Size", tuple(value))
    if isinstance(value, (torch.dtype, torch.device, torch.layout, torch.qscheme, torch.memory_format)):
        kind = type(value).__name__
        text = str(value)
        return TorchValue(kind, text.removeprefix("torch.") if kind == "dtype" else text)
    if isinstance(value, np.generic):
        little = value.astype(value.dtype.newbyteorder("<"))
        return ("numpy", little.dtype.name, little.tobytes())
    return type(value).__name__, value


def facts(value: Any) -> object:
    """The plain form of a value of torch's."""
    if isinstance(value, torch.Tensor):
        return _tensor(value)
    if isinstance(value, np.ndarray):
        return _array(value)
    if isinstance(value, (float, complex)) and not isinstance(value, np.generic):
        return _number(value)
    if isinstance(value, dict):
        extra = facts(getattr(value, "_metadata", None)) if isinstance(value, OrderedDict) else None
        return type(value).__name__, [(facts(key), facts(item)) for key, item in value.items()], extra
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value).__name__, [facts(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return type(value).__name__, sorted((facts(item) for item in value), key=repr)
    if isinstance(value, (Namespace, SimpleNamespace)):
        return "namespace", facts(vars(value))
    return _scalar(value)


def found_facts(value: Any) -> object:
    """The plain form of a value of ``Checkpoint.tree()``."""
    if isinstance(value, LazyTensor):
        return _found_tensor(value)
    if isinstance(value, NumpyScalar):
        kind = np.dtype(value.dtype)
        return ("numpy", kind.name, value.data)
    if isinstance(value, TorchValue):
        return value
    if isinstance(value, Opaque):
        return (
            "opaque",
            value.type,
            *(found_facts(part) for part in (value.args, value.state, value.items, value.pairs)),
        )
    if isinstance(value, SimpleNamespace):
        return "namespace", found_facts(vars(value))
    if isinstance(value, dict):
        extra = found_facts(getattr(value, "_metadata", None)) if isinstance(value, OrderedDict) else None
        return type(value).__name__, [(found_facts(key), found_facts(item)) for key, item in value.items()], extra
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value).__name__, [found_facts(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return type(value).__name__, sorted((found_facts(item) for item in value), key=repr)
    return facts(value)


def _found_tensor(tensor: LazyTensor) -> tuple[object, ...]:
    if tensor.entry.kind == "ndarray":
        return ("array", tensor.numpy().dtype.name, tensor.shape, bytes(tensor.read()))
    if tensor.layout not in ("strided", "wrapper"):
        parts = {name: _found_tensor(part) for name, part in tensor.parts.items() if name != "int_repr"}
        return ("parts", tensor.dtype, tensor.shape, parts)
    content = None if tensor.device == "meta" else bytes(tensor.read())
    return ("tensor", tensor.dtype, tensor.shape, tensor.stride, tensor.device, tensor.requires_grad, content)


def _walk(value: Any, path: tuple[object, ...] = ()) -> list[tuple[tuple[object, ...], Any]]:
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in _walk(item, (*path, key))]
    if type(value) in (list, tuple):
        return [leaf for index, item in enumerate(value) for leaf in _walk(item, (*path, index))]
    return [(path, value)]


def _groups(marks: list[tuple[tuple[object, ...], object]]) -> set[frozenset[tuple[object, ...]]]:
    groups: dict[object, set[tuple[object, ...]]] = defaultdict(set)
    for path, mark in marks:
        groups[mark].add(path)
    return {frozenset(paths) for paths in groups.values()}


def sharing(value: Any) -> set[frozenset[tuple[object, ...]]]:
    """The places of torch's strided tensors, grouped by the memory that they show: a storage may be a part of another."""
    tensors = [(path, leaf) for path, leaf in _walk(value) if isinstance(leaf, torch.Tensor)]
    storages = [
        (leaf.untyped_storage().data_ptr(), leaf.untyped_storage().nbytes(), path)
        for path, leaf in tensors
        if leaf.layout == torch.strided and leaf.device.type == "cpu" and leaf.untyped_storage().nbytes()
    ]
    marks: list[tuple[tuple[object, ...], object]] = []
    end = mark = 0
    for start, nbytes, path in sorted(storages, key=lambda storage: storage[:2]):
        mark += start >= end
        end = max(end, start + nbytes)
        marks.append((path, mark))
    return _groups(marks)


def found_sharing(value: Any) -> set[frozenset[tuple[object, ...]]]:
    """The same of a checkpoint's tree."""
    tensors = [(path, leaf) for path, leaf in _walk(value) if isinstance(leaf, LazyTensor)]
    views = [(path, leaf.entry.view) for path, leaf in tensors]
    return _groups([(path, view.storage.id) for path, view in views if view is not None and view.storage.nbytes])


def found(path: Path) -> object:
    """The plain form of everything in a file, as ours reads it."""
    with statedict.open(path) as checkpoint:
        return found_facts(checkpoint.tree())

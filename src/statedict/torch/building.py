"""Tensors of torch's over storages that are loaded: views, ties and layouts as the entries of a manifest say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from statedict.errors import CorruptFile, StateDictError, Unsupported, one_line
from statedict.formats.layout import identity
from statedict.manifest import TensorEntry, TorchValue

__all__ = ["COMPRESSED", "TensorBuilder", "composite", "dtype_in_torch"]

# The names of the index tensors of each compressed sparse layout.
COMPRESSED = {
    torch.sparse_csr: ("crow_indices", "col_indices"),
    torch.sparse_bsr: ("crow_indices", "col_indices"),
    torch.sparse_csc: ("ccol_indices", "row_indices"),
    torch.sparse_bsc: ("ccol_indices", "row_indices"),
}
# What torch raises where the parts of a tensor don't fit together.
_UNFIT = (ArithmeticError, AssertionError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)

_NOTHING: Mapping[str, object] = {}
_NO_PARTS: Mapping[str, TensorEntry] = {}

# The storage that a tensor is a view of, and the byte of the manifest's storage that it begins at.
Place = Callable[[TensorEntry], "tuple[torch.UntypedStorage, int]"]


def dtype_in_torch(entry: TensorEntry) -> torch.dtype:
    """torch's dtype of the tensor. Raises ``Unsupported`` where it has none."""
    dtype = getattr(torch, entry.dtype.torch, None)
    if not isinstance(dtype, torch.dtype):
        raise Unsupported(f"torch has no dtype {entry.dtype}", key=entry.key, hint="Its bytes can be read: .read()")
    return dtype


def composite(entry: TensorEntry, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A sparse, quantised or nested tensor of its parts. torch itself checks whether they fit together.

    Raises ``CorruptFile`` where they don't, ``Unsupported`` for layouts that torch can't be given.
    """
    try:
        if entry.layout == "quantized":
            return _quantized(entry, parts)
        if entry.layout.startswith("sparse_"):
            return _sparse(entry, parts)
        if entry.layout == "nested":
            made: torch.Tensor = torch._nested_view_from_buffer(*parts.values())
            return made
    except StateDictError:
        raise
    except _UNFIT as error:
        what = f"the parts of a {entry.layout} tensor don't fit together: {one_line(error)}"
        raise CorruptFile(what, key=entry.key) from error
    raise Unsupported(
        f"torch can't be given a tensor that is {entry.layout}", key=entry.key, hint="Its parts can be read: .parts"
    )


def _sparse(entry: TensorEntry, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    checked = not any(part.is_meta for part in parts.values())
    if entry.layout == "sparse_coo":
        made = torch.sparse_coo_tensor(parts["indices"], parts["values"], entry.shape, check_invariants=checked)
        return made._coalesced_(bool(entry.attributes.get("is_coalesced", False)))
    layout: torch.layout = getattr(torch, entry.layout)
    first, second = COMPRESSED[layout]
    return torch.sparse_compressed_tensor(
        parts[first], parts[second], parts["values"], entry.shape, layout=layout, check_invariants=checked
    )


def _quantized(entry: TensorEntry, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    scheme = entry.attributes.get("qscheme")
    name = str(scheme.value) if isinstance(scheme, TorchValue) else ""
    if "int_repr" not in parts:
        raise Unsupported(f"torch can't be given a tensor of dtype {entry.dtype}", key=entry.key)
    facts: Any = entry.attributes
    if name.startswith("torch.per_tensor"):
        return torch._make_per_tensor_quantized_tensor(parts["int_repr"], facts["scale"], facts["zero_point"])
    scale, zero = parts["scale"], parts["zero_point"]
    return torch._make_per_channel_quantized_tensor(parts["int_repr"], scale, zero, facts["axis"])


class TensorBuilder:
    """Builds the tensors of one load. The same elements under two keys come to share their memory again."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._reordered: dict[tuple[object, ...], torch.Tensor] = {}

    def build(self, entry: TensorEntry) -> torch.Tensor:
        """The tensor, a Parameter if it was one. Raises ``Unsupported`` and ``CorruptFile`` by its key."""
        if entry.layout != "strided":
            made, attributes, parts = self._composite(entry), _NOTHING, _NO_PARTS
        else:
            made, attributes, parts = self._strided(entry), entry.attributes, entry.parts
        if entry.kind == "Parameter":
            made = torch.nn.Parameter(made, requires_grad=False)
        if entry.requires_grad:
            if not (made.is_floating_point() or made.is_complex()):
                raise CorruptFile(f"a tensor of {entry.dtype} can't require gradients", key=entry.key)
            made.requires_grad_(True)
        if attributes or parts:
            for name, value in [*attributes.items(), *[(name, self.build(part)) for name, part in parts.items()]]:
                _set(made, name, value)
        return made

    def _composite(self, entry: TensorEntry) -> torch.Tensor:
        if entry.layout != "quantized":
            return composite(entry, {name: self.build(part) for name, part in entry.parts.items()})
        plain = {"qint8": torch.int8, "quint8": torch.uint8, "qint32": torch.int32}.get(entry.dtype.torch)
        if plain is None or "int_repr" not in entry.parts:
            raise Unsupported(f"torch can't be given a tensor of dtype {entry.dtype}", key=entry.key)
        parts = {name: self.build(part) for name, part in entry.parts.items() if name != "int_repr"}
        parts["int_repr"] = self._view(entry.parts["int_repr"], plain)
        return composite(entry, parts)

    def _strided(self, entry: TensorEntry) -> torch.Tensor:
        dtype = dtype_in_torch(entry)
        if entry.view is None:
            return torch.empty_strided(entry.shape, entry.stride, dtype=dtype, device="meta")
        made = self._view(entry, dtype)
        if entry.memory_stride is not None and entry.memory_stride != entry.view.stride and entry.numel:
            made = self._in_memory_order(entry, made)
        # The bits of a view are taken back where the file has them: the bytes stay those that others share.
        if "c" in entry.view.bits:
            made = made.conj()
        if "n" in entry.view.bits:
            made = made._neg_view()
        return made

    def _view(self, entry: TensorEntry, dtype: torch.dtype) -> torch.Tensor:
        view = entry.view
        assert view is not None
        storage, low = self._place(entry)
        offset = view.offset - low * 8 // entry.dtype.bits if storage.nbytes() else 0
        try:
            return torch.empty(0, dtype=dtype, device=storage.device).set_(storage, offset, entry.shape, view.stride)
        except _UNFIT as error:
            raise Unsupported(f"torch has no such tensor: {one_line(error)}", key=entry.key) from error

    def _in_memory_order(self, entry: TensorEntry, made: torch.Tensor) -> torch.Tensor:
        """The tensor in the order that its elements had in memory, where the file holds them in another."""
        assert entry.view is not None
        known = (entry.view.storage.id, made.device, *identity(entry))
        found = self._reordered.get(known)
        if found is None:
            # What an expanded tensor repeats is there once.
            for dim, step in enumerate(entry.stride):
                made = made.narrow(dim, 0, 1) if step == 0 else made
            found = torch.empty_strided(made.shape, entry.stride, dtype=made.dtype, device=made.device).copy_(made)
            self._reordered[known] = found
        return found.as_strided(entry.shape, entry.stride)


def _set(tensor: torch.Tensor, name: str, value: object) -> None:
    """Set a Python attribute that was set on the tensor, unless it would hide one that every tensor has."""
    if not hasattr(torch.Tensor, name) and not name.startswith("__"):
        tensor.__dict__[name] = value

"""Weights that are not stored as the numbers that they mean: quantised ones, and whether their scales are there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from statedict.manifest import Finding, TensorEntry
from statedict.ops.diagnosing.origins import Origin
from statedict.ops.diagnosing.subject import Part, Subject
from statedict.ops.findings import named
from statedict.report.units import plural

__all__ = ["packed_origins", "packing_faults"]


class _Scheme(NamedTuple):
    """How one library stores quantised weights: the leaves that only it writes, and those that it doesn't have."""

    name: str
    leaves: tuple[str, ...]
    without: tuple[str, ...] = ()


# Sources: bitsandbytes ``nn/modules.py`` (_save_to_state_dict) and ``functional.py`` (QuantState.as_dict); ``qlinear`` of AutoGPTQ and
# AutoAWQ; transformers ``integrations/finegrained_fp8.py``; compressed-tensors ``compressors``; torch ``ao/nn/quantized``.
_SCHEMES = (
    _Scheme("bitsandbytes, 4 bits", ("absmax", "quant_map")),
    _Scheme("bitsandbytes, 8 bits", ("SCB",)),
    _Scheme("GPTQ", ("qweight", "scales", "g_idx")),
    _Scheme("AWQ", ("qweight", "scales"), without=("g_idx",)),
    _Scheme("float8 in blocks", ("weight_scale_inv",)),
    _Scheme("compressed-tensors", ("weight_packed", "weight_scale")),
    _Scheme("float8 or int8 with scales", ("weight_scale",), without=("weight_packed",)),
    _Scheme("float8 with scales, as ComfyUI has it", ("scale_weight",)),
    _Scheme("torch.ao", ("_packed_params",)),
)
# Words in the names of what makes numbers of stored integers: scales, zero points, code books.
_SCALES = ("scale", "scb", "absmax", "quant_map", "zero", "codebook", "amax")
# Leaves that hold weights in integers.
_PACKED = ("weight", "qweight", "weight_packed")
_SMALL_INTEGERS = frozenset({"I8", "U8"})


def packed_origins(subject: Subject) -> Iterator[Origin]:
    """The schemes by which the weights of each state dict are quantised."""
    for part in subject.parts:
        leaves = {component for name in part.tensors for component in name.split(".")[-3:]}
        for scheme in _SCHEMES:
            if leaves.issuperset(scheme.leaves) and not leaves.intersection(scheme.without):
                entries = [
                    entry for name, entry in part.tensors.items() if set(name.split(".")[-3:]) & set(scheme.leaves[:1])
                ]
                yield _quantised(subject, part, scheme.name, entries)
        own = [entry for entry in part.tensors.values() if entry.layout == "quantized"]
        if own and "_packed_params" not in leaves:
            yield _quantised(subject, part, "torch.ao", own)


def _quantised(subject: Subject, part: Part, scheme: str, entries: Sequence[TensorEntry]) -> Origin:
    message = (
        f"{part.where}{plural(len(entries), 'layer')} are quantised ({scheme}). In a plain float model these "
        "integers would be taken for weights: load the file with the library that wrote it, or have that library "
        "write float weights"
    )
    return Origin(f"quantised: {scheme}", Finding("quantised", "info", message, subject.keys(entries)))


def packing_faults(subject: Subject) -> Iterator[Finding]:
    """Stored integers and eight-bit floats whose scales aren't in the file."""
    for part in subject.parts:
        scaled = {name.rpartition(".")[0] for name in part.tensors if _is_scale(name)}
        # The scale of ``a.weight`` is ``a.weight_scale`` or ``a.SCB``, or stands below it: ``a.weight.absmax``.
        owners = scaled | {stem.rpartition(".")[0] for stem in scaled if stem.rpartition(".")[2] in _PACKED}
        bare = {name: entry for name, entry in part.tensors.items() if name.rpartition(".")[0] not in owners}
        yield from _integers(subject, part, {name: entry for name, entry in bare.items() if _is_packed(name, entry)})
        eight = [entry for entry in part.tensors.values() if _is_float8(entry)]
        without = {name: entry for name, entry in bare.items() if _is_float8(entry)}
        if without and not any(
            "scale" in name.lower() and entry.numel == 1 and "." not in name for name, entry in bare.items()
        ):
            yield _float8(subject, part, without, len(eight) - len(without))


def _is_scale(name: str) -> bool:
    leaf = name.rpartition(".")[2].lower()
    return any(word in leaf for word in _SCALES)


def _is_packed(name: str, entry: TensorEntry) -> bool:
    leaf = name.rpartition(".")[2]
    small = entry.dtype.code in _SMALL_INTEGERS or (leaf != "weight" and entry.dtype.code == "I32")
    return leaf in _PACKED and small and len(entry.shape) > 1 and entry.numel > 1


def _is_float8(entry: TensorEntry) -> bool:
    # E8M0 is the dtype of scales themselves.
    return (
        entry.dtype.kind == "float"
        and entry.dtype.bits == 8
        and entry.dtype.code not in ("F8_E8M0",)
        and entry.numel > 1
    )


def _integers(subject: Subject, part: Part, found: dict[str, TensorEntry]) -> Iterator[Finding]:
    if found:
        kinds = ", ".join(dict.fromkeys([entry.dtype.torch for entry in found.values()]))
        message = (
            f"{part.where}{plural(len(found), 'weight')} are integers ({kinds}) without a scale beside them: "
            f"{named(list(found))}. Nobody can say which numbers they stand for; a float model would take them as "
            "they are, up to ±127. Get the file again with its scales (SCB, absmax, scales …), or the float weights"
        )
        yield Finding("scale-missing", "error", message, subject.keys(found.values()))


def _float8(subject: Subject, part: Part, found: dict[str, TensorEntry], others: int) -> Finding:
    what = f"{part.where}{plural(len(found), 'tensor')} of float8 have no scale beside them: {named(list(found))}"
    if others:
        message = f"{what}, while {others:,} others have. Theirs are lost: loaded as they are, these layers would be wrong by their scale"
        return Finding("scale-missing", "error", message, subject.keys(found.values()))
    message = (
        f"{what}. Either they were cast without one, and are right as they are, or their scales (weight_scale_inv, "
        "scale_weight) were left out, and every layer is wrong by a factor. The file can't tell: look where it "
        "comes from"
    )
    return Finding("float8-without-scale", "warning", message, subject.keys(found.values()))

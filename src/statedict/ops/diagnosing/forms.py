"""Tensors that stand for others: adapters, and weights in another form (normalised, pruned), and what tools leave behind."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from statedict.manifest import Finding, TensorEntry
from statedict.ops.diagnosing.origins import Origin
from statedict.ops.diagnosing.subject import Part, Subject
from statedict.ops.findings import named
from statedict.report.units import plural

__all__ = ["adapter_faults", "forms_of"]

# A and B of low-rank adapters: peft's ``lora_A``, kohya's ``lora_down``, LoHa's and LoKr's are others.
_LORA = re.compile(r"(?:^|[._])lora[._]?(A|B|down|up|embedding_A|embedding_B)(?:[._]|$)")
_SECOND = frozenset({"B", "up", "embedding_B"})
# What counting tools leave in modules (thop ``profile.py``).
_COUNTERS = frozenset({"total_ops", "total_params"})


def forms_of(subject: Subject) -> Iterator[Origin]:
    """Adapters, reparametrised weights, old names of norms, and litter, by the names in each state dict."""
    for part in subject.parts:
        yield from _adapters(subject, part)
        yield from _norms(subject, part)
        yield from _pruned(subject, part)
        yield from _small_things(subject, part)


# -------------------------------------------------------------------- adapters


def _adapters(subject: Subject, part: Part) -> Iterator[Origin]:
    found = [name for name in part.tensors if _LORA.search(name)]
    if not found:
        return
    rank = _rank(part, found)
    about = f"{plural(len(found), 'tensor')} of a low-rank adapter (LoRA{rank}): {named(found)}"
    keys = subject.keys([part.tensors[name] for name in found])
    based = [name for name in part.tensors if ".base_layer." in name]
    if based:
        message = (
            f"{part.where}{about}, and the {len(based):,} weights that they belong to ('….base_layer.…'): the state "
            "of a model that peft has wrapped. A plain model has neither these names nor the adapter. The "
            "merge_lora rule adds the adapter to the weights: scaling is lora_alpha / r of its configuration, which "
            "isn't in this file"
        )
        yield Origin("a model with a LoRA adapter", Finding("lora-model", "info", message, keys))
    elif 10 * len(found) >= 9 * len(part.tensors):
        message = f"{part.where}{about}. There are no weights beside them: it is an adapter, to be loaded into a model that has its own"
        yield Origin("a LoRA adapter", Finding("lora-adapter", "info", message, keys))
    else:
        yield Origin(
            "a LoRA adapter", Finding("lora-model", "info", f"{part.where}{about}, beside other weights", keys)
        )


def _rank(part: Part, found: Sequence[str]) -> str:
    """The rank, where it is the same everywhere: the rows of A, the columns of B."""
    ranks = set()
    for name in found:
        shape = part.tensors[name].shape
        match = _LORA.search(name)
        if match is not None and len(shape) >= 2:
            ranks.add(shape[1] if match[1] in _SECOND else shape[0])
    return f" of rank {ranks.pop()}" if len(ranks) == 1 else ""


def adapter_faults(subject: Subject) -> Iterator[Finding]:
    """Adapters that change nothing, because all that they would add is multiplied by zero. Needs figures."""
    for part in subject.parts:
        second = {name: entry for name, entry in part.tensors.items() if (m := _LORA.search(name)) and m[1] in _SECOND}
        zero = [entry for entry in second.values() if subject.figure(entry, "zeros") == entry.numel > 0]
        if zero and len(zero) == len(second):
            message = (
                f"{part.where}the B of all {plural(len(zero), 'adapter layer')} is zero, as peft makes them, so the "
                "adapter changes nothing: it was never trained, or its trained values went elsewhere"
            )
            yield Finding("adapter-unchanged", "warning", message, subject.keys(zero))


# -------------------------------------------------------------------- reparametrised weights


def _norms(subject: Subject, part: Part) -> Iterator[Origin]:
    """weight_norm and spectral_norm, in the names of the old hooks and of torch.nn.utils.parametrizations."""
    tensors = part.tensors
    weight, spectral = [], []
    for name in tensors:
        stem = name[: -len("_g")]
        if name.endswith("_g") and f"{stem}_v" in tensors:
            weight.append(name)
        elif name.endswith("_u") and f"{stem}_orig" in tensors:
            spectral.append(name)
        elif re.search(r"(^|\.)parametrizations\.[^.]+\.original0$", name) and f"{name[:-1]}1" in tensors:
            weight.append(name)
        elif re.search(r"(^|\.)parametrizations\.[^.]+\.0\._u$", name):
            spectral.append(name)
    if weight:
        message = (
            f"{part.where}{plural(len(weight), 'layer')} are under weight_norm, each weight as a length and a "
            f"direction: {named(weight)}. A plain layer has one weight instead: the rule fold_weight_norm() makes "
            "it; a model with weight_norm takes them as they are"
        )
        yield Origin("weight_norm", Finding("weight-norm", "info", message, _keys(subject, part, weight)))
    if spectral:
        message = (
            f"{part.where}{plural(len(spectral), 'layer')} are under spectral_norm: {named(spectral)}. Their weight "
            "is the original divided by σ = uᵀ W v. A plain layer has one weight instead: load into a model with "
            "spectral_norm, then remove it there"
        )
        yield Origin("spectral_norm", Finding("spectral-norm", "info", message, _keys(subject, part, spectral)))


def _pruned(subject: Subject, part: Part) -> Iterator[Origin]:
    """torch.nn.utils.prune: an original and a mask for each weight."""
    masked = [name for name in part.tensors if name.endswith("_mask") and f"{name[:-5]}_orig" in part.tensors]
    if masked:
        message = (
            f"{part.where}{plural(len(masked), 'weight')} are pruned by torch.nn.utils.prune, each as an original "
            f"and a mask: {named(masked)}. A plain model has their product instead: prune.remove(module, 'weight') "
            "in the model that was pruned makes it"
        )
        yield Origin("pruning masks", Finding("pruned", "info", message, _keys(subject, part, masked)))


def _small_things(subject: Subject, part: Part) -> Iterator[Origin]:
    litter = [name for name in part.tensors if name.rpartition(".")[2] in _COUNTERS]
    if litter:
        drop = subject.command(
            "convert", "SOURCE", "weights.safetensors", "--drop", "*total_ops", "--drop", "*total_params"
        )
        message = (
            f"{part.where}{plural(len(litter), 'tensor')} are counters that a profiler (thop) left in the model, no "
            f"weights: {named(litter)}. A model without them calls them unexpected. {drop}"
        )
        yield Origin("a profiled model", Finding("profiler-litter", "warning", message, _keys(subject, part, litter)))
    old = [name for name in part.tensors if re.search(r"(^|\.)[Ll]ayer_?[Nn]orm\d*\.(gamma|beta)$", name)]
    if old:
        message = (
            f"{part.where}{plural(len(old), 'tensor')} of LayerNorm are named as TensorFlow names them, gamma and "
            f"beta: {named(old)}. torch's are weight and bias"
        )
        yield Origin("names of TensorFlow's", Finding("old-norm-names", "info", message, _keys(subject, part, old)))


def _keys(subject: Subject, part: Part, names: Sequence[str]) -> tuple[str, ...]:
    tensors: Mapping[str, TensorEntry] = part.tensors
    return subject.keys([tensors[name] for name in names])

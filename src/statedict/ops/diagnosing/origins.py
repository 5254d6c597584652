"""What a checkpoint was saved from: the wrappers and programs whose names stand in it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from statedict.errors import one_line
from statedict.keys import dotted
from statedict.manifest import Finding, TensorEntry
from statedict.ops.diagnosing.subject import Part, Subject
from statedict.ops.findings import named
from statedict.ops.shadows import inner_averages
from statedict.prefixes.wrappers import COUNTER, in_source
from statedict.report.units import plural

__all__ = ["Origin", "origins_of"]

# Who puts each component into the keys. Sources: see ``prefixes/wrappers.py``; fairscale ``nn/misc/flatten_params_wrapper.py``.
_WRAPPERS = {
    "_orig_mod": ("compiled", "torch.compile"),
    "_fsdp_wrapped_module": ("fsdp", "FullyShardedDataParallel"),
    "_checkpoint_wrapped_module": ("checkpoint-wrapper", "the wrapper of activation checkpointing"),
    "_forward_module": ("lightning-strategy", "a strategy of Lightning's"),
    "_fpw_module": ("fairscale", "fairscale's FlattenParamsWrapper"),
}
# The attributes in which people's LightningModules hold the model.
_ATTRIBUTES = ("model.", "net.", "network.", "module.", "backbone.")
# Keys beside the weights that only one program writes. DeepSpeed: ``runtime/engine.py``, _save_checkpoint and _save_zero_checkpoint.
_PROGRAMS = (
    (
        "DeepSpeed",
        frozenset({"ds_version", "ds_config", "param_shapes", "mp_world_size", "dp_world_size"}),
    ),
    ("Megatron-LM", frozenset({"checkpoint_version", "num_floating_point_operations_so_far"})),
    ("Ultralytics' YOLO", frozenset({"train_args", "train_metrics"})),
    ("OpenMMLab", frozenset({"message_hub"})),
    ("fairseq", frozenset({"optimizer_history", "task_state"})),
    ("AllenNLP", frozenset({"metric_tracker", "batch_num_total"})),
)


class Origin(NamedTuple):
    """One thing that a checkpoint was saved from: the name of it, and what to say; nothing where the name says all."""

    name: str
    finding: Finding | None = None


def origins_of(subject: Subject) -> list[Origin]:
    """Everything that the names show about where a checkpoint comes from."""
    found = [*_programs(subject)]
    for part in subject.parts:
        found += [*_wrappers(subject, part), *_mixed(subject, part), *_flat(subject, part), *_averages(subject, part)]
    return found


# -------------------------------------------------------------------- wrappers


def _wrappers(subject: Subject, part: Part) -> Iterator[Origin]:
    names = {key: key for key in part.tensors}  # each without the wrappers that were found so far
    for word, (code, who) in _WRAPPERS.items():
        component = re.compile(rf"(?<![^.]){word}\.")
        having = [key for key, name in names.items() if component.search(name)]
        if having:
            names.update({key: component.sub("", names[key]) for key in having})
            what = f"{part.where}{_of(having, part)} the component '{word}', which {who} puts into them"
            yield Origin(who, Finding(code, "warning", _without(subject, what), _keys(subject, part, having)))
    yield from _data_parallel(subject, part, names)


def _data_parallel(subject: Subject, part: Part, names: Mapping[str, str]) -> Iterator[Origin]:
    """``names`` are those of the tensors without the wrappers that have words of their own."""
    plain = {key: name for key, name in names.items() if name != COUNTER}
    keys = _keys(subject, part, plain)
    if plain and all(name.startswith("module.") and len(name) > 7 for name in plain.values()):
        begins = (
            f"{part.where}all {len(plain):,} names begin" if len(plain) > 1 else f"{part.where}its only name begins"
        )
        if len(plain) < len(names):
            what = (
                f"{begins} with 'module.', and '{COUNTER}' counts beside them: it is the state of an AveragedModel "
                "(torch.optim.swa_utils)"
            )
            message = f"{_without(subject, what)}. Its batch norms still need update_bn, if nobody called that"
            yield Origin("AveragedModel", Finding("averaged-model", "warning", message, keys))
            return
        twice = " twice" if all(name.startswith("module.module.") for name in plain.values()) else ""
        what = f"{begins} with 'module.'{twice}: it was saved from a model in DataParallel or DistributedDataParallel"
        yield Origin("DataParallel", Finding("data-parallel", "warning", _without(subject, what), keys))
    elif "module" in in_source(list(plain.values()), {}):
        having = [key for key, name in plain.items() if ".module." in name]
        if having:
            what = (
                f"{part.where}{_of(having, part)} 'module' inside: a part of the model was in DataParallel or the like"
            )
            message = _without(subject, what)
            yield Origin("DataParallel", Finding("data-parallel-inside", "info", message, _keys(subject, part, having)))


def _of(having: Sequence[str], part: Part) -> str:
    count = "all" if len(having) == len(part.tensors) else f"{len(having):,} of"
    return f"{count} {plural(len(part.tensors), 'name')} have"


def _without(subject: Subject, what: str) -> str:
    """What was found, and what takes it away."""
    repair = subject.command("convert", "SOURCE", "weights.safetensors", "--weights-only")
    return (
        f'{what}. A plain model has names without it: load_into(model, …, rules="auto") takes it away, and {repair} writes '
        "a file without it"
    )


def _mixed(subject: Subject, part: Part) -> Iterator[Origin]:
    """Names with and without ``module.`` in one state dict: two copies, or one of which half was renamed."""
    wrapped = {name[7:]: entry for name, entry in part.tensors.items() if name.startswith("module.")}
    plain = {name: entry for name, entry in part.tensors.items() if not name.startswith("module.") and name != COUNTER}
    both = [name for name in wrapped if name in plain]
    if both:
        yield Origin("DataParallel, in part", _copies(subject, part, wrapped, both))
        return
    modules = {name.partition(".")[0] for name in plain if "." in name}
    shared = [name for name in wrapped if "." in name and name.partition(".")[0] in modules]
    if shared:
        example = one_line(shared[0].partition(".")[0])
        what = (
            f"{part.where}{len(wrapped):,} of {plural(len(part.tensors), 'name')} begin with 'module.' and the "
            f"others don't, though they belong to the same modules ('{example}'): half of a renaming, or two models "
            "in one. Nothing is repaired by itself: look at both with "
            f"{subject.command('inspect', 'SOURCE', '--tree')}"
        )
        yield Origin("DataParallel, in part", Finding("mixed-prefix", "warning", what, subject.keys(wrapped.values())))


def _copies(subject: Subject, part: Part, wrapped: dict[str, TensorEntry], both: Sequence[str]) -> Finding:
    unlike = [name for name in both if wrapped[name].shape != part.tensors[name].shape]
    differ = f"{plural(len(unlike), 'pair')} of them differ in shape ({named(unlike)}). " if unlike else ""
    what = (
        f"{part.where}{plural(len(both), 'name')} stand here twice, with and without 'module.': {named(both)}. "
        f"{differ}If the prefix were taken away, one would overwrite the other, so nothing is repaired by itself. "
        f"Say which is meant: {subject.command('convert', 'SOURCE', 'weights.safetensors', '--drop', 'module.*')} "
        "keeps those without it"
    )
    entries = [entry for name in both for entry in (part.tensors[name], wrapped[name])]
    return Finding("duplicate-copies", "error" if unlike else "warning", what, subject.keys(entries))


def _flat(subject: Subject, part: Part) -> Iterator[Origin]:
    """Parameters of whole units in one row (torch ``distributed/fsdp/_flat_param.py``)."""
    found = [
        (name, entry)
        for name, entry in part.tensors.items()
        if len(entry.shape) == 1 and re.search(r"(^|\.)(_flat_param|flat_param_\d+)$", name)
    ]
    if found:
        what = (
            f"{part.where}{plural(len(found), 'tensor')} ({named([name for name, _ in found])}) hold all parameters "
            "of a unit of FSDP in one row. Names and shapes aren't in the file, so it can't be taken apart here. "
            "Load it with the program that saved it, on as many processes, and save it there with "
            "StateDictType.FULL_STATE_DICT"
        )
        keys = subject.keys([entry for _, entry in found])
        yield Origin("FSDP, flat parameters", Finding("flat-parameters", "error", what, keys))


# -------------------------------------------------------------------- averages among the weights


def _averages(subject: Subject, part: Part) -> Iterator[Origin]:
    inner = inner_averages(part.tensors)
    if inner is not None:
        names = [name for name in part.tensors if name.startswith(inner.prefix)]
        bare = all("." not in name[len(inner.prefix) :] for name in names)
        how = ", with their dots taken out (LitEma's way)" if bare else ""
        repair = subject.command("convert", "SOURCE", "ema.safetensors", "--ema")
        what = (
            f"{part.where}the names that begin with '{one_line(inner.prefix)}' are averages of the others{how}: "
            f"{len(inner.averages):,} of {len(inner.weights):,} weights have one. {repair} takes them in the places "
            "of the weights, --weights-only leaves them out"
        )
        yield Origin(
            "averages beside the weights", Finding("inner-averages", "info", what, _keys(subject, part, names))
        )
        return
    prefixed = [name for name in part.tensors if re.match(r"(model_)?ema[._]", name)]
    others = [name for name in part.tensors if not re.match(r"(model_)?ema[._]", name)]
    if prefixed and others:
        yield from _mangled(subject, part, prefixed, others)


def _mangled(subject: Subject, part: Part, prefixed: Sequence[str], others: Sequence[str]) -> Iterator[Origin]:
    """Averages whose names lost their dots, to nothing or to underscores, compared with the others without either."""
    forms: dict[str, list[str]] = {}
    for name in others:
        forms.setdefault(re.sub(r"[._]", "", name), []).append(name)
    found = {name: forms.get(re.sub(r"[._]", "", re.sub(r"^(model_)?ema[._]", "", name)), []) for name in prefixed}
    alike = [name for name, meant in found.items() if len(meant) > 1]
    known = [name for name, meant in found.items() if meant]
    if 2 * len(known) < len(prefixed):
        return
    if alike:
        twin = found[alike[0]]
        how = f"{plural(len(alike), 'name')} could mean several tensors ('{one_line(alike[0])}': {named(twin)}), so none is matched"
    else:
        how = f"without dots and underscores {len(known):,} of them are the names of others"
    what = (
        f"{part.where}{plural(len(prefixed), 'name')} such as '{one_line(prefixed[0])}' are those of averages whose "
        f"dots are gone: {how}. "
        f"{subject.command('convert', 'SOURCE', 'weights.safetensors', '--drop', _glob(prefixed))} leaves them out"
    )
    level = "warning" if alike else "info"
    yield Origin(
        "averages beside the weights", Finding("mangled-averages", level, what, _keys(subject, part, prefixed))
    )


def _glob(names: Sequence[str]) -> str:
    found = re.match(r"(model_)?ema[._]", names[0])
    return f"{found[0] if found else ''}*"


def _keys(subject: Subject, part: Part, names: Iterable[str]) -> tuple[str, ...]:
    return subject.keys([part.tensors[name] for name in names])


# -------------------------------------------------------------------- programs


def _programs(subject: Subject) -> Iterator[Origin]:
    manifest = subject.checkpoint.manifest
    tops = {str(path[0]) for path in (*manifest.tensors, *manifest.objects) if path}
    version = manifest.objects.get(("pytorch-lightning_version",))
    if version is not None:
        yield _lightning(subject, one_line(version.value))
    for name, words in _PROGRAMS:
        if tops & words:
            yield Origin(name)
    if any(note.code == "whole-module" for note in manifest.notes):
        yield Origin("a whole model")


def _lightning(subject: Subject, version: str) -> Origin:
    """A checkpoint of Lightning's: the attribute that holds the model, and what stands beside it (a loss, metrics)."""
    part = next((part for part in subject.parts if part.path == ("state_dict",)), None)
    names = list(part.tensors) if part is not None else []
    shares = {each: sum([name.startswith(each) for name in names]) for each in _ATTRIBUTES}
    prefix = next((each for each, count in shares.items() if 2 * count > len(names)), "")
    if part is None or not prefix:
        return Origin(f"Lightning {version}")
    beside = [name for name in names if not name.startswith(prefix)]
    what = (
        f"a checkpoint of Lightning's: {len(names) - len(beside):,} of {plural(len(names), 'name')} under "
        f"'{dotted(part.path)}' begin with '{prefix}', the attribute of the LightningModule that holds the model. A "
        "plain model has names without it"
    )
    rest = f". Beside it: {named(beside)}, of the training (a loss, metrics), to be left out" if beside else ""
    keep = ("--keep", f"{prefix}*") if beside else ()
    words = ("convert", "SOURCE", "weights.safetensors", "--at", dotted(part.path), *keep, "--strip-prefix", prefix)
    finding = Finding("lightning", "info", f"{what}{rest}. {subject.command(*words)}", _keys(subject, part, beside))
    return Origin(f"Lightning {version}", finding)

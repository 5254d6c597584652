"""Whether several checkpoints have one structure: the same keys, shapes and dtypes. Everything that differs is said at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os.path import basename

from statedict.checkpoint import Checkpoint
from statedict.errors import KeyMismatch, SpecMismatch, one_line
from statedict.keys import folded
from statedict.manifest import TensorEntry
from statedict.ops.mismatches import listed

__all__ = ["entries_of", "refuse_disagreement"]

# Differences of one kind that a message lists.
_LISTED = 8


def entries_of(checkpoint: Checkpoint) -> dict[str, TensorEntry]:
    """The tensors by the key that they are shown as: a flat file and a nested one that read alike have the same."""
    return {key: checkpoint[key].entry for key in checkpoint}


def refuse_disagreement(checkpoints: Sequence[Checkpoint], *, dtypes: bool) -> None:
    """Raise ``KeyMismatch`` or ``SpecMismatch`` unless all have the structure of the last; nothing is read.

    ``dtypes`` says whether floats of another dtype are a difference. Of the error, ``missing`` and ``unexpected`` are the keys that
    some checkpoint lacks, or has and the last hasn't.
    """
    last = checkpoints[-1]
    wanted = entries_of(last)
    missing: dict[str, None] = {}
    unexpected: dict[str, None] = {}
    parts, first = [], ""
    for checkpoint in checkpoints[:-1]:
        found = entries_of(checkpoint)
        lacks = [key for key in wanted if key not in found]
        has = [key for key in found if key not in wanted]
        specs = _specs(found, wanted, dtypes=dtypes)
        missing.update(dict.fromkeys(lacks))
        unexpected.update(dict.fromkeys(has))
        first = first or next(iter(specs), "")
        said = [f"{len(lacks)} missing ({listed(lacks)})"] if lacks else []
        said += [f"{len(has)} unexpected ({listed(has)})"] if has else []
        said += [_sentence(specs)] if specs else []
        if said:
            parts.append(f"'{one_line(basename(checkpoint.source))}' has {'; '.join(said)}")
    if not parts:
        return
    what = f"the checkpoints aren't of one structure. Compared with this one, {' · '.join(parts)}"
    hint = "Rename, cast or drop what differs first, with statedict convert"
    if missing or unexpected:
        raise KeyMismatch(what, missing=missing, unexpected=unexpected, path=last.source, hint=hint)
    raise SpecMismatch(what, path=last.source, key=first, hint=hint)


def _specs(found: Mapping[str, TensorEntry], wanted: Mapping[str, TensorEntry], *, dtypes: bool) -> dict[str, str]:
    """What tensors of one key are, by key, where it isn't the same thing."""
    made = {}
    for key, entry in wanted.items():
        other = found.get(key)
        if other is None:
            continue
        both_float = entry.dtype.kind == other.dtype.kind == "float"
        same_dtype = entry.dtype is other.dtype or (both_float and not dtypes)
        if other.shape != entry.shape or other.layout != entry.layout or not same_dtype:
            made[key] = f"{_spec(other)} instead of {_spec(entry)}"
    return made


def _spec(entry: TensorEntry) -> str:
    layout = "" if entry.layout == "strided" else f"{entry.layout} "
    return f"{layout}{entry.dtype} {list(entry.shape)}"


def _sentence(specs: Mapping[str, str]) -> str:
    """The differences, those of numbered siblings that differ in the same way folded."""
    groups: dict[str, list[str]] = {}
    for key, text in specs.items():
        groups.setdefault(text, []).append(key)
    shown = [f"'{one_line(key)}' as {text}" for text, keys in groups.items() for key in folded(keys)]
    rest = f" and {len(shown) - _LISTED} more" if len(shown) > _LISTED else ""
    return "; ".join(shown[:_LISTED]) + rest

"""What isn't in a checkpoint though it should be: blocks, experts, halves of pairs, the elements of weights, other files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from statedict.errors import one_line
from statedict.keys import template
from statedict.manifest import Finding, TensorEntry
from statedict.ops.diagnosing.subject import MOST_LEVELS, Part, Subject
from statedict.ops.findings import named
from statedict.report.units import plural
from statedict.tree import ranges

__all__ = ["gaps_of"]

# Numbers that a list must have before a hole in it is one, and how small a share of it the holes may be: in a Sequential, modules
# without tensors stand between others as a rule, not as an exception.
_FEWEST = 4
_MOST_HOLES = 6
# A list of blocks that begins here or later has lost its beginning; one or two modules without tensors may stand before it.
_LATE = 3
_EXPERT = re.compile(r"expert", re.IGNORECASE)
# Layers that turn tokens into vectors, and vectors into tokens, as language models name them.
_EMBEDDINGS = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|token_embedding|shared)\.weight$"
)
_HEADS = re.compile(r"(^|\.)(lm_head|embed_out|output_projection)\.weight$")
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.[A-Za-z]+$")
_RANK = re.compile(r"^(consolidated\.)(\d\d)(\.pth)$")

Signature = frozenset[tuple[str, tuple[int, ...]]]


class _List(NamedTuple):
    """Modules that are numbered: what stands before the numbers, and of each number the names and shapes below it."""

    prefix: str
    members: Mapping[int, Signature]

    @property
    def holes(self) -> list[int]:
        """Numbers between the first and the last that have no tensors; none where they are more than those that have."""
        low, high = min(self.members), max(self.members)
        if high - low >= 2 * len(self.members):
            return []
        return [number for number in range(low, high) if number not in self.members]


def gaps_of(subject: Subject) -> Iterator[Finding]:
    """Everything that is missing, by names and shapes alone."""
    yield from _one_of_several(subject)
    for part in subject.parts:
        yield from _empty(subject, part)
        lists = _lists(part)
        yield from _holes(subject, part, lists)
        yield from _half_tied(subject, part)


def _one_of_several(subject: Subject) -> Iterator[Finding]:
    """A file that by its name is one shard of a checkpoint."""
    files = subject.checkpoint.manifest.files
    if len(files) != 1:
        return
    folder, name = os.path.split(files[0].path)
    shard, rank = _SHARD.search(name), _RANK.match(name)
    if shard is not None and int(shard[2]) > 1:
        message = (
            f"by its name this is part {int(shard[1]):,} of {int(shard[2]):,} of a checkpoint, with the tensors of "
            "this part alone. Open the folder, or the .index.json in it: all parts are then one checkpoint"
        )
        yield Finding("one-shard", "warning", message)
    elif rank is not None:
        others = [f"{rank[1]}{number:02d}{rank[3]}" for number in range(64) if number != int(rank[2])]
        beside = [other for other in others if os.path.exists(os.path.join(folder, other))]
        if beside:
            message = (
                f"by its name and {plural(len(beside), 'file')} beside it ('{one_line(beside[0])}'), this is one of "
                f"{len(beside) + 1:,} slices of a model that was parallel in its tensors: most matrices are cut "
                "along one dimension, so their shapes here are a part of the true ones"
            )
            yield Finding("one-slice", "warning", message)


def _empty(subject: Subject, part: Part) -> Iterator[Finding]:
    """Weights without elements, as ZeRO-3 leaves them in a model's state dict (deepspeed ``runtime/zero/partition_parameters.py``)."""
    floats = {name: entry for name, entry in part.tensors.items() if entry.dtype.kind == "float"}
    empty = [
        name for name, entry in floats.items() if entry.shape == (0,) and re.search(r"(^|[._])(weight|bias)$", name)
    ]
    # A layer without outputs has an empty bias as well, but its weight has two dimensions.
    if any(name.endswith("weight") for name in empty):
        message = (
            f"{part.where}{len(empty):,} of {plural(len(floats), 'weight')} have no elements (shape [0]): "
            f"{named(empty)}. DeepSpeed ZeRO-3 leaves such a shell where parameters weren't gathered before saving: "
            "the values are in the zero_pp_rank_… files of the same checkpoint. Make one file of those with its "
            "zero_to_fp32.py"
        )
        yield Finding("empty-weights", "error", message, subject.keys([part.tensors[name] for name in empty]))


# -------------------------------------------------------------------- numbered modules


def _lists(part: Part) -> list[_List]:
    found: dict[str, dict[int, set[tuple[str, tuple[int, ...]]]]] = {}
    for name, entry in part.tensors.items():
        pieces = name.split(".", MOST_LEVELS)
        for at, piece in enumerate(pieces[:-1]):
            if piece.isdecimal() and piece.isascii() and len(piece) < 7:
                rest = ".".join(pieces[at + 1 :]), entry.shape
                found.setdefault(".".join(pieces[:at]), {}).setdefault(int(piece), set()).add(rest)
    return [
        _List(prefix, {number: frozenset(rests) for number, rests in members.items()})
        for prefix, members in found.items()
    ]


def _holes(subject: Subject, part: Part, lists: Sequence[_List]) -> Iterator[Finding]:
    alike: dict[str, set[int]] = {}
    for each in lists:
        alike.setdefault(template(each.prefix)[0], set()).update(each.members)
    for each in lists:
        numbers = sorted(each.members)
        if _EXPERT.search(each.prefix):
            elsewhere = alike[template(each.prefix)[0]]
            few = len(numbers) > 1 and len(elsewhere) <= 2 * len(numbers)
            missing = sorted(elsewhere.union(each.holes).difference(numbers)) if few else []
            code, what = "missing-experts", "experts"
        else:
            missing, code, what = _missing_blocks(each), "missing-blocks", "blocks"
        if missing:
            others = [other for other in missing if other in alike[template(each.prefix)[0]]]
            message = _hole(part, each, missing, what, bool(others))
            yield Finding(code, "error" if others else "warning", message, _below(subject, part, each.prefix))
        else:
            yield from _incomplete(subject, part, each)
            yield from _late(subject, part, each)


def _is_block(signature: Signature) -> bool:
    """Whether there are several modules in it: blocks stand in lists without holes, single layers needn't."""
    return len({rest.rpartition(".")[0] for rest, _ in signature}) > 1


def _missing_blocks(each: _List) -> list[int]:
    """The holes in a list of blocks that are equal on both sides of each."""
    numbers = sorted(each.members)
    holes = each.holes
    if len(numbers) < _FEWEST or not holes or _MOST_HOLES * len(holes) > numbers[-1] - numbers[0] + 1:
        return []
    for hole in holes:
        below = max(number for number in numbers if number < hole)
        above = min(number for number in numbers if number > hole)
        if each.members[below] != each.members[above] or not _is_block(each.members[below]):
            return []
    return holes


def _hole(part: Part, each: _List, missing: Sequence[int], what: str, is_sure: bool) -> str:
    """What to say of numbers that are missing in a list; ``what`` is the plural of what it lists."""
    numbers = sorted(each.members)
    which = f"{what[:-1]} {missing[0]}" if len(missing) == 1 else f"{what} {ranges(missing)}"
    if is_sure:
        reason = "Other layers have them: the file lost them, or was put together from parts"
    else:
        reason = "The file lost it, or was put together from parts; less likely, a module without tensors stands there"
    return (
        f"{part.where}under '{one_line(each.prefix)}' there are {what} {ranges(numbers)}, but not {which}. A model with all "
        f"of them would keep random values there. {reason}"
    )


def _below(subject: Subject, part: Part, prefix: str) -> tuple[str, ...]:
    start = f"{prefix}." if prefix else ""
    return subject.keys([entry for name, entry in part.tensors.items() if name.startswith(start)])


def _incomplete(subject: Subject, part: Part, each: _List) -> Iterator[Finding]:
    """Blocks inside a list that lack tensors which those on both sides have."""
    numbers = sorted(each.members)
    if len(numbers) < _MOST_HOLES:
        return
    names = {number: frozenset(rest for rest, _ in members) for number, members in each.members.items()}
    found = [
        (here, sorted(names[below] - names[here]))
        for below, here, above in zip(numbers, numbers[1:], numbers[2:])
        if names[below] == names[above] and names[here] < names[below]
    ]
    if found and 10 * len(found) <= max(10, len(numbers)):
        here, lacking = found[0]
        message = (
            f"{part.where}block {here} under '{one_line(each.prefix)}' lacks {plural(len(lacking), 'tensor')} that "
            f"those before and after it have: {named(lacking)}. A model would keep random values there"
        )
        yield Finding(
            "incomplete-block", "warning", message, _below(subject, part, f"{each.prefix}.{here}".lstrip("."))
        )


def _late(subject: Subject, part: Part, each: _List) -> Iterator[Finding]:
    numbers = sorted(each.members)
    if (
        numbers[0] >= _LATE
        and len(numbers) > 1
        and len(set(each.members.values())) == 1
        and _is_block(each.members[numbers[0]])
    ):
        message = (
            f"{part.where}the blocks under '{one_line(each.prefix)}' begin with {numbers[0]}: {ranges(numbers)}. "
            "This is a part of a network, as one stage of a pipeline or one shard of several saves it"
        )
        yield Finding("late-blocks", "warning", message, _below(subject, part, each.prefix))


# -------------------------------------------------------------------- tied pairs


def _half_tied(subject: Subject, part: Part) -> Iterator[Finding]:
    """An embedding whose output layer isn't there, or the other way round."""
    matrices = {name: entry for name, entry in part.tensors.items() if len(entry.shape) == 2}
    embeddings = [name for name in matrices if _EMBEDDINGS.search(name)]
    heads = [name for name in matrices if _HEADS.search(name)]
    if len(embeddings) == 1 and not heads:
        yield from _without_head(subject, part, embeddings[0], matrices)
    elif len(heads) == 1 and not embeddings:
        rows = matrices[heads[0]].shape[0]
        if not any(rows in entry.shape for name, entry in matrices.items() if name != heads[0]):
            message = (
                f"{part.where}'{one_line(heads[0])}' {list(matrices[heads[0]].shape)} is here, but no embedding of "
                f"{rows:,} tokens: half of a tied "
                f'pair. The rule tie makes the other half from it: rules.tie(NAME, "{one_line(heads[0])}")'
            )
            yield Finding("half-tied", "warning", message, subject.keys([matrices[heads[0]]]))


def _without_head(subject: Subject, part: Part, name: str, matrices: Mapping[str, TensorEntry]) -> Iterator[Finding]:
    shape = matrices[name].shape
    if any(entry.shape in (shape, shape[::-1]) for other, entry in matrices.items() if other != name):
        return
    biases = [other for other, entry in part.tensors.items() if entry.shape == shape[:1] and other.endswith("bias")]
    tops = {other.partition(".")[0] for other in part.tensors}
    if biases or (len(tops) == 1 and "." in name.removesuffix(".weight")):
        why = f"'{one_line(biases[0])}' is the bias of one" if biases else "all names are those of the body of a model"
        message = (
            f"{part.where}no output layer of {shape[0]:,} tokens is here ({why}): it is tied to '{one_line(name)}' "
            "as a rule, so a model that ties them needs nothing more. In one that doesn't, the output layer would "
            "stay random"
        )
        yield Finding("half-tied", "info", message, subject.keys([matrices[name]]))

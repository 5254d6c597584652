"""What was done to the weights, read from where and how they changed: what a fine-tune leaves behind.

Each finding is a fact about the differences: which parts are untouched, of which kind all changed tensors are, that a matrix changed
in a few directions only, that rows were added. None says more than that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from statedict.lazy_tensor import LazyTensor
from statedict.manifest import Finding, TensorEntry
from statedict.ops.comparing.changes import Change
from statedict.ops.comparing.evidence import Evidence
from statedict.ops.comparing.parts import tops
from statedict.ops.findings import named
from statedict.report.units import plural

__all__ = ["fingerprints"]

# What people call the modules that normalise, and the tensors of them that no other module has.
_NORM = re.compile(
    r"(?:^|[._\d])(?:\w*norm\w*|ln|bn|gn|ln_\w+|bn\d*|ln\d*|layernorm\w*|rms\w*)(?:[._\d]|$)", re.IGNORECASE
)
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_BIAS = re.compile(r"(?:^|[._])bias$|_bias$|\.bias_\w+$")
_HEAD = re.compile(
    r"(?:^|\.)(?:head|heads|fc|classifier|lm_head|score|output|out_proj|last_linear|cls_head|\w*_head)\.", re.IGNORECASE
)
# Matrices whose difference is looked at for its rank, and elements of one that are: its first rows, in which a low rank is as low.
_MATRICES = 3
_MATRIX_NUMEL = 2 * 1024 * 1024
# Rows and columns that a matrix has at least, for a rank of it to be low.
_MATRIX_SIDE = 16


def fingerprints(evidence: Evidence) -> list[Finding]:
    """The findings about weights; none where nothing changed. Reads at most three small matrices again."""
    found = list(_prefix(evidence))
    found += _added_rows(evidence.changed)
    changed = [each for each in evidence.changed if each.kind in ("value", "shape", "dtype") and not each.is_equal]
    weights = [each for each in changed if not _is_state(each.key)]
    if weights:
        found += _kinds([each.key for each in weights], evidence)
        found += _untouched(evidence, [each.key for each in changed])
        found += _low_ranks(evidence, weights)
    return found


def _is_state(key: str) -> bool:
    """Whether it is a tensor of an optimizer."""
    return ".state." in f".{key}" and "optim" in key


def _kinds(keys: Sequence[str], evidence: Evidence) -> Iterator[Finding]:
    """That all changed tensors are of one kind, where others of the network are not."""
    taken = set(keys)
    others = [key for key in evidence.a.tensors if key not in taken and not _is_state(key)]
    kinds: tuple[tuple[str, str, Callable[[str], bool]], ...] = (
        ("only-biases", "biases", lambda key: _BIAS.search(key) is not None),
        ("only-statistics", "running statistics of norms", lambda key: key.endswith(_STATISTICS)),
        ("only-norms", "tensors of normalising layers", lambda key: _is_norm(key)),
        ("only-head", "tensors of the head", lambda key: _HEAD.search(f".{key}") is not None),
    )
    for code, words, fits in kinds:
        if all(fits(key) for key in keys) and not all(fits(key) for key in others):
            yield Finding(code, "info", f"only {words} changed: {named(tuple(keys))}", tuple(keys))
            return


def _is_norm(key: str) -> bool:
    module = key.rpartition(".")[0]
    return key.endswith(_STATISTICS) or _NORM.search(module) is not None


def _untouched(evidence: Evidence, changed: Sequence[str]) -> Iterator[Finding]:
    """The parts of the network in which nothing changed, where it did in others."""
    gone = {*changed, *evidence.only[0], *(key for rename in evidence.renamed for key in rename.a)}
    keys = [key for key in evidence.a.tensors if not _is_state(key)]
    parts = tops(keys)
    same = [name for name, inside in parts.items() if gone.isdisjoint(inside)]
    if not same or len(parts) < 2:
        return
    count = sum([len(parts[name]) for name in same])
    text = f"frozen: nothing changed in {named(tuple(same))} ({plural(count, 'tensor')})"
    yield Finding("frozen", "info", text, tuple(same))


def _added_rows(changed: Sequence[Change]) -> Iterator[Finding]:
    for change in changed:
        if change.kind == "shape" and "rows are equal" in change.verdict:
            here, there = change.a, change.b
            if isinstance(here, list) and isinstance(there, list):
                more = there[0] - here[0]
                what = f"{plural(abs(more), 'row')} {'added to' if more > 0 else 'removed from'} '{change.key}'"
                text = f"{what}: {change.verdict} ({here[0]:,} → {there[0]:,})"
                yield Finding("rows-added" if more > 0 else "rows-removed", "info", text, (change.key,))


def _low_ranks(evidence: Evidence, changed: Sequence[Change]) -> Iterator[Finding]:
    """The changed matrices of which the difference has few directions, as that of a merged adapter has."""
    matrices = [each.key for each in changed if each.kind == "value" and _has_rank(evidence, each)][:_MATRICES]
    ranks = {key: rank for key in matrices if (rank := _rank(evidence, key)) is not None}
    if ranks:
        most = max(ranks.values())
        what = plural(most, "direction")
        seen = f"{len(ranks)} of {len(matrices)} changed matrices that were looked at"
        text = f"the change is of low rank: at most {what} make 99% of it, in {seen}: {named(tuple(ranks))}"
        yield Finding("low-rank", "info", text, tuple(ranks))


def _has_rank(evidence: Evidence, change: Change) -> bool:
    entry = evidence.a.leaves.get(change.key)
    if not isinstance(entry, TensorEntry) or entry.dtype.code not in ("F64", "F32", "F16", "BF16"):
        return False
    is_matrix = len(entry.shape) == 2 and _MATRIX_SIDE <= entry.shape[1] <= _MATRIX_NUMEL // _MATRIX_SIDE
    # A few changed elements have few directions without any adapter.
    return is_matrix and entry.shape[0] >= _MATRIX_SIDE and 2 * (change.mismatched or 0) > entry.numel


def _rank(evidence: Evidence, key: str) -> int | None:
    from statedict.numerics.ranks import low_rank

    one, two = evidence.a.side(key), evidence.b.side(key)
    rows, columns = one.entry.shape
    rows = min(rows, _MATRIX_NUMEL // columns)
    a, b = (LazyTensor(side.entry, side.checkpoint)[:rows].read() for side in (one, two))
    return low_rank(a, b, one.entry.dtype, rows)


def _prefix(evidence: Evidence) -> Iterator[Finding]:
    """That a prefix keeps apart what belongs together: the rules to type."""
    if not ((evidence.only[0] and evidence.only[1]) or evidence.renamed):
        return
    from statedict.prefixes import containers_of, find_repair

    shapes = [{key: entry.shape for key, entry in side.tensors.items()} for side in (evidence.a, evidence.b)]
    repair = find_repair(shapes[0], shapes[1], containers=containers_of(evidence.a.checkpoint.manifest.structure))
    if repair is None:
        return
    if repair.is_ambiguous:
        yield Finding("prefix", "info", repair.advice)
        return
    typed = ", ".join([str(rule) for rule in repair.rules])
    text = (
        f"{repair.matches} of {plural(repair.wanted, 'tensor')} of B have a name and shape of A's with rules=[{typed}]"
    )
    yield Finding("prefix", "info", text)

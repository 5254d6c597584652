"""What a diagnosis of two checkpoints says, in a person's words: one sentence first, then at most four lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from statedict.aligning.alignment import Left, Mapped
from statedict.errors import one_line
from statedict.keys import template
from statedict.manifest import Finding
from statedict.ops.diagnosing.outline import Outline
from statedict.ops.findings import named
from statedict.report.units import plural

__all__ = ["findings_of", "op_in_words", "question_of", "sentence_of"]

# What puts a component into all keys.
_WRAPPED = {
    "module": "a model in DataParallel or DistributedDataParallel",
    "_orig_mod": "a model that torch.compile had wrapped",
    "_fsdp_wrapped_module": "a model in FullyShardedDataParallel",
    "_checkpoint_wrapped_module": "a model with activation checkpoints",
    "_forward_module": "a model that Lightning had wrapped",
}
_NAMING = frozenset({"select", "strip_prefix", "add_prefix", "strip_wrapper"})
# What each op has done to the tensors of the target.
_DONE = {
    "split": "cut out of fused ones",
    "slice": "cut out of larger ones",
    "unstack": "taken out of stacked ones",
    "concat": "put together of several",
    "stack": "stacked",
    "transpose": "transposed",
    "squeeze": "in another shape",
    "permute": "with their rows in another order",
    "tie": "another name of one",
    "fold": "computed",
}


def sentence_of(outline: Outline) -> str:
    """The first thing to say."""
    if outline.refusal:
        return _closed(outline.refusal)
    total, filled = len(outline.target.tensors), len(outline.claims)
    if not filled:
        return "Nothing in the source is surely a tensor of the target: nothing is mapped."
    if outline.fits:
        more = f" ({plural(len(outline.dropped), 'tensor')} more in the source)" if outline.dropped else ""
        return f"All {plural(total, 'name')} and shapes of the target are in the source as they are{more}: nothing has to change."
    wrapped = _wrapped(outline)
    if wrapped:
        return wrapped
    made = [f"{count:,} {what}" for what, count in _kinds(outline.claims)]
    how = f": {', '.join(made)}" if made else ""
    some = f"All {total:,}" if filled == total else f"{filled:,} of {total:,}"
    return f"{some} tensors of the target can be made of the source{how}{_sized(outline)}."


def _closed(text: str) -> str:
    return text if text.endswith(".") else f"{text}."


def _kinds(claims: Sequence[Mapped]) -> Iterator[tuple[str, int]]:
    """What happens to the tensors, and to how many of them."""
    same = sum([mapped.op == "copy" and mapped.sources == (mapped.target,) for mapped in claims])
    renamed = sum([mapped.op == "copy" for mapped in claims]) - same
    if same:
        yield "as they are", same
    if renamed:
        yield "renamed", renamed
    for op, words in _DONE.items():
        count = sum([mapped.op == op for mapped in claims])
        if count:
            yield words, count


def _sized(outline: Outline) -> str:
    """How many tensors have another size on both sides, and the first of them, behind the rest of a sentence."""
    pairs = outline.resized
    if not pairs:
        return ""
    key, (one, two) = next(iter(pairs.items()))
    number = "one has" if len(pairs) == 1 else f"{len(pairs):,} have"
    return f"; {number} another size ('{one_line(key)}': {list(one)} in the source, {list(two)} in the target)"


def _wrapped(outline: Outline) -> str:
    """That a prefix, a wrapper or the part to take is all that is different; empty where it isn't."""
    rules = {rule.name: one_line(str(rule.arguments[0])) for rule in outline.rules if rule.name != "drop"}
    if not rules or not _NAMING.issuperset(rules):
        return ""
    words: list[str] = []
    if "select" in rules:
        words.append(f"the weights stand under '{rules['select']}'")
    if "strip_prefix" in rules and "add_prefix" in rules:
        words.append(
            f"names begin with '{rules['strip_prefix']}' in the source and with '{rules['add_prefix']}' in the target"
        )
    elif "strip_prefix" in rules:
        count = sum([f".{rules['strip_prefix']}" in f".{key}" for key in outline.source.tensors])
        every = (
            f"all {count:,}"
            if count == len(outline.source.tensors)
            else f"{count:,} of the {len(outline.source.tensors):,}"
        )
        words.append(f"{every} names in the source begin with '{rules['strip_prefix']}'")
    elif "add_prefix" in rules:
        words.append(f"all names of the target begin with '{rules['add_prefix']}', and those of the source don't")
    inside = [one_line(str(rule.arguments[0])) for rule in outline.rules if rule.name == "strip_wrapper"]
    words += [f"names in the source have '{word}' inside" for word in inside]
    parts = [part for text in (rules.get("strip_prefix", ""), *inside) for part in text.split(".")]
    reasons = list(dict.fromkeys([_WRAPPED[part] for part in parts if part in _WRAPPED]))
    because = f": it was saved from {', '.join(reasons)}" if reasons else ""
    said = ", ".join(words)
    match = f"{len(outline.claims):,} of {len(outline.target.tensors):,} names and shapes match"
    return f"{said[:1].upper()}{said[1:]}{because}. Without that difference {match}; nothing else changes."


def question_of(mapped: Sequence[Mapped]) -> str:
    """The question that would decide most of what is open; empty where nothing is."""
    counts: dict[str, int] = {}
    for each in mapped:
        if each.question and not each.is_claim:
            form = template(each.question)[0]
            counts[form] = counts.get(form, 0) + 1
    if not counts:
        return ""
    most = max(counts, key=lambda form: counts[form])
    return next(
        each.question for each in mapped if each.question and not each.is_claim and template(each.question)[0] == most
    )


def findings_of(outline: Outline) -> Iterator[Finding]:
    """What a person should know besides the plan."""
    if outline.refusal:
        yield Finding("different-networks", "error", outline.refusal)
        return
    yield from _values(outline)
    yield from _open(outline)
    resized = tuple(outline.resized)
    if resized:
        text = (
            f"{_are(resized)} of another size in the source, and would keep the target's own values: {named(resized)}"
        )
        yield Finding("another-size", "warning", text, resized)
    yield from _lost(outline)
    if outline.casts:
        keys = tuple(outline.casts)
        pairs = sorted(set(outline.casts.values()))
        kinds = ", ".join([f"{one} → {two}" for one, two in pairs[:3]])
        text = f"{_have(keys)} another dtype in the source ({kinds}): they are cast when they are loaded, and not by these rules"
        yield Finding("another-dtype", "info", text, keys)
    for each in outline.broken:
        yield Finding(
            f"not-{each.obligation}", "warning", f"not carried out, {each.message}: {named(each.keys)}", each.keys
        )
    if outline.only_once:
        yield Finding(
            "only-once",
            "info",
            "apply these rules once: names and shapes don't show that it was done, and a second time changes it back",
        )
    if outline.problem and outline.claims:
        yield Finding("no-rules", "warning", f"no rules make this plan: {outline.problem}")


def _values(outline: Outline) -> Iterator[Finding]:
    evidence = outline.evidence
    proven = tuple([mapped.target for mapped in evidence.known])
    if proven:
        text = f"the values prove {len(proven):,} of {plural(len(outline.target.tensors), 'tensor')}: they are the same on both sides"
        yield Finding("same-values", "info", text, proven)
    elif not outline.fits:
        text = (
            "no values are the same on both sides (another training, or another precision), so names and shapes decide"
        )
        yield Finding("other-values", "info", text)
    if evidence.unread and proven:
        keys = evidence.unread
        text = f"{plural(len(keys), 'tensor')} begin with values that the source hasn't, and weren't read whole: {named(keys)}"
        yield Finding("not-searched", "info", text, keys)


def _open(outline: Outline) -> Iterator[Finding]:
    """What isn't decided, by question."""
    groups: dict[str, list[Mapped]] = {}
    for mapped in outline.mapped:
        if not mapped.is_claim and mapped.op != "resize" and (mapped.sources or mapped.alternatives or mapped.question):
            groups.setdefault(template(mapped.question)[0] if mapped.question else "", []).append(mapped)
    for members in groups.values():
        keys = tuple([mapped.target for mapped in members])
        question = members[0].question or "one signal only speaks for each"
        yield Finding("open", "warning", f"{_are(keys)} not decided, {named(keys)}: {question}", keys)


def _lost(outline: Outline) -> Iterator[Finding]:
    """What stays unfilled, and what isn't used, by reason."""
    told = {mapped.target for mapped in outline.mapped if not mapped.is_claim} | set(outline.resized)
    for reason, keys in _by_reason([left for left in outline.unfilled if left.key not in told]).items():
        level = "info" if set(keys) <= outline.remade else "warning"
        yield Finding("not-filled", level, f"{_are(keys)} not filled, {named(keys)}: {reason}", keys)
    for reason, keys in _by_reason(outline.dropped).items():
        what = f"{plural(len(keys), 'tensor')} of the source {'is' if len(keys) == 1 else 'are'} not used"
        yield Finding("not-used", "info", f"{what}, {named(keys)}: {reason}", keys)
    if outline.left_over:
        keys = tuple(outline.left_over)
        text = f"of {plural(len(keys), 'tensor')} of the source only a part is used: {named(keys)}"
        yield Finding("used-in-part", "info", text, keys)


def _by_reason(left: Sequence[Left]) -> dict[str, tuple[str, ...]]:
    groups: dict[str, tuple[str, ...]] = {}
    for each in left:
        reason = each.reason.partition(": ")[0]
        groups[reason] = (*groups.get(reason, ()), each.key)
    return groups


def _are(keys: Sequence[str]) -> str:
    return f"{plural(len(keys), 'tensor')} {'is' if len(keys) == 1 else 'are'}"


def _have(keys: Sequence[str]) -> str:
    return f"{plural(len(keys), 'tensor')} {'has' if len(keys) == 1 else 'have'}"


def op_in_words(op: str, args: Mapping[str, Any]) -> str:
    """An op with its arguments in a few words: ``split 0:64``, ``stack of 2 each``, ``transpose``."""
    if op in ("split", "slice"):
        words = f"{op} {args['start']}:{args['stop']}" + (f" of dim {args['dim']}" if args["dim"] else "")
    elif op in ("concat", "stack") and args.get("group", 1) > 1:
        words = f"{op} by {args['group']}"
    elif op in ("concat", "stack") and args.get("dim"):
        words = f"{op} along dim {args['dim']}"
    else:
        words = op
    further = [str(step["op"]) for step in (*args.get("each", ()), *args.get("then", ()))]
    return words if not further else f"{words}, {', '.join(further)}"

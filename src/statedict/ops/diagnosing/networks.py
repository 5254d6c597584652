"""What network a state dict is of, as far as it follows from names and shapes: its kind, depth, widths, heads, vocabulary, classes.

Each fact has one source, said here beside its function. What doesn't follow isn't said: the number of attention heads isn't in the
shape of a square projection.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from math import isqrt

from statedict.keys import template
from statedict.manifest import TensorEntry
from statedict.ops.diagnosing.subject import MOST_LEVELS, Part
from statedict.prefixes.wrappers import WRAPPERS, pattern

__all__ = ["network_of", "network_sentence"]

Tensors = Mapping[str, TensorEntry]

# Block counts of the four stages of ResNets, by how many convolutions a block has (torchvision ``models/resnet.py``).
_RESNETS: dict[tuple[int, tuple[int, ...]], str] = {
    (2, (2, 2, 2, 2)): "ResNet-18",
    (2, (3, 4, 6, 3)): "ResNet-34",
    (3, (3, 4, 6, 3)): "ResNet-50",
    (3, (3, 4, 23, 3)): "ResNet-101",
    (3, (3, 8, 36, 3)): "ResNet-152",
}
_QUERY = re.compile(r"(^|\.)(q_proj|wq|query|q_lin|to_q|linear_q|q)\.weight$")
_KEY = re.compile(r"(^|\.)(k_proj|wk|key|k_lin|to_k|linear_k|k)\.weight$")
_ATTENTION = re.compile(r"attn|attention|q_proj|qkv|query|wq\b", re.IGNORECASE)
_EMBEDDING = re.compile(r"embed|wte|emb\b|tok", re.IGNORECASE)
_POSITION = re.compile(r"pos|wpe", re.IGNORECASE)
_HEAD = re.compile(
    r"(^|\.)(fc|head|heads\.head|classifier|classifier\.\d+|score|cls|logits|linear|out|output)\.weight$"
)
# Lists of fewer modules aren't called blocks.
_FEWEST_BLOCKS = 2


def network_of(part: Part) -> dict[str, object]:
    """The facts, JSON-ready. Empty where the shapes say nothing."""
    tensors = _plain(part.tensors)
    facts: dict[str, object] = {}
    kind = _kind(tensors)
    if kind is None:
        return facts
    facts["kind"] = kind
    facts |= _stages(tensors) or _depth(tensors)
    facts |= _width(tensors, kind)
    facts |= _vocabulary(tensors)
    facts |= _heads(tensors)
    facts |= _input(tensors)
    facts |= _classes(tensors, facts)
    return facts


def network_sentence(facts: Mapping[str, object]) -> str:
    """The facts in one line; empty where there are none."""
    if not facts:
        return ""
    words = [str(facts.get("like", facts["kind"]))]
    if "stages" in facts:
        words.append(f"stages of {', '.join(map(str, _list(facts['stages'])))} blocks")
    for name, text in (
        ("blocks", "{} blocks"),
        ("experts", "{} experts a layer"),
        ("width", "width {}"),
        ("vocabulary", "{:,} tokens"),
        ("heads", "{} heads"),
        ("key_value_heads", "{} key/value heads"),
        ("queries_per_key", "{} query heads for each key head"),
        ("head_width", "{} values a head"),
        ("patch", "patches of {}"),
        ("image", "images of {}"),
        ("channels", "{} input channels"),
        ("classes", "{:,} outputs"),
    ):
        if name in facts:
            words.append(text.format(facts[name]) if facts[name] != 1 else text.format(1).removesuffix("s"))
    return ", ".join(words)


def _list(value: object) -> list[object]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _plain(tensors: Tensors) -> dict[str, TensorEntry]:
    """The tensors by their names without wrappers."""
    found = pattern(WRAPPERS)
    return {found.sub("", name) if found is not None else name: entry for name, entry in tensors.items()}


def _weights(tensors: Tensors, dimensions: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, entry in tensors.items():
        if len(entry.shape) == dimensions and 0 not in entry.shape:
            yield name, entry.shape


def _kind(tensors: Tensors) -> str | None:
    """From the ranks of the weights and the words of the names."""
    convolutions = [
        shape
        for rank in (3, 4, 5)
        for name, shape in _weights(tensors, rank)
        if max(shape[2:]) > 1 and ("conv" in name or rank > 3)
    ]
    matrices = list(_weights(tensors, 2))
    if any(re.search(r"(^|\.)weight_hh_l\d", name) for name in tensors):
        return "recurrent network"
    if any(name.endswith("A_log") for name in tensors):
        return "state space network"
    attention = sum(bool(_ATTENTION.search(name)) for name, _ in matrices)
    if attention > 2:
        return "transformer" if len(convolutions) < attention else "network of convolutions and attention"
    if convolutions:
        return "convolutional network"
    return "network of linear layers" if matrices else None


def _stages(tensors: Tensors) -> dict[str, object]:
    """Stages named layer1 … layer4 with numbered blocks, as ResNets have them; blocks of two or three convolutions."""
    blocks: dict[int, set[int]] = {}
    convolutions: Counter[str] = Counter()
    for name in tensors:
        match = re.search(r"(?:^|\.)(layer([1-4])\.(\d{1,3}))\.conv\d\.weight$", name)
        if match is not None:
            blocks.setdefault(int(match[2]), set()).add(int(match[3]))
            convolutions[match[1]] += 1
    if sorted(blocks) != [1, 2, 3, 4]:
        return {}
    counts = tuple([len(blocks[stage]) for stage in (1, 2, 3, 4)])
    facts: dict[str, object] = {"stages": list(counts)}
    like = _RESNETS.get((convolutions.most_common(1)[0][1], counts))
    return {"like": f"a convolutional network with the blocks of {like}", **facts} if like else facts


def _depth(tensors: Tensors) -> dict[str, object]:
    """The longest list of numbered modules with the same names inside, and the experts of one layer."""
    lists: dict[str, dict[int, set[str]]] = {}
    for name in tensors:
        pieces = name.split(".", MOST_LEVELS)
        for at, piece in enumerate(pieces[:-1]):
            if piece.isdecimal() and len(piece) < 5:
                lists.setdefault(".".join(pieces[:at]), {}).setdefault(int(piece), set()).add(
                    ".".join(pieces[at + 1 :])
                )
    facts: dict[str, object] = {}
    experts = {len(members) for prefix, members in lists.items() if prefix.rpartition(".")[2] == "experts"}
    longest = 0
    for prefix, members in lists.items():
        inside = {name.rpartition(".")[0] for name in set.intersection(*members.values())}
        if len(members) >= _FEWEST_BLOCKS and len(inside) > 1 and "expert" not in prefix and not template(prefix)[1]:
            longest = max(longest, len(members))
    if longest:
        facts["blocks"] = longest
    if len(experts) == 1:
        facts["experts"] = experts.pop()
    return facts


def _width(tensors: Tensors, kind: str) -> dict[str, object]:
    """The width of a transformer is that of most of its norms; of other networks the widths of their layers, if few."""
    vectors = Counter(shape[0] for name, shape in _weights(tensors, 1) if name.endswith("weight"))
    if "transformer" in kind and vectors:
        return {"width": vectors.most_common(1)[0][0]}
    outputs = [
        shape[0]
        for name, entry in tensors.items()
        for shape in [entry.shape]
        if len(shape) > 1 and name.endswith("weight")
    ]
    widths = sorted(set(outputs[:-1]))
    if "recurrent" in kind:
        hidden = {shape[1] for name, shape in _weights(tensors, 2) if "weight_hh_l" in name}
        return {"width": hidden.pop()} if len(hidden) == 1 else {}
    return {"width": f"{widths[0]} to {widths[-1]}" if len(widths) > 1 else widths[0]} if widths else {}


def _vocabulary(tensors: Tensors) -> dict[str, object]:
    """Rows of the tallest matrix that is named as an embedding, and not one of positions."""
    rows = [shape[0] for name, shape in _weights(tensors, 2) if _EMBEDDING.search(name) and not _POSITION.search(name)]
    tallest = max(rows, default=0)
    wide = {shape[1] for name, shape in _weights(tensors, 2) if shape[0] == tallest}
    return {"vocabulary": tallest} if rows and wide and tallest > max(wide) else {}


def _heads(tensors: Tensors) -> dict[str, object]:
    """Heads where a shape has their number, or their width: a table of relative positions, scales, slopes, norms of one head."""
    rows = {"q": set[int](), "k": set[int]()}
    for name, shape in _weights(tensors, 2):
        if _QUERY.search(name):
            rows["q"].add(shape[0])
        elif _KEY.search(name):
            rows["k"].add(shape[0])
    facts: dict[str, object] = {}
    query = rows["q"].pop() if len(rows["q"]) == 1 else 0
    key = rows["k"].pop() if len(rows["k"]) == 1 else 0
    width = _head_width(tensors)
    tables = {
        shape[1]
        for name, shape in _weights(tensors, 2)
        if re.search(r"relative_(position_bias_table|attention_bias\.weight)$", name)
    }
    if len(tables) == 1:
        facts["heads"] = tables.pop()
    elif width and query and query % width == 0:
        facts["heads"] = query // width
    if width and "heads" in facts:
        facts["head_width"] = width
    if query and key and key < query and query % key == 0:
        if width and key % width == 0:
            facts["key_value_heads"] = key // width
        else:
            facts["queries_per_key"] = query // key
    return facts


def _head_width(tensors: Tensors) -> int:
    """Values of one head: of a norm of queries or keys, or two for each frequency of rotary positions; 0 where none says it."""
    norms = {shape[0] for name, shape in _weights(tensors, 1) if re.search(r"(^|\.)[qk]_(layer)?norm\.weight$", name)}
    rotary = {2 * shape[0] for name, shape in _weights(tensors, 1) if re.search(r"(rotary|rope)\w*\.inv_freq$", name)}
    found = norms | rotary
    return found.pop() if len(found) == 1 else 0


def _input(tensors: Tensors) -> dict[str, object]:
    """The first convolution: its input channels and, where patches are cut, their size and that of the image."""
    patch = next(((name, shape) for name, shape in _weights(tensors, 4) if re.search(r"patch|conv_proj", name)), None)
    facts: dict[str, object] = {}
    if patch is not None and patch[1][2] == patch[1][3] > 1:
        size, channels = patch[1][2], patch[1][1]
        facts |= {"patch": f"{size}×{size}", "channels": channels}
        tokens = next(
            (e.shape[-2] for n, e in tensors.items() if re.search(r"pos(ition)?_?embed", n) and 2 <= len(e.shape) <= 3),
            0,
        )
        prefix = sum(1 for name in tensors if re.search(r"(^|[._])(cls|class|dist(illation)?)_token$", name))
        side = isqrt(max(0, tokens - prefix))
        if side > 1 and side * side == tokens - prefix:
            facts["image"] = f"{side * size}×{side * size}"
    else:
        first = next((shape for _, shape in _weights(tensors, 4)), None)
        if first is not None and first[1] <= 4 and first[2] > 1:
            facts["channels"] = first[1]
    return facts


def _classes(tensors: Tensors, facts: Mapping[str, object]) -> dict[str, object]:
    """Rows of the layer that is named as the last one of a classifier."""
    heads = [(name, shape) for rank in (2, 4) for name, shape in _weights(tensors, rank) if _HEAD.search(name)]
    shallow = [each for each in heads if each[0].count(".") == min(name.count(".") for name, _ in heads)]
    if not shallow or shallow[-1][1][0] == facts.get("vocabulary") or shallow[-1][1][2:] not in ((), (1, 1)):
        return {}
    return {"classes": shallow[-1][1][0]}

"""What a written safetensors file will be: its tensors, and the notes of all that the format itself can't hold.

Tensors are laid out by the size of their elements, largest first, so that each is aligned to its own; those of one size
in the order of the state dict, which is the header's too. Any reader of the format finds every tensor that has a dtype
there under its key. Tensors that share bytes: the same tensor under two keys is written once, and the second key stands in
``__metadata__`` as ``alias: kept``, as the safetensors library writes it; other views of the same bytes are written as copies
for other programs, and the notes say which bytes they share. What has no dtype there travels in a carrier (``key#complex128``,
``key#indices``, ``key#storage``) under the nearest one. Source of the format: the README of safetensors, "Format".
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from statedict.dtypes import BY_CODE
from statedict.errors import Unsupported
from statedict.formats.layout import Cluster, by_storage, clusters, identity, in_memory_order, leaves, whole
from statedict.formats.safetensors_notes import DIGEST_CHARACTERS, NOTES_VERSION, fingerprint
from statedict.formats.typed_json import encode, encode_value
from statedict.io.plans import Later, Literal, Payload, Segment, Source, Sum, WritePlan
from statedict.keys import display
from statedict.manifest import Container, Finding, Node, TensorEntry
from statedict.nodes import every_tensor
from statedict.report.units import plural
from statedict.views import is_dense, is_packed, packed_stride, reach

__all__ = ["SafetensorsWriter"]

# The data begin at a multiple of this many bytes, so that a mapped file is aligned for any processor.
_ALIGNMENT = 64
# The safetensors library refuses a longer header, in reading and in writing (its MAX_HEADER_SIZE).
_MOST_HEADER_NBYTES = 100_000_000
# dtypes without a code in the format, and what carries their bytes: the code, and the dimension that is added.
_STAND_INS = {
    "C128": ("F64", (2,)),
    "C32": ("F16", (2,)),
    "QINT8": ("I8", ()),
    "QUINT8": ("U8", ()),
    "QINT32": ("I32", ()),
    "BITS16": ("U16", ()),
}


class _Stored(NamedTuple):
    """One tensor of the header."""

    code: str
    shape: tuple[int, ...]
    entry: TensorEntry  # whose packed bytes it gets

    @property
    def nbytes(self) -> int:
        return self.entry.nbytes


class SafetensorsWriter:
    """The plan of one file. After ``plan``: ``notes`` are findings about what travels in another form."""

    def __init__(self, root: Node, metadata: Mapping[str, str], *, digests: bool) -> None:
        self.notes: list[Finding] = []
        self._root = root
        self._metadata = dict(metadata)
        self._digests = digests
        self._stored: dict[str, _Stored] = {}
        self._facts: dict[str, dict[str, object]] = {}
        self._names: dict[int, str] = {}  # by id() of the entry
        self._taken: set[str] = {"__metadata__"}
        self._aliases: dict[str, str] = {}
        self._carried: list[str] = []
        self._copies: list[str] = []

    def plan(self, source_of: Callable[[TensorEntry], Source]) -> WritePlan:
        """The file as segments. Raises ``Unsupported`` for values that can't be written, naming the key."""
        tensors = every_tensor(self._root)
        self._name(tensors)
        for group in by_storage(leaves(tensors)):
            for cluster in clusters(group):
                self._store_cluster(cluster)
        for entry in tensors:
            self._describe(entry)
        self._say()
        order = sorted(self._in_order(), key=lambda name: -BY_CODE[self._stored[name].code].bits)
        payloads = [
            Payload(name, self._stored[name].nbytes, source_of(self._stored[name].entry), self._digests)
            for name in order
        ]
        return WritePlan("safetensors", [*self._header(order), *payloads])

    # ---------------------------------------------------------------- names

    def _name(self, tensors: Sequence[TensorEntry]) -> None:
        """A name for every tensor: its key, where that is free and can be written."""
        inside = [entry for entry in tensors if entry.path or len(tensors) == 1]
        keys = {path: key for key, path in display(entry.path for entry in inside).items()}
        for entry in tensors:
            known = keys.get(entry.path)
            name = self._unique(known if known is not None else "#")
            self._names[id(entry)] = name
        for entry in tensors:
            for part, tensor in entry.parts.items():
                self._names[id(tensor)] = self._unique(f"{self._names[id(entry)]}#{part}")

    def _unique(self, name: str) -> str:
        name = name.encode("utf-8", "backslashreplace").decode("utf-8")
        while name in self._taken:
            name += "'"
        self._taken.add(name)
        return name

    # ---------------------------------------------------------------- tensors

    def _store_cluster(self, cluster: Cluster) -> None:
        members = cluster.members
        if len({identity(member) for member in members}) == 1 and not _overlaps_itself(members[0]):
            self._store_alone(members)
            return
        base = next((member for member in members if _covers(member, cluster)), None)
        if base is not None and all(_is_aligned(member, cluster.low) for member in members):
            self._store(base)
            self._views(members, base, self._names[id(base)], cluster.low)
            return
        raw, low = whole(cluster)
        carrier = self._unique(f"{self._names[id(members[0])]}#storage")
        self._stored[carrier] = _Stored(raw.dtype.code, raw.shape, raw)
        self._carried.append(carrier)
        self._views(members, None, carrier, low)

    def _store_alone(self, members: Sequence[TensorEntry]) -> None:
        """One tensor, and the other keys that it has."""
        kept = members[0]
        holder = self._store(kept)
        for alias in members[1:]:
            name = self._names[id(alias)]
            self._aliases[name] = self._names[id(kept)]
            self._facts[name] = {**self._facts.get(self._names[id(kept)], {}), "of": holder}

    def _store(self, entry: TensorEntry) -> str:
        """Put a tensor into the header under its name, or a carrier's; gives that name."""
        name = self._names[id(entry)]
        facts: dict[str, object] = {}
        stride = entry.stride
        if stride != packed_stride(entry.shape) and in_memory_order(entry) is not None:
            facts["stride"] = list(stride)
        code, shape = _form(entry)
        if code != entry.dtype.code and not (code == "F4" and entry.dtype.code == "F4_X2"):
            facts |= {"dtype": entry.dtype.torch, "shape": list(entry.shape)}
            if "#" not in name:
                facts["of"] = self._unique(f"{name}#{entry.dtype.torch}")
            self._carried.append(str(facts.get("of", name)))
        holder = str(facts.get("of", name))
        self._stored[holder] = _Stored(code, shape, entry)
        if facts:
            self._facts[name] = facts
        return holder

    def _views(self, members: Sequence[TensorEntry], base: TensorEntry | None, holder: str, low: int) -> None:
        """Tensors that see parts of one stored tensor; each is also stored as a copy, for other programs."""
        for entry in members:
            if entry is base:
                continue
            name = self._names[id(entry)]
            view = entry.view
            assert view is not None
            if base is not None and identity(entry) == identity(base):
                self._aliases[name] = holder
                self._facts[name] = {**self._facts.get(holder, {}), "of": holder}
                continue
            offset = view.offset - low * 8 // entry.dtype.bits if entry.numel else 0
            facts: dict[str, object] = {"of": holder, "offset": offset, "view": list(view.stride)}
            facts |= {"dtype": entry.dtype.torch, "shape": list(entry.shape)}
            if view.bits:
                facts["bits"] = view.bits
            self._facts[name] = facts
            code, shape = _form(entry)
            if code == entry.dtype.code:
                self._stored[name] = _Stored(code, shape, entry)
                self._copies.append(name)

    def _describe(self, entry: TensorEntry) -> None:
        """The facts of a tensor that don't follow from its bytes."""
        name = self._names[id(entry)]
        facts = self._facts.get(name, {})
        if entry.view is None:
            facts |= {"dtype": entry.dtype.torch, "shape": list(entry.shape)}
            if entry.memory_stride is not None:
                facts["stride"] = list(entry.memory_stride)
        if entry.layout != "strided":
            facts["layout"] = entry.layout
        if entry.parts:
            facts["parts"] = {part: self._names[id(tensor)] for part, tensor in entry.parts.items()}
        if entry.attributes:
            facts["attributes"] = {
                key: encode_value(value, self._reference, entry.key) for key, value in entry.attributes.items()
            }
        if facts:
            self._facts[name] = facts

    def _reference(self, entry: TensorEntry) -> str:
        return self._names[id(entry)]

    def _say(self) -> None:
        for code, keys, what in (
            (
                "carried",
                self._carried,
                "without a dtype in the format, whose bytes are in carriers that statedict reads back",
            ),
            ("aliases", list(self._aliases), "tied with another and written once: loaders that know aliases find it"),
            ("shared-copies", self._copies, "sharing bytes with another, and written as a copy too for other programs"),
        ):
            if keys:
                self.notes.append(Finding(code, "info", f"{plural(len(keys), 'tensor')} {what}", tuple(keys)))

    # ---------------------------------------------------------------- the header

    def _header(self, order: Sequence[str]) -> Iterator[Segment]:
        """The length and the JSON; with digests, bytes that are known when the payloads are."""
        offsets: dict[str, tuple[int, int]] = {}
        end = 0
        for name in order:
            offsets[name] = (end, end + self._stored[name].nbytes)
            end = offsets[name][1]
        head, tail = self._metadata_text()
        for name in self._in_order():
            stored = self._stored[name]
            info = f'{{"dtype":"{stored.code}","shape":{_compact(list(stored.shape))},"data_offsets":{_compact(offsets[name])}}}'
            tail.append(f",{_text(name)}:{info}")
        before = head.encode("utf-8")
        after = "".join(tail).encode("utf-8") + b"}"
        count = DIGEST_CHARACTERS * len(self._stored) if self._digests else 0
        length = len(before) + count + len(after)
        padding = -(8 + length) % _ALIGNMENT
        if length + padding > _MOST_HEADER_NBYTES:
            raise Unsupported(
                f"the header would have {length + padding:,} bytes, the format allows {_MOST_HEADER_NBYTES:,}",
                hint="Convert a part of it: --at KEY, or leave the digests out",
            )
        first = (length + padding).to_bytes(8, "little") + before
        last = after + b" " * padding
        if not self._digests:
            yield Literal(first + last)
            return
        names = sorted(self._stored)

        def render(sums: Mapping[str, Sum]) -> bytes:
            digests = "".join([str(sums[name].digest).removeprefix("xxh3-128:") for name in names])
            return first + digests.encode("ascii") + last

        yield Later(len(first) + count + len(last), render)

    def _in_order(self) -> list[str]:
        """The names of the header in the order of the state dict, carriers behind their tensors."""
        names = [name for name in self._names.values() if name in self._stored]
        known = set(names)
        return names + [name for name in self._stored if name not in known]

    def _metadata_text(self) -> tuple[str, list[str]]:
        """The beginning of the header up to the digests, and the pieces after them."""
        texts = {"format": "pt", **self._metadata}
        texts.update({alias: kept for alias, kept in self._aliases.items() if alias not in texts})
        pieces = [f"{_text(name)}:{_text(value)}" for name, value in texts.items()]
        notes = self._notes()
        head = '{"__metadata__":{' + ",".join(pieces)
        if not notes and not self._digests:
            return head, ["}"]
        notes = {"version": NOTES_VERSION, "names": self._fingerprint(), **notes}
        inner = json.dumps(notes, separators=(",", ":"), allow_nan=False)
        if not self._digests:
            return f'{head},"statedict":{_text(inner)}', ["}"]
        before = _text(inner[:-1] + ',"digests":"')[:-1]
        return f'{head},"statedict":{before}', [_text('"}')[1:], "}"]

    def _fingerprint(self) -> int:
        return fingerprint({name: (stored.code, stored.shape) for name, stored in self._stored.items()})

    def _notes(self) -> dict[str, Any]:
        tensors = [entry for entry in every_tensor(self._root) for entry in (entry, *entry.parts.values())]
        common = Counter([(e.device, e.requires_grad, e.kind) for e in tensors])
        usual = max(common, key=common.__getitem__) if common else (None, None, "Tensor")
        for entry in tensors:
            names = ("device", "requires_grad", "kind")
            own = (entry.device, entry.requires_grad, entry.kind)
            if own != usual:
                facts = self._facts.setdefault(self._names[id(entry)], {})
                facts |= {name: value for name, value, other in zip(names, own, usual) if value != other}
        made = self._structure()
        if usual != (None, None, "Tensor"):
            made["defaults"] = dict(zip(("device", "requires_grad", "kind"), usual))
        if self._facts:
            made["tensors"] = self._facts
        return made

    def _structure(self) -> dict[str, Any]:
        """How the tensors are nested: nothing for a flat dict, little for a flat OrderedDict, else the whole tree."""
        root = self._root
        if not isinstance(root, Container) or root.kind not in ("dict", "OrderedDict"):
            return {"tree": encode(root, self._reference)}
        if not all(
            type(key) is str and isinstance(child, TensorEntry) and self._names[id(child)] == key
            for key, child in zip(root.keys, root.children)
        ):
            return {"tree": encode(root, self._reference)}
        made: dict[str, Any] = {} if root.kind == "dict" else {"flat": root.kind}
        if list(root.keys) != self._in_order():
            made["keys"] = list(root.keys)
        if root.attributes:
            made["attributes"] = {name: encode_value(value, self._reference) for name, value in root.attributes.items()}
        return made


def _form(entry: TensorEntry) -> tuple[str, tuple[int, ...]]:
    """The dtype's code in the format, and the shape there."""
    dtype, shape = entry.dtype, entry.shape
    if dtype.safetensors:
        return dtype.code, shape
    if dtype.code == "F4_X2" and shape:
        # The format counts single 4-bit numbers.
        return "F4", (*shape[:-1], shape[-1] * 2)
    if dtype.code == "F4":
        return "F4", shape
    if dtype.code in _STAND_INS:
        code, more = _STAND_INS[dtype.code]
        return code, (*shape, *more)
    return ("U8", shape) if dtype.bits == 8 else ("U8", (entry.nbytes,))


def _overlaps_itself(entry: TensorEntry) -> bool:
    """Whether the tensor shows bytes twice in a way that its strides alone can't bring back."""
    view = entry.view
    assert view is not None
    if not entry.numel or is_packed(entry.shape, view.stride) or is_dense(entry.shape, view.stride):
        return False
    shape = tuple(1 if stride == 0 else size for size, stride in zip(entry.shape, view.stride))
    count = 1
    for size in shape:
        count *= size
    return reach(shape, view.stride) < count


def _covers(entry: TensorEntry, cluster: Cluster) -> bool:
    """Whether the tensor is the plain one that the whole cluster lies in."""
    view = entry.view
    assert view is not None
    plain = is_packed(entry.shape, view.stride) and not view.bits and entry.memory_stride is None
    return (
        plain
        and view.storage.byteorder == "little"
        and entry.dtype.safetensors
        and entry.dtype.nbytes(view.offset) == cluster.low
        and entry.nbytes == cluster.high - cluster.low
    )


def _is_aligned(entry: TensorEntry, low: int) -> bool:
    """Whether the bytes from ``low`` on can be counted in elements of this tensor."""
    return entry.dtype.bits % 8 == 0 and low % entry.dtype.itemsize == 0


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)


def _compact(values: Sequence[int]) -> str:
    return f"[{','.join([str(value) for value in values])}]"

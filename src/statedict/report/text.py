"""Documents for a terminal: aligned columns, no lines where space does, colour only where it is asked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from statedict.report.document import Block, Document, Facts, Heading, Notes, Paragraph, Table
from statedict.report.escape import LONGEST, shortened, visible, width

__all__ = ["render"]

_INDENT = "  "
_GAP = "  "
# Sentences are broken at this width where the terminal's isn't known.
_READABLE = 100
# A column is not squeezed below this to fit a terminal.
_NARROWEST = 20

_CODES = {"bold": "1", "dim": "2", "error": "1;31", "warning": "1;33", "info": "36", "range": "36"}
_WORDS = {"info": "note"}
_RANGE = re.compile(r"\{[\d,…]+\}")
_RAILS = re.compile(r"^[│├└─ ]+")
_TOKEN = re.compile(r"`[^`]*`\S*|\S+")

Paint = Callable[[str, str], str]


def render(document: Document, *, color: bool = False, columns: int | None = None) -> str:
    """The document as lines that end with a newline. ``columns`` is the terminal's width; None: as wide as it gets."""
    paint: Paint = _colored if color else _plain
    lines = [paint("bold", visible(document.title))]
    before: Block | None = None
    for block in document.blocks:
        if not isinstance(before, Heading):
            lines.append("")
        lines.extend(_lines(block, paint, columns))
        before = block
    return "\n".join(lines) + "\n"


def _plain(style: str, text: str) -> str:
    return text


def _colored(style: str, text: str) -> str:
    return f"\x1b[{_CODES[style]}m{text}\x1b[0m" if text else text


def _lines(block: Block, paint: Paint, columns: int | None) -> Iterator[str]:
    if isinstance(block, Heading):
        yield paint("bold", visible(block.text))
    elif isinstance(block, Paragraph):
        yield from (_INDENT + line for line in _wrapped(block.text, (columns or _READABLE) - len(_INDENT)))
    elif isinstance(block, Facts):
        yield from _facts(block, paint, columns)
    elif isinstance(block, Notes):
        yield from _notes(block, paint, columns)
    else:
        yield from _table(block, paint, columns)


def _facts(block: Facts, paint: Paint, columns: int | None) -> Iterator[str]:
    names = [visible(name) for name, _ in block.pairs]
    room = max(map(width, names), default=0)
    for name, (_, value) in zip(names, block.pairs):
        first = _INDENT + paint("dim", name) + " " * (room - width(name)) + _GAP
        for line in _wrapped(value, max((columns or _READABLE) - room - 4, _NARROWEST)) or [""]:
            yield (first + line).rstrip()
            first = " " * (len(_INDENT) + room + len(_GAP))


def _notes(block: Notes, paint: Paint, columns: int | None) -> Iterator[str]:
    words = [_WORDS.get(note.level, note.level) for note in block.items]
    room = max(map(len, words), default=0)
    for word, note in zip(words, block.items):
        style = note.level if note.level in _CODES else "info"
        first = _INDENT + paint(style, word) + " " * (room - len(word)) + _GAP
        text = f"{note.message} [{note.code}]"
        for line in _wrapped(text, max((columns or _READABLE) - room - 4, _NARROWEST)):
            yield first + line
            first = " " * (len(_INDENT) + room + len(_GAP))


def _wrapped(text: str, columns: int) -> list[str]:
    """The text in lines of at most that many columns, where its words and commands allow it."""
    # A message names several keys, each cut already.
    tokens: list[str] = _TOKEN.findall(visible(text, 20 * LONGEST))
    lines: list[str] = []
    room = 0
    for token in tokens:
        size = width(token)
        if lines and size + 1 <= room:
            lines[-1] += " " + token
            room -= size + 1
        else:
            lines.append(token)
            room = columns - size
    return lines


def _table(table: Table, paint: Paint, columns: int | None) -> Iterator[str]:
    titles = [visible(column.title) for column in table.columns]
    rows = [[visible(cell) for cell in row] for row in table.rows]
    sizes = [max([width(title), *[width(row[at]) for row in rows]]) for at, title in enumerate(titles)]
    if columns is not None:
        _squeeze(sizes, columns, titles)
    right = [column.kind == "number" for column in table.columns]
    yield _row(titles, sizes, right, lambda at, text: paint("dim", text))
    for row in rows:
        yield _row(row, sizes, right, lambda at, text: _cell(text, table.columns[at].kind, paint))


def _squeeze(sizes: list[int], columns: int, titles: Sequence[str]) -> None:
    """Makes the widest columns narrower, until the row fits or nothing can give."""
    over = sum(sizes) + len(_GAP) * (len(sizes) - 1) + len(_INDENT) - columns
    while over > 0:
        widest = max(range(len(sizes)), key=sizes.__getitem__)
        rest = max([size for at, size in enumerate(sizes) if at != widest], default=0)
        floor = max(_NARROWEST, width(titles[widest]), min(rest, sizes[widest] - 1))
        if floor >= sizes[widest]:
            return
        taken = min(over, sizes[widest] - floor)
        sizes[widest] -= taken
        over -= taken


def _row(cells: Sequence[str], sizes: Sequence[int], right: Sequence[bool], paint: Callable[[int, str], str]) -> str:
    out: list[str] = []
    for at, text in enumerate(cells):
        taken = width(text)
        if taken > sizes[at]:
            text = _narrowed(text, sizes[at])
            taken = width(text)
        blank = " " * (sizes[at] - taken)
        out.append(blank + paint(at, text) if right[at] else paint(at, text) + blank)
    return (_INDENT + _GAP.join(out)).rstrip()


def _narrowed(text: str, columns: int) -> str:
    most = columns
    while width(text := shortened(text, most)) > columns and most > 3:
        most -= 1
    return text


def _cell(text: str, kind: str, paint: Paint) -> str:
    if kind != "key" or paint is _plain:
        return text
    rails = _RAILS.match(text)
    head = rails[0] if rails else ""
    return (paint("dim", head) if head.strip() else head) + _RANGE.sub(
        lambda found: paint("range", found[0]), text[len(head) :]
    )

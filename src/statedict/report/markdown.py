"""Documents as GitHub-flavoured Markdown, to be pasted into an issue or a pull request.

Keys are code spans. A key that a code span or a table can't hold (backticks, pipes, backslashes) becomes ``<code>`` with
character references, because the ways out of a code span differ between Markdown's dialects.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from statedict.report.document import Block, Document, Facts, Heading, Notes, Paragraph, Table
from statedict.report.escape import LONGEST, visible

__all__ = ["render"]

# What means something to Markdown or HTML, mentions people, or becomes a link. An underscore inside a word means nothing.
_SPECIAL = re.compile(r"[\\`*\[\]<>&|~#!@$]|(?<![a-zA-Z0-9])_|_(?![a-zA-Z0-9])|:(?=//)|(?<=www)\.")
_UNSAFE_IN_CODE = re.compile(r"[`|\\\s<>&]")
_COMMAND = re.compile(r"`([^`]+)`")
_SIGNS = {"error": "**error**", "warning": "**warning**", "info": "note"}


def render(document: Document) -> str:
    """The document as Markdown that ends with a newline."""
    parts = [f"## {_text(document.title)}", *["\n".join(_lines(block)) for block in document.blocks]]
    return "\n\n".join(parts) + "\n"


def _lines(block: Block) -> Iterator[str]:
    if isinstance(block, Heading):
        yield f"### {_text(block.text)}"
    elif isinstance(block, Paragraph):
        yield _sentence(block.text)
    elif isinstance(block, Facts):
        yield "| | |"
        yield "|---|---|"
        yield from (f"| {_text(name)} | {_sentence(value)} |" for name, value in block.pairs)
    elif isinstance(block, Notes):
        for note in block.items:
            yield f"- {_SIGNS.get(note.level, 'note')} {_code(note.code)}: {_sentence(note.message)}"
    else:
        yield from _table(block)


def _table(table: Table) -> Iterator[str]:
    yield f"| {' | '.join([_text(column.title) for column in table.columns])} |"
    yield f"|{'|'.join(['---:' if column.kind == 'number' else '---' for column in table.columns])}|"
    kinds = [column.kind for column in table.columns]
    for row in table.rows:
        cells = [_code(cell) if kind == "key" and cell else _text(cell) for cell, kind in zip(row, kinds)]
        yield f"| {' | '.join(cells)} |"


def _reference(found: re.Match[str]) -> str:
    return f"&#{ord(found[0])};"


def _escape(found: re.Match[str]) -> str:
    # A backslash before a pipe, a backslash or an address is read differently by different dialects.
    return "\\" + found[0] if found[0] in "`*_[]~#!$" else _reference(found)


def _text(text: str, most: int = LONGEST) -> str:
    """Plain text: what has a meaning is escaped."""
    return _SPECIAL.sub(_escape, visible(text, most))


def _code(text: str) -> str:
    shown = visible(text)
    if not _UNSAFE_IN_CODE.search(shown):
        return f"`{shown}`"
    return f"<code>{_SPECIAL.sub(_reference, shown).replace(' ', '&nbsp;')}</code>"


def _sentence(text: str) -> str:
    """A sentence in which commands stand between backticks."""
    pieces = _COMMAND.split(visible(text, 20 * LONGEST))
    return "".join([_command(piece) if at % 2 else _text(piece, 20 * LONGEST) for at, piece in enumerate(pieces)])


def _command(text: str) -> str:
    return f"`{text}`" if not re.search(r"[|\\<>&]", text) else f"<code>{_SPECIAL.sub(_reference, text)}</code>"

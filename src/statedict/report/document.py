"""A document is a title and a list of blocks of five kinds; a renderer knows nothing else.

The texts of a document are raw: they may hold anything that a file holds. Each renderer escapes them for its own medium.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Union

__all__ = ["Block", "Column", "Document", "Facts", "Heading", "Note", "Notes", "Paragraph", "Table"]


class Heading(NamedTuple):
    """The name of what follows."""

    text: str


class Paragraph(NamedTuple):
    """One or more sentences. A text between backticks is a command, and is kept on one line."""

    text: str


class Facts(NamedTuple):
    """Names and values, one below the other."""

    pairs: Sequence[tuple[str, str]]


class Column(NamedTuple):
    """The title of a column, and what its cells are."""

    title: str
    kind: str = "text"  # "key", "text", or "number": shown right-aligned, sorted by value


class Table(NamedTuple):
    """Rows of cells, as many in each as there are columns."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    sortable: bool = True  # False where the order of the rows says something, as in a tree
    summary: str = ""  # where it is given, a medium that can hides the table behind this text


class Note(NamedTuple):
    """Something that a person should know, in one sentence."""

    level: str  # "info" | "warning" | "error"
    code: str
    message: str


class Notes(NamedTuple):
    """Notes, the gravest first."""

    items: Sequence[Note]


Block = Union[Heading, Paragraph, Facts, Table, Notes]


class Document(NamedTuple):
    """What a result says, before it has a medium."""

    title: str
    blocks: Sequence[Block]

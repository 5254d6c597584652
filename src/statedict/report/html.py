"""Documents as HTML: one page that needs nothing else, or a fragment for a notebook.

Every text is escaped. The script reads the page itself, never data written into it, and the page's policy lets only
that script run. Closing tags that HTML allows to be left out are: a page of 10,000 tensors stays below 1 MB.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape

from statedict.report.document import Block, Document, Facts, Heading, Notes, Paragraph, Table
from statedict.report.escape import LONGEST, visible

__all__ = ["fragment", "page"]

_RANGE = re.compile(r"\{[\d,…]+\}")
_RAILS = re.compile(r"^[│├└─ ]+")
_COMMAND = re.compile(r"`([^`]+)`")
_WORDS = {"info": "note"}
_LEVELS = ("info", "warning", "error")


def page(document: Document) -> str:
    """The document as a whole page."""
    script = _resource("report.js")
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_policy(script)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{_text(document.title)}</title>",
            f"<style>{_resource('report.css')}</style>",
            '<body class="statedict page">',
            *_body(document),
            f"<script>{script}</script>",
            "",
        ]
    )


def fragment(document: Document) -> str:
    """The document as one element with its own style and without a script."""
    return "\n".join(
        ['<div class="statedict">', f"<style>{_resource('report.css')}</style>", *_body(document), "</div>", ""]
    )


def _resource(name: str) -> str:
    from importlib.resources import files

    return files("statedict.report").joinpath(name).read_text("utf-8")


def _policy(script: str) -> str:
    from base64 import b64encode
    from hashlib import sha256

    digest = b64encode(sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def _body(document: Document) -> Iterator[str]:
    yield f"<h1>{_text(document.title)}</h1>"
    for block in document.blocks:
        yield from _lines(block)


def _lines(block: Block) -> Iterator[str]:
    if isinstance(block, Heading):
        yield f"<h2>{_text(block.text)}</h2>"
    elif isinstance(block, Paragraph):
        yield f"<p>{_sentence(block.text)}</p>"
    elif isinstance(block, Facts):
        yield "<dl>"
        yield from (f"<div><dt>{_text(name)}<dd>{_sentence(value)}</div>" for name, value in block.pairs)
        yield "</dl>"
    elif isinstance(block, Notes):
        yield "<ul>"
        for note in block.items:
            level = note.level if note.level in _LEVELS else "info"
            yield f'<li class="{level}"><b>{_WORDS.get(level, level)}</b> {_sentence(note.message)} <small>{_text(note.code)}</small>'
        yield "</ul>"
    else:
        yield from _table(block)


def _table(table: Table) -> Iterator[str]:
    classes = [f"n{at}" for at, column in enumerate(table.columns, 1) if column.kind == "number"]
    classes += [f"k{at}" for at, column in enumerate(table.columns, 1) if column.kind == "key"]
    classes += ["sortable"] if table.sortable else []
    if table.summary:
        yield f"<details><summary>{_text(table.summary)}</summary>"
    yield f'<div class="scroll"><table class="{" ".join(classes)}">'
    yield "<thead><tr>" + "".join([f"<th>{_text(column.title)}" for column in table.columns])
    yield "<tbody>"
    keys = [column.kind == "key" for column in table.columns]
    for row in table.rows:
        yield "<tr>" + "".join(["<td>" + (_key(cell) if key else _text(cell)) for cell, key in zip(row, keys)])
    yield "</table></div>"
    if table.summary:
        yield "</details>"


def _text(text: str, most: int = LONGEST) -> str:
    return escape(visible(text, most))


def _key(text: str) -> str:
    shown = _text(text)
    if "{" in shown:
        shown = _RANGE.sub(lambda found: f"<i>{found[0]}</i>", shown)
    if shown[:1] in "│├└ ":
        shown = _RAILS.sub(lambda found: f"<s>{found[0]}</s>", shown, count=1)
    return shown


def _sentence(text: str) -> str:
    """A sentence in which commands stand between backticks."""
    pieces = _COMMAND.split(visible(text, 20 * LONGEST))
    return "".join([f"<code>{escape(piece)}</code>" if at % 2 else escape(piece) for at, piece in enumerate(pieces)])

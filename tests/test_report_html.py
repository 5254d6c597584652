"""Documents as HTML and Markdown: complete, self-contained, and safe with any name."""

from __future__ import annotations

import re
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser

import pytest

from statedict.report import markdown
from statedict.report.document import Column, Document, Facts, Heading, Note, Notes, Paragraph, Table
from statedict.report.html import fragment, page
from statedict.report.result import Result

HOSTILE = (
    "<script>alert(1)</script>",
    "</table></style></title><img src=x onerror=alert(1)>",
    "\"><svg onload='x'>",
    "a|b",
    "a`b`` c",
    "a\\|b",
    "x\n\n# heading\n- item",
    "[link](javascript:x) ![i](x) https://example.com @someone",
    "\u202ereversed\x1b[2J",
    "y" * 10_000,
)


def document_of(text: str) -> Document:
    table = Table([Column(text, "key"), Column("Other"), Column("N", "number")], [[text, text, "1"]], summary=text)
    return Document(
        text, [Facts([(text, text)]), Heading(text), table, Paragraph(text), Notes([Note("info", text, text)])]
    )


class Tags(HTMLParser):
    """The tags of a page with their attributes, and its text outside of script and style."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.texts: list[str] = []
        self.inside = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        # What stands between backticks in a sentence is shown as a command, whatever it is.
        self.tags += [tag] if tag != "code" else []
        self.attributes += [name for name, _ in attrs]
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside not in ("script", "style"):
            self.texts.append(data)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_name_adds_no_tag_to_the_page(text: str) -> None:
    harmless, hostile = Tags(page(document_of("plain"))), Tags(page(document_of(text)))

    assert (harmless.tags, harmless.attributes) == (hostile.tags, hostile.attributes)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_name_adds_no_tag_to_a_notebook(text: str) -> None:
    assert Tags(fragment(document_of("plain"))).tags == Tags(fragment(document_of(text))).tags


def test_names_are_shown_as_they_are() -> None:
    assert "<script>alert(1)</script>" in Tags(page(document_of(HOSTILE[0]))).texts


def test_the_page_needs_nothing_from_outside() -> None:
    source = page(document_of("plain"))

    assert [] == re.findall(r"https?:|//cdn|src=|href=|@import|url\(", source)


def test_the_policy_lets_only_the_pages_own_script_run() -> None:
    source = page(document_of("plain"))
    [script] = re.findall(r"<script>(.*?)</script>", source, re.DOTALL)
    digest = b64encode(sha256(script.encode()).digest()).decode()

    assert f"script-src 'sha256-{digest}'" in source
    assert "default-src 'none'" in source


def test_a_notebook_gets_no_script() -> None:
    assert "script" not in Tags(fragment(document_of("plain"))).tags


def test_rows_of_a_tree_are_not_sortable() -> None:
    table = Table([Column("Key", "key")], [["├─ a"]], sortable=False)

    assert 'class="k1"' in page(Document("t", [table]))
    assert "<s>├─ </s>a" in page(Document("t", [table]))


@pytest.mark.parametrize("text", HOSTILE)
def test_a_table_of_markdown_keeps_its_shape(text: str) -> None:
    lines = markdown.render(document_of(text)).splitlines()
    rows = [line for line in lines if line.startswith("|") and line != "|---|---|---:|"]
    # A pipe that is a character reference, or follows a backslash, is none of the table's.
    bars = {row.count("|") for row in rows if "---" not in row}

    assert {3, 4} == bars
    assert len(markdown.render(document_of("plain")).splitlines()) == len(lines)


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_holds_no_tag_of_a_name(text: str) -> None:
    tags = set(re.findall(r"</?[a-z]+", markdown.render(document_of(text))))

    assert tags <= {"<code", "</code"}


def test_a_plain_key_is_a_code_span_in_markdown() -> None:
    table = Table([Column("Key", "key"), Column("N")], [["model_a.layers.{0…3}.w", "x_y"]])

    assert "| `model_a.layers.{0…3}.w` | x_y |" in markdown.render(Document("t", [table]))


class Answer(Result):
    """A result of one sentence."""

    def document(self) -> Document:
        return Document("answer", [Paragraph("It is *fine*.")])


def test_a_result_shows_itself_in_every_way() -> None:
    answer = Answer()

    assert "answer\n\n  It is *fine*." == str(answer)
    assert "It is \\*fine\\*." in answer.to_markdown()
    assert answer.to_html().startswith("<!doctype html>")
    assert answer._repr_html_().startswith('<div class="statedict">')

"""Documents on a terminal."""

from __future__ import annotations

import re

import pytest

from statedict.report.document import Column, Document, Facts, Heading, Note, Notes, Paragraph, Table
from statedict.report.escape import shortened, visible, width
from statedict.report.text import render
from statedict.report.units import human_bytes, human_count, number

DOCUMENT = Document(
    "model.pth",
    [
        Facts([("Format", "torch-zip"), ("File", "90.9 MB")]),
        Heading("Tensors"),
        Table(
            [Column("Key", "key"), Column("Shape"), Column("Size", "number")],
            [["layers.{0…31}.w", "[8, 4]", "1.02 kB"], ["b", "[]", "4 B"]],
        ),
        Paragraph("That is all."),
        Notes([Note("warning", "view-bloat", "Too large."), Note("info", "tied", "Tied.")]),
    ],
)


def test_columns_are_aligned_and_nothing_trails() -> None:
    expected = """\
model.pth

  Format  torch-zip
  File    90.9 MB

Tensors
  Key              Shape      Size
  layers.{0…31}.w  [8, 4]  1.02 kB
  b                []          4 B

  That is all.

  warning  Too large. [view-bloat]
  note     Tied. [tied]
"""

    assert expected == render(DOCUMENT)


def test_colour_only_adds_escapes() -> None:
    colored = render(DOCUMENT, color=True)

    assert "\x1b[1m" in colored
    assert render(DOCUMENT) == re.sub(r"\x1b\[[\d;]*m", "", colored)


def test_no_escape_without_colour() -> None:
    assert "\x1b" not in render(DOCUMENT)


def test_a_narrow_terminal_shortens_the_widest_column() -> None:
    table = Table([Column("Key", "key"), Column("Shape")], [["a" * 40 + "." + "b" * 40, "[4]"]])
    lines = render(Document("t", [table]), columns=50).splitlines()

    assert 50 == max(map(len, lines))
    assert "…" in lines[-1]


def test_sentences_are_wrapped_but_commands_are_not_broken() -> None:
    text = "Some words come first, " * 4 + "then `statedict convert a.pth b.safetensors --overwrite`."
    lines = render(Document("t", [Paragraph(text)]), columns=60).splitlines()

    assert any("`statedict convert a.pth b.safetensors --overwrite`." in line for line in lines)
    assert max(map(len, lines)) <= 60


def test_wide_letters_take_two_columns() -> None:
    table = Table([Column("Key", "key"), Column("N", "number")], [["层.权重", "1"], ["abcdefg", "2"], ["e\u0301", "3"]])
    ends = {width(line) for line in render(Document("t", [table])).splitlines()[3:]}

    assert {2 + 7 + 2 + 1} == ends


HOSTILE = {
    "terminal escape": "a\x1b[2Jb",
    "newline": "a\nb",
    "bidi": "a\u202eb\u2066",
    "control": "a\x00\x07\x9bb",
    "line separator": "a\u2028b",
    "surrogate": "a\udc80b",
    "tag letters": "a\U000e0041b",
    "zero width": "a\u200bb\u3164\ufe0f",
    "script": "<script>alert(1)</script>",
    "pipe": "a|b`c\\|d",
    "long": "x" * 10_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_on_their_line(name: str) -> None:
    text = HOSTILE[name]
    blocks = [
        Facts([(text, text)]),
        Heading(text),
        Table([Column(text, "key"), Column("B")], [[text, text]]),
        Paragraph(text),
        Notes([Note("error", text, text)]),
    ]
    plain = render(Document(text, blocks))
    unseen = [c for c in plain if c != "\n" and (not c.isprintable() or c in "\u3164\ufe0f")]

    assert [] == unseen
    assert len(render(Document("t", [])).splitlines()) == 1
    assert all(line for line in plain.splitlines() if line.strip())


@pytest.mark.parametrize("name", HOSTILE)
def test_what_cannot_be_seen_is_escaped_and_what_is_long_is_cut(name: str) -> None:
    shown = visible(HOSTILE[name])

    assert shown.isprintable()
    assert len(shown) <= 200


def test_a_shortened_name_keeps_both_ends() -> None:
    assert "abc…yz" == shortened("abcdefghijklmnopqrstuvwxyz", 6)


def test_bytes_have_three_digits_and_a_decimal_unit() -> None:
    shown = [human_bytes(n) for n in (0, 999, 1000, 4096, 90_900_000, 999_999, 13_500_000_000, 131_072_000)]

    assert ["0 B", "999 B", "1.00 kB", "4.10 kB", "90.9 MB", "1.00 MB", "13.5 GB", "131 MB"] == shown


def test_absurd_numbers_have_a_text() -> None:
    assert "over 999,999 EB" == human_bytes(10**6000)
    assert "over 999,999 T" == human_count(10**6000)
    assert ["0.3333", "1,234", "nan", "", "1e+40"] == [number(n) for n in (1 / 3, 1234, float("nan"), None, 10**40)]

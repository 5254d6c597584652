"""Texts from a file as they may be shown: nothing that moves the cursor, turns the line around, or can't be seen."""

from __future__ import annotations

import re

__all__ = ["LONGEST", "shortened", "visible", "width"]

# Characters of one cell or name. A key in a file may have megabytes; real ones stay below 150.
LONGEST = 200

# Letters and marks that count as printable but leave nothing, or a blank, on the screen (Unicode's
# Default_Ignorable_Code_Point among the printable ones, and the empty braille pattern).
_UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)


def visible(text: str, most: int = LONGEST) -> str:
    """The text on one line, what can't be seen written as escapes, and cut in its middle to ``most`` characters."""
    if len(text) > most:
        text = shortened(text, most)
    if text.isascii():
        if text.isprintable():
            return text
    elif text.isprintable() and not _UNSEEN.search(text):
        return text
    shown = "".join([c if c.isprintable() and not _UNSEEN.match(c) else _escape(c) for c in text])
    return shortened(shown, most)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def shortened(text: str, most: int) -> str:
    """The text with its middle left out, so that it has at most ``most`` characters (at least 3)."""
    if len(text) <= most:
        return text
    tail = (most - 1) // 2
    return f"{text[: most - 1 - tail]}…{text[len(text) - tail :]}"


def width(text: str) -> int:
    """Columns of a terminal that the text takes: wide letters two, combining marks none."""
    if text.isascii():
        return len(text)
    from unicodedata import category, east_asian_width

    return sum([0 if category(c) in ("Mn", "Me") else 2 if east_asian_width(c) in "WF" else 1 for c in text])

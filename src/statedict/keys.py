r"""Names of things in a nested tree: paths, dotted keys, templates, globs, natural order.

A key has two forms. Its identity is a *path*, a tuple of ``str | int``: ``("optimizer", "state", 0, "exp_avg")``. Its display
is *dotted*: ``optimizer.state.0.exp_avg``. A flat key that holds dots is one component, so two paths can read alike; then
the *escaped* form is shown, which is lossless: a dot inside a component is ``\.``, a backslash ``\\``, a text that reads
as a number starts with a backslash (``\0``), and an empty text is ``\e``. Where even that reads like the dotted key that
could mean several paths, it starts with a dot (``.a.b``).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping

__all__ = ["Path", "display", "dotted", "escaped", "folded", "matches", "natural", "near", "parse_escaped", "template"]

Path = tuple[str | int, ...]

# Two keys are as quickly read as one with braces.
_FEWEST_FOLDED = 3

_NUMBER = re.compile(r"(?<![^.])(0|[1-9][0-9]{0,8})(?![^.])")
_PIECE = re.compile(r"((?:[^.\\]|\\.)*)(\.|\Z)", re.DOTALL)
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)


def dotted(path: Path) -> str:
    """The path as people write it: its components joined by dots."""
    if len(path) == 1 and type(path[0]) is str:
        return path[0]
    return ".".join([str(part) for part in path])


def escaped(path: Path) -> str:
    """The path in the form that no other path has; ``parse_escaped`` is its inverse."""
    return ".".join(_escaped_part(part) for part in path)


def _escaped_part(part: str | int) -> str:
    if isinstance(part, int):
        return str(part)
    text = part.replace("\\", "\\\\").replace(".", "\\.")
    if not text:
        return "\\e"
    return "\\" + text if re.fullmatch(r"-?\d+", text, re.ASCII) else text


def parse_escaped(text: str) -> Path:
    """The path of an escaped key, which may start with a dot."""
    text = text[1:] if text.startswith(".") and len(text) > 1 else text
    parts: list[str | int] = []
    if not text:
        return ()
    for piece in _PIECE.finditer(text):
        raw = piece[1]
        if re.fullmatch(r"-?\d+", raw, re.ASCII) and len(raw) < 4000:
            parts.append(int(raw))
        elif raw == "\\e":
            parts.append("")
        else:
            parts.append(_ESCAPE.sub(r"\1", raw))
        if not piece[2]:
            break
    return tuple(parts)


def display(paths: Iterable[Path]) -> dict[str, Path]:
    """Each path under the key that it is shown as: dotted, or escaped where two paths read alike."""
    shown: dict[str, Path] = {}
    alike: dict[str, list[Path]] = {}
    for path in paths:
        key = dotted(path)
        if key in shown:
            alike.setdefault(key, [shown[key]]).append(path)
        else:
            shown[key] = path
    if not alike:
        return shown
    # Built anew, so that the order of the paths is kept. An escaped key can read like a plain one (a
    # component that holds a backslash), which is then escaped as well.
    forms = {path: _distinct(path, key) for key, group in alike.items() for path in group}
    taken = set(forms.values())
    out: dict[str, Path] = {}
    for key, path in _in_order(shown, alike):
        out[forms.get(path) or (escaped(path) if key in taken else key)] = path
    return out


def _distinct(path: Path, key: str) -> str:
    """The escaped form of a path, made different from the dotted key that several paths share."""
    form = escaped(path)
    return "." + form if form == key else form


def _in_order(shown: Mapping[str, Path], alike: Mapping[str, list[Path]]) -> Iterable[tuple[str, Path]]:
    for key, path in shown.items():
        for each in alike.get(key, [path]):
            yield key, each


def natural(text: str) -> tuple[tuple[str, int], ...]:
    """A sort key that puts ``layers.2`` before ``layers.10``."""
    parts = re.split(r"(\d{1,18})", text)
    return tuple((parts[i], int(parts[i + 1]) if i + 1 < len(parts) else -1) for i in range(0, len(parts), 2))


def template(key: str) -> tuple[str, tuple[int, ...]]:
    """The key with each whole-component number replaced by ``{}``, and the numbers: what layers have in common.

    Numbers as Python writes them, of at most nine digits; ``007`` is a name.
    """
    parts = _NUMBER.split(key)
    if len(parts) == 1:
        return key, ()
    return "{}".join(parts[::2]), tuple(map(int, parts[1::2]))


def folded(keys: Iterable[str]) -> list[str]:
    """The keys with those that differ in their first number as one, ``layers.{0…31}.weight``, where no number is left out.

    In the order of the first key of each.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for key in dict.fromkeys(keys):
        before, number, after = _first_number(key)
        groups.setdefault((before, after), []).append(number)
    found = []
    for (before, after), numbers in groups.items():
        low, high = min(numbers), max(numbers)
        if high - low + 1 == len(numbers) >= _FEWEST_FOLDED:
            found.append(f"{before}{{{low}…{high}}}{after}")
        else:
            found += [before if number < 0 else f"{before}{number}{after}" for number in numbers]
    return found


def _first_number(key: str) -> tuple[str, int, str]:
    """What stands before the first whole-component number, the number (-1 where there is none), and what follows."""
    match = _NUMBER.search(key)
    return (key, -1, "") if match is None else (key[: match.start()], int(match[0]), key[match.end() :])


def matches(key: str, glob: str) -> bool:
    """Whether the glob (``*``, ``?``, ``[…]``; case counts) matches the whole key."""
    return fnmatch.fnmatchcase(key, glob)


def near(key: str, keys: Iterable[str], most: int = 3) -> list[str]:
    """The keys that a person who typed ``key`` may have meant, best first."""
    candidates = list(keys)
    ending = [k for k in candidates if k.endswith("." + key) or key.endswith("." + k)][:most]
    if ending or len(key) > 500:
        return ending
    import difflib

    return difflib.get_close_matches(key, candidates[:5000], n=most, cutoff=0.6)

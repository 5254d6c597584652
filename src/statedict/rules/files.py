"""Rules in files: TOML or JSON, a table for each rule.

    schema = "statedict.rules/1"

    [[rules]]
    rule = "rename"
    pattern = "layers.{n}.attn.weight"
    replacement = "blocks.{n}.attention.weight"

A file is data: it is read, each table is given to the function of that name, and nothing in it is run.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from statedict.errors import FileError, RuleError, StateDictError, one_line

__all__ = ["SCHEMA", "parsed", "read_tables", "rendered"]

SCHEMA = "statedict.rules/1"
# A file of rules for a hundred thousand keys, each named, has a tenth of this.
_MOST_NBYTES = 64 * 1024 * 1024


def read_tables(path: str | os.PathLike[str]) -> list[Mapping[str, Any]]:
    """The table of each rule of a file, in order. Raises ``FileError``, and ``RuleError`` for what is no file of rules."""
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            data = file.read(_MOST_NBYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError):
            raise FileError.of(error, name, "can't be opened") from error
        raise FileError("can't be opened: the name holds a NUL character", path=name) from error
    if len(data) > _MOST_NBYTES:
        raise RuleError(
            "the file is too large for a file of rules", path=name, expected=f"at most {_MOST_NBYTES} bytes"
        )
    try:
        return parsed(data.decode(), is_toml=_is_toml(name))
    except UnicodeDecodeError as error:
        raise RuleError("this is no file of rules: it isn't UTF-8", path=name, offset=error.start) from error
    except StateDictError as error:
        raise error.located(name) from error.__cause__


def _is_toml(path: str) -> bool:
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in (".toml", ".json"):
        raise RuleError("rules are kept in files ending in .toml or .json", path=path, found=suffix or "no suffix")
    return suffix == ".toml"


def parsed(text: str, *, is_toml: bool) -> list[Mapping[str, Any]]:
    """The tables in the text of a file."""
    try:
        found = _toml(text) if is_toml else json.loads(text)
    except (ValueError, RecursionError) as error:
        kind = "TOML" if is_toml else "JSON"
        raise RuleError(f"this is no {kind}: {one_line(error)}") from error
    rules = found.get("rules") if isinstance(found, dict) else found
    if isinstance(found, dict) and found.get("schema", SCHEMA) != SCHEMA:
        raise RuleError(
            "this is another kind of file", expected=f'schema = "{SCHEMA}"', found=one_line(repr(found["schema"]))
        )
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        hint = "In TOML each rule is a table [[rules]], in JSON an object of the list 'rules'"
        raise RuleError("this is no file of rules", hint=hint)
    return rules


def _toml(text: str) -> Any:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)


def rendered(tables: Sequence[Mapping[str, object]], path: str | os.PathLike[str]) -> bytes:
    """The text of a file of rules, in the form of the suffix. The same rules give the same bytes."""
    made = {"schema": SCHEMA, "rules": [dict(table) for table in tables]}
    if not _is_toml(os.fspath(path)):
        return (json.dumps(made, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
    import tomli_w

    return tomli_w.dumps(made).encode()

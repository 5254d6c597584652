"""What a comparison's findings are made from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from statedict.ops.comparing.changes import Change
from statedict.ops.comparing.keyed import Keyed
from statedict.ops.comparing.renames import Rename

__all__ = ["Evidence"]


class Evidence(NamedTuple):
    """Both sides, what differs between them, and the keys that only one has."""

    a: Keyed
    b: Keyed
    changed: Sequence[Change]
    only: tuple[Sequence[str], Sequence[str]]
    renamed: Sequence[Rename]

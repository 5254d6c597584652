"""``remap``: a source under rules, as a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from statedict.checkpoint import Checkpoint
from statedict.checkpoint import open as open_checkpoint
from statedict.keys import Path
from statedict.limits import Limits

if TYPE_CHECKING:
    from statedict.rules import RulesLike

__all__ = ["remap"]


def remap(
    source: object, rules: RulesLike, *, at: str | Path | None = None, limits: Limits | None = None
) -> Checkpoint:
    """The checkpoint that the rules make of a source; lazy: nothing is read or copied until its tensors are.

    ``source`` is what ``open`` takes. A file that is opened here is closed with the result; a ``Checkpoint`` stays its owner's, and has to
    stay open. Raises what ``open`` raises, and ``RuleError`` for a rule that matches nothing, keys that would get one name, and
    tensors that don't fit together.
    """
    from statedict.rules.plans import planned
    from statedict.rules.ruleset import Rules

    wanted = Rules.of(rules)
    checkpoint = open_checkpoint(source, at=at, limits=limits)
    is_ours = not isinstance(source, Checkpoint)
    try:
        return planned(checkpoint, wanted, owns_files=is_ours).checkpoint
    except BaseException:
        if is_ours:
            checkpoint.close()
        raise

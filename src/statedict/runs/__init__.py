"""Training runs: committed steps on disk, what is kept of them, and when the next is due."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from statedict.runs.catalogue import Step
    from statedict.runs.policies import Best, Every, Latest, Minutes, Steps, Within
    from statedict.runs.training_run import TrainingRun

__all__ = ["Best", "Every", "Latest", "Minutes", "Step", "Steps", "TrainingRun", "Within"]


def __getattr__(name: str) -> object:
    """The name, imported from its module when it is used: a policy needs none of the writing."""
    if name == "Step":
        from statedict.runs import catalogue as home
    elif name == "TrainingRun":
        from statedict.runs import training_run as home  # type: ignore[no-redef]
    elif name in __all__:
        from statedict.runs import policies as home  # type: ignore[no-redef]
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(home, name)
    return value

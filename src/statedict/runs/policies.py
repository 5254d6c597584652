"""When a step is due, and which steps are kept: small values that combine with ``|``, and pure functions over facts.

every = Steps(1000) | Minutes(15)                          whichever comes first
keep = Latest(3) | Best("val_loss", 2) | Every(10_000)     what any of them keeps
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite, isnan
from typing import NamedTuple, Protocol, cast

from statedict.errors import StateDictError

__all__ = [
    "AnyDue",
    "AnyKeep",
    "Best",
    "Clock",
    "Due",
    "Every",
    "Keep",
    "Latest",
    "Minutes",
    "Record",
    "Steps",
    "Within",
    "due_of",
    "keep_of",
    "mode_of",
]

# Words in the names of metrics that say which way is better.
_LESS = ("loss", "error", "perplexity", "ppl", "nll", "mse", "mae", "rmse", "wer", "cer", "fid", "eer", "bpb", "bpc")
_MORE = ("acc", "accuracy", "f1", "auc", "auroc", "map", "miou", "iou", "bleu", "rouge", "precision", "recall", "r2",
         "psnr", "ssim", "reward", "return", "score", "dice", "ndcg", "mrr")  # fmt: skip
_SECONDS = {"days": 86_400.0, "hours": 3_600.0, "minutes": 60.0}


class Record(NamedTuple):
    """What retention knows of a step."""

    step: int
    time: float  # seconds since 1970
    metrics: Mapping[str, float] = {}


class Clock(NamedTuple):
    """What the question "is a step due?" depends on."""

    step: int
    last: int  # the last step that was saved; 0 before the first
    minutes: float  # since then, or since the run was opened


class Keep(Protocol):
    """Which steps stay."""

    def keeps(self, records: Sequence[Record], now: float) -> frozenset[int]:
        """The numbers of those that stay; ``records`` are ascending, ``now`` counts seconds since 1970."""

    def __or__(self, other: Keep) -> Keep:
        """What either keeps."""


class Due(Protocol):
    """When a step is saved."""

    def is_due(self, clock: Clock) -> bool:
        """Whether it is time."""

    def __or__(self, other: Due) -> Due:
        """Whichever comes first."""


class _KeepValue:
    """What the policies of retention have in common: ``|``, equality, and a text that makes them again."""

    __slots__ = ()

    def keeps(self, records: Sequence[Record], now: float) -> frozenset[int]:
        raise NotImplementedError

    def __or__(self, other: Keep) -> Keep:
        return AnyKeep((self, keep_of(other)))


class AnyKeep(_KeepValue):
    """What any of several keeps."""

    __slots__ = ("policies",)

    def __init__(self, policies: Sequence[Keep]) -> None:
        self.policies = tuple(policies)

    def __repr__(self) -> str:
        return " | ".join([repr(policy) for policy in self.policies])

    def keeps(self, records: Sequence[Record], now: float) -> frozenset[int]:
        """The union."""
        return frozenset().union(*[policy.keeps(records, now) for policy in self.policies])


class Latest(_KeepValue):
    """The newest ``count`` steps."""

    __slots__ = ("count",)

    def __init__(self, count: int) -> None:
        self.count = _positive("Latest", count)

    def __repr__(self) -> str:
        return f"Latest({self.count})"

    def keeps(self, records: Sequence[Record], now: float) -> frozenset[int]:
        """The last ones."""
        return frozenset([record.step for record in records[-self.count :]])


class Best(_KeepValue):
    """The ``count`` steps with the best value of a metric; of equal ones the newer. Steps without it, and NaN, are never among them.

    Which way is better is told by the metric's name (``val_loss``: less, ``val_acc``: more), or said: ``mode="min"``, ``"max"``.
    """

    __slots__ = ("count", "metric", "mode")

    def __init__(self, metric: str, count: int = 1, *, mode: str | None = None) -> None:
        self.metric = metric
        self.count = _positive("Best", count)
        self.mode = mode_of(metric, mode)

    def __repr__(self) -> str:
        return f"Best({self.metric!r}, {self.count}, mode={self.mode!r})"

    def ranked(self, records: Sequence[Record]) -> list[Record]:
        """The steps that have the metric, the best first."""
        sign = 1.0 if self.mode == "min" else -1.0
        known = [record for record in records if not isnan(record.metrics.get(self.metric, float("nan")))]
        return sorted(known, key=lambda record: (sign * record.metrics[self.metric], -record.step))

    def keeps(self, records: Sequence[Record], now: float) -> frozenset[int]:
        """The best ones."""
        return frozenset([record.step for record in self.ranked(records)[: self.count]])


class Every(_KeepValue):
    """The steps whose number is a multiple of ``count``."""

    __slots__ = ("count",)

    def __init__(self, count: int) -> None:
        self.count = _positive("Every", count)

    def __repr__(self) -> str:
        return f"Every({self.count})"

    def keeps(self, records: Sequence[Record], now: float) -> frozenset[int]:
        """The multiples."""
        return frozenset([record.step for record in records if record.step % self.count == 0])


class Within(_KeepValue):
    """The steps that were saved in the last hours, minutes and days."""

    __slots__ = ("seconds",)

    def __init__(self, *, hours: float = 0, minutes: float = 0, days: float = 0) -> None:
        self.seconds = hours * _SECONDS["hours"] + minutes * _SECONDS["minutes"] + days * _SECONDS["days"]
        if not (isfinite(self.seconds) and self.seconds > 0):
            raise StateDictError("Within takes a time above 0", found=f"{self.seconds} seconds", hint="Within(hours=6)")

    def __repr__(self) -> str:
        return f"Within(minutes={self.seconds / 60:g})"

    def keeps(self, records: Sequence[Record], now: float) -> frozenset[int]:
        """The young ones; a clock that was set back makes none old."""
        return frozenset([record.step for record in records if now - record.time <= self.seconds])


class _DueValue:
    __slots__ = ()

    def is_due(self, clock: Clock) -> bool:
        raise NotImplementedError

    def __or__(self, other: Due) -> Due:
        return AnyDue((self, due_of(other)))


class AnyDue(_DueValue):
    """Whichever of several comes first."""

    __slots__ = ("policies",)

    def __init__(self, policies: Sequence[Due]) -> None:
        self.policies = tuple(policies)

    def __repr__(self) -> str:
        return " | ".join([repr(policy) for policy in self.policies])

    def is_due(self, clock: Clock) -> bool:
        """Whether any is."""
        return any(policy.is_due(clock) for policy in self.policies)


class Steps(_DueValue):
    """Every ``count`` steps: at each multiple, or the first step behind it that is asked about."""

    __slots__ = ("count",)

    def __init__(self, count: int) -> None:
        self.count = _positive("Steps", count)

    def __repr__(self) -> str:
        return f"Steps({self.count})"

    def is_due(self, clock: Clock) -> bool:
        """Whether a multiple lies between the last step that was saved and this one."""
        return clock.step // self.count > clock.last // self.count


class Minutes(_DueValue):
    """Every ``count`` minutes since the last save, or since the run was opened."""

    __slots__ = ("count",)

    def __init__(self, count: float) -> None:
        if isinstance(count, bool) or not isinstance(count, (int, float)) or not (isfinite(count) and count > 0):
            raise StateDictError("Minutes takes a number above 0", found=repr(count))
        self.count = count

    def __repr__(self) -> str:
        return f"Minutes({self.count:g})"

    def is_due(self, clock: Clock) -> bool:
        """Whether they are over."""
        return clock.minutes >= self.count


def keep_of(value: object) -> Keep:
    """What ``keep=`` was given as a policy: a number means the newest so many. Raises ``StateDictError`` for something else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return Latest(value)
    if hasattr(value, "keeps"):
        return cast("Keep", value)
    hint = 'keep=3, or Latest(3) | Best("val_loss", 2) | Every(10_000) | Within(hours=6)'
    raise StateDictError("keep= takes a number or what is to be kept", found=repr(value), hint=hint)


def due_of(value: object) -> Due:
    """What ``every=`` was given as a policy: a number means steps. Raises ``StateDictError`` for something else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return Steps(value)
    if hasattr(value, "is_due"):
        return cast("Due", value)
    hint = "every=1000, or Steps(1000) | Minutes(15)"
    raise StateDictError("every= takes a number of steps or when to save", found=repr(value), hint=hint)


def mode_of(metric: str, mode: str | None) -> str:
    """``min`` or ``max``. Raises ``StateDictError`` where the name of the metric doesn't tell and nobody has said."""
    if mode in ("min", "max"):
        return mode
    words = set(metric.lower().replace("-", "_").replace("/", "_").replace(".", "_").split("_"))
    less, more = bool(words & set(_LESS)), bool(words & set(_MORE))
    if mode is not None or less == more:
        what = "mode is 'min' or 'max'" if mode is not None else f"it isn't clear which way '{metric}' is better"
        raise StateDictError(what, found=mode, hint=f"Best({metric!r}, mode='min') or mode='max'")
    return "min" if less else "max"


def _positive(name: str, count: object) -> int:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise StateDictError(f"{name} takes a number of at least 1", found=repr(count))
    return count

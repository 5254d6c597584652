"""Numbers as people read them: three digits and a unit. Exact numbers are for JSON."""

from __future__ import annotations

__all__ = ["human_bytes", "human_count", "number", "plural"]


def human_bytes(nbytes: int) -> str:
    """Bytes in decimal units: ``512 B``, ``90.9 MB``, ``13.5 GB``."""
    return f"{nbytes} B" if nbytes < 1000 else _scaled(nbytes, ("kB", "MB", "GB", "TB", "PB", "EB"))


def human_count(count: int) -> str:
    """A count: ``512``, ``22.7 M``, ``6.74 B``."""
    return str(count) if count < 1000 else _scaled(count, ("k", "M", "B", "T"))


def _scaled(value: int, units: tuple[str, ...]) -> str:
    # Integers: a hostile shape counts more than a float can hold.
    scale, unit = 1000, 0
    while value >= 999_500 * scale // 1000 and unit < len(units) - 1:
        scale, unit = scale * 1000, unit + 1
    if value >= 1_000_000 * scale:
        return f"over 999,999 {units[unit]}"
    ratio = value / scale
    digits = 2 if ratio < 9.995 else 1 if ratio < 99.95 else 0
    return f"{ratio:,.{digits}f} {units[unit]}"


def number(value: object) -> str:
    """A figure of a statistic in at most six digits; empty for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**12:
        return f"{value:,}"
    if isinstance(value, complex):
        return f"{value:.3g}"
    return str(value) if not isinstance(value, int) else f"{float(value):.4g}" if abs(value) < 10**300 else "huge"


def plural(count: int, noun: str) -> str:
    """``1 tensor``, ``2 tensors``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"

"""How much a file may ask for. Every check that refuses a large file is against one of these numbers."""

from __future__ import annotations

from typing import NamedTuple

from statedict.errors import LimitExceeded

__all__ = ["DEFAULT_LIMITS", "Limits"]


class Limits(NamedTuple):
    """Caps on what a file may ask for; generous for real checkpoints, small for hostile ones.

    Raise one by ``open(path, limits=Limits(depth=10_000))`` or ``--limit depth=10000``.
    """

    # Bytes of one pickle stream that are interpreted. A checkpoint of 100,000 tensors has 11 MB.
    pickle_bytes: int = 256 * 1024 * 1024
    # Instructions of one pickle stream. 100,000 tensors take 3.2 million; each may make an object of a hundred bytes.
    opcodes: int = 30_000_000
    # Bytes of one integer in a pickle: 2**2039 is torch's own bound; the quadratic cost starts far above.
    integer_bytes: int = 1024
    # Containers inside containers.
    depth: int = 1_000
    # Tensors, objects and containers of one file, counted as often as they are reachable.
    nodes: int = 10_000_000
    # Bytes of one header (the safetensors library's own bound).
    header_bytes: int = 100_000_000
    # Bytes that a view may show beyond what its storage holds (a stride of 0 repeats elements without end).
    expanded_bytes: int = 1024 * 1024 * 1024
    # Bytes that one compressed record may expand to when it must be held in memory.
    inflated_bytes: int = 4 * 1024 * 1024 * 1024

    def check(self, limit: str, found: int, what: str, **where: object) -> None:
        """Raise ``LimitExceeded`` if ``found`` is above the limit of that name."""
        most = getattr(self, limit)
        if found > most:
            raise LimitExceeded(what, limit=limit, most=most, found=found, **where)


DEFAULT_LIMITS = Limits()

"""CRC-32 as zip has it, by the fastest means that is installed.

zlib's own takes 2.5 to 3.5 GB/s of one core, which is most of the time of a checked load of a ``.pth``; ISA-L's takes 16 (one core of
an AMD EPYC). Both let other threads run meanwhile.
"""

from __future__ import annotations

try:
    from isal.isal_zlib import crc32
except ImportError:  # no wheel for this machine
    from zlib import crc32

__all__ = ["crc32"]

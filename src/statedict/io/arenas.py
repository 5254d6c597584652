"""Where in memory the bytes of storages come to lie when they are loaded: windows of files, packed into a few mappings.

The enemy of a load is not the copy but the page fault: 1 GiB in fresh pages of 4 KiB takes four times as long as in pages of
2 MiB. So memory is taken in anonymous mappings that begin at a huge page. A *window* is a run of a file as it is, from one page
to another, with the storages in it at the same distances: neighbours are read at once, and no byte is copied twice. A large
storage has a mapping of its own, which is given back with it; small ones share mappings of at most 2 MiB.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from statedict.errors import StateDictError
from statedict.io.ranges import merge

__all__ = ["PAGE_NBYTES", "Arena", "Piece", "Window", "aligned", "allocate", "plan_windows"]

PAGE_NBYTES = 4096
HUGE_NBYTES = 2 * 1024 * 1024
# Bytes between two storages that are read over: headers and padding between the entries of a zip.
_GAP = PAGE_NBYTES
# Where a window begins that has no page of its own: what torch aligns its own memory to.
_ALIGNMENT = 64


class Piece(NamedTuple):
    """Bytes of a file that are wanted: its number, from where, how many; and what their address must be a multiple of."""

    file: int
    offset: int
    nbytes: int
    alignment: int = 1


class Window(NamedTuple):
    """A run of a file, and the wanted pieces in it by their number with the place of each in the window, in bytes."""

    file: int
    offset: int
    nbytes: int
    members: tuple[tuple[int, int], ...]

    def extent(self, file_nbytes: int) -> int:
        """Bytes of the window that the file has: its last page may end behind the file."""
        return min(self.nbytes, file_nbytes - self.offset)


def plan_windows(pieces: Sequence[Piece]) -> list[Window]:
    """The windows that hold all pieces, in the order of the files. Pure: nothing is allocated.

    A piece whose offset doesn't suit its alignment gets a window that begins with it: in memory, it is aligned.
    """
    windows: list[Window] = []
    for file in sorted({piece.file for piece in pieces}):
        numbers = [number for number, piece in enumerate(pieces) if piece.file == file]
        aligned = [number for number in numbers if pieces[number].offset % pieces[number].alignment == 0]
        windows += [
            Window(file, pieces[number].offset, pieces[number].nbytes, ((number, 0),))
            for number in numbers
            if pieces[number].offset % pieces[number].alignment
        ]
        large = [number for number in aligned if pieces[number].nbytes >= HUGE_NBYTES]
        windows += [_paged(file, pieces, [number]) for number in large]
        small = [number for number in aligned if pieces[number].nbytes < HUGE_NBYTES]
        runs = merge([pieces[number][1:3] for number in small], gap=_GAP, most=HUGE_NBYTES - 2 * PAGE_NBYTES)
        windows += [_paged(file, pieces, [small[at] for at in run.members]) for run in runs]
    return sorted(windows)


def _paged(file: int, pieces: Sequence[Piece], numbers: Sequence[int]) -> Window:
    """The window from the page of the first piece to the page of the last."""
    start = min(pieces[number].offset for number in numbers)
    end = max(pieces[number].offset + pieces[number].nbytes for number in numbers)
    start -= start % PAGE_NBYTES
    end += -end % PAGE_NBYTES
    return Window(file, start, end - start, tuple((number, pieces[number].offset - start) for number in numbers))


class Arena:
    """One mapping, and the windows in it with the place of each in bytes from the start of ``memory``.

    ``memory`` is an anonymous private mapping: zeros until something is read into it. It is given back when nothing refers to it.
    """

    __slots__ = ("memory", "nbytes", "start", "windows")

    def __init__(self, windows: Sequence[tuple[Window, int]], nbytes: int, *, huge_pages: bool) -> None:
        self.windows = tuple(windows)
        self.nbytes = nbytes
        self.memory, self.start = _mapping(nbytes, huge_pages=huge_pages)

    def views(self) -> Iterator[tuple[Window, memoryview]]:
        """Each window and its bytes in the mapping."""
        whole = memoryview(self.memory)
        for window, place in self.windows:
            yield window, whole[self.start + place : self.start + place + window.nbytes]


def allocate(windows: Sequence[Window], *, huge_pages: bool) -> Iterator[Arena]:
    """The arenas of the windows: one for each large window, one for many small ones.

    Raises ``StateDictError`` where the system has no such memory.
    """
    pending: list[tuple[Window, int]] = []
    filled = 0
    for window in windows:
        if window.nbytes >= HUGE_NBYTES:
            yield Arena([(window, 0)], window.nbytes, huge_pages=huge_pages)
            continue
        # A window of whole pages stays one: it can be read past the page cache.
        filled += -filled % (_ALIGNMENT if window.nbytes % PAGE_NBYTES else PAGE_NBYTES)
        if filled + window.nbytes > HUGE_NBYTES:
            yield Arena(pending, filled, huge_pages=huge_pages)
            pending, filled = [], 0
        pending.append((window, filled))
        filled += window.nbytes
    if pending:
        yield Arena(pending, filled, huge_pages=huge_pages)


def aligned(nbytes: int) -> memoryview:
    """A buffer whose address is a multiple of that of a page, in huge pages where there are such."""
    memory, start = _mapping(nbytes, huge_pages=True)
    return memoryview(memory)[start : start + nbytes]


def _mapping(nbytes: int, *, huge_pages: bool) -> tuple[mmap.mmap, int]:
    """A mapping with that many bytes from ``start`` on, which is the beginning of a huge page if there is room for one."""
    huge = huge_pages and nbytes >= HUGE_NBYTES and hasattr(mmap, "MADV_HUGEPAGE")
    # The pages in front of the first huge one are never touched, so they take no memory.
    spare = HUGE_NBYTES if huge else 0
    try:
        memory = mmap.mmap(-1, max(1, nbytes + spare), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError) as error:
        hint = "Load a part of it (at=), or map the file (mmap=True)"
        raise StateDictError(f"the system has no memory for {nbytes:,} bytes", hint=hint) from error
    if not huge:
        return memory, 0
    start = -_address(memory) % HUGE_NBYTES
    try:
        memory.madvise(mmap.MADV_HUGEPAGE, start, nbytes - nbytes % HUGE_NBYTES)
    except OSError:
        pass  # a kernel without huge pages: slower, and nothing else
    return memory, start


def _address(memory: mmap.mmap) -> int:
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(memory))

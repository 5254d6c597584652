"""A file that is written under its own name, in a folder that nobody reads yet: how the files of a training step come to be.

Where ``durable.py`` gives a file its name last, here the folder around it is renamed last. The bytes take the same way: several
threads, past the page cache where that is the disk's own speed, digests in passing.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping

from statedict.errors import FileError
from statedict.io.assembly import Assembly
from statedict.io.durable import DurableFile, preallocate
from statedict.io.engine import AUTOMATIC, Engine, choose_writing
from statedict.io.plans import Sum, WritePlan
from statedict.io.writers import Writers

__all__ = ["NewFile"]


class NewFile(DurableFile):
    """A new file, made by ``create``; it stays when ``keep`` was called before ``discard``.

    ``shown`` is the path that errors name. Raises ``FileError`` as ``DurableFile`` does; a file that is there already is one.
    """

    def __init__(self, path: str, shown: str, nbytes: int) -> None:
        super().__init__(shown, overwrite=False, nbytes=nbytes)
        self._final = self._temporary = path

    def create(self) -> None:
        """Make the file, and reserve its room."""
        made = False
        try:
            self._fd = os.open(self._final, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            made = True
            if self.nbytes:
                preallocate(self._fd, self.nbytes)
        except OSError as error:
            if not made:
                self._temporary = ""  # it isn't ours
            self._discard()
            raise self._error(error) from error

    def fill(
        self,
        plan: WritePlan,
        *,
        engine: Engine = AUTOMATIC,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Mapping[str, Sum]:
        """Write the plan; gives the sums of its payloads. The threads have ended when this returns or raises."""
        writing = choose_writing(os.path.dirname(self._final), plan.nbytes, engine)
        direct = writing.direct and self.open_direct()
        with Writers(self, writing, direct=direct) as writers:
            assembly = Assembly(plan, writers, on_progress=on_progress)
            assembly.run()
        for offset, later in assembly.unwritten:
            self.write_at(offset, [assembly.rendered(later)])
        if os.fstat(self._fd).st_size != plan.nbytes:
            raise FileError("can't be written: the file has another size now", errno=errno.EIO, path=self.path)
        return assembly.sums

    def fsync(self) -> bool:
        """Have the bytes on the disk; once. False where the file system has no such thing."""
        try:
            self._sync(self._fd)
        except OSError as error:
            raise self._error(error) from error
        return self.durable

    def keep(self) -> None:
        """Close the file, which stays."""
        try:
            self._close_file()
        except OSError as error:
            raise self._error(error) from error
        self._temporary = ""

    def discard(self) -> None:
        """Close and remove the file, unless it was kept."""
        self._discard()

"""A disk that refuses: whatever fails, and wherever a process is killed, the steps before stay, and nothing is left of the new one."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest

from statedict.checkpoint import of_memory
from statedict.errors import StateDictError
from statedict.runs.pieces import Captured
from statedict.runs.policies import Latest
from statedict.runs.run import RunFolder
from statedict.runs.storage import LocalStorage

# Of a failed save: bytes that may be left, the owner's file among them.
MOST_LEFT = 4096
# What a save does to the disk; what only looks is left out.
DEEDS = (
    "open_new", "mkdir", "rename", "rename_noreplace", "link", "unlink", "rmdir", "fsync_folder",
    "fill", "fsync", "keep",
)  # fmt: skip


class Faulty(LocalStorage):
    """The file system of this machine, which does something else at the deed of that number: fails, once, or ends the process."""

    def __init__(self, at: int = -1, number: int = 0) -> None:
        super().__init__()
        self.at = at
        self.number = number
        self.deeds: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        return self.guarded(name, found) if name in DEEDS else found

    def guarded(self, name: str, deed: Any) -> Any:
        def do(*arguments: Any, **more: Any) -> Any:
            self.deeds.append(name)
            if len(self.deeds) - 1 == self.at:
                if not self.number:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError(self.number, os.strerror(self.number))
            made = deed(*arguments, **more)
            return FaultyFile(self, made) if name == "open_new" else made

        return do


class FaultyFile:
    def __init__(self, storage: Faulty, file: Any) -> None:
        self._storage = storage
        self._file = file

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._file, name)
        return self._storage.guarded(name, found) if name in DEEDS else found


def captured(step: int) -> Captured:
    model = {"w": numpy.full(3000, step, "float32")}
    return Captured({"frozen": of_memory({"w": numpy.ones(9)}), "model": of_memory(model)}, {"step": step})


def prepared(folder: Path) -> RunFolder:
    """A run with two steps; the next save deletes the first of them."""
    run = RunFolder(folder, keep=Latest(2), storage=Faulty())
    run.write(1, captured(1))
    run.write(2, captured(2))
    return run


def storage_of(run: RunFolder) -> Faulty:
    storage = run.catalogue.storage
    assert isinstance(storage, Faulty)
    return storage


def deeds_of_a_save(folder: Path) -> list[str]:
    run = prepared(folder)
    storage = storage_of(run)
    storage.deeds.clear()
    run.write(3, captured(3))
    run.close()
    return list(storage.deeds)


def left_in(folder: Path) -> int:
    """Bytes in everything but the steps that the run knows."""
    return sum(
        path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.parent.name.startswith("step-")
    )


def whole(folder: Path) -> list[int]:
    """The steps, each of which must be whole."""
    with RunFolder(folder) as run:
        found = run.verify()
        assert found.ok, str(found)
        opened = run.open_step()
        assert opened is not None and opened.step == found.steps[-1].step
        with opened:
            assert [float(opened.step)] * 3000 == opened.piece("model")["w"].numpy().tolist()
        return [step.step for step in found.steps]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EMFILE, errno.EROFS, errno.EDQUOT])
def test_a_refusal_at_any_point_leaves_the_steps_before_and_nothing_else(tmp_path: Path, number: int) -> None:
    deeds = deeds_of_a_save(tmp_path / "sample")
    committed = deeds.index("rename_noreplace") + 2
    for at in range(len(deeds)):
        folder = tmp_path / f"run-{at}"
        run = prepared(folder)
        storage = storage_of(run)
        storage.deeds.clear()
        storage.at, storage.number = at, number
        try:
            written = run.write(3, captured(3))
        except StateDictError as error:
            assert at < committed, f"a durable step was called failed because of {deeds[at]}"
            assert (number, True) == (error.errno, str(folder) in str(error.path))  # type: ignore[attr-defined]
            assert left_in(folder) <= MOST_LEFT, deeds[at]
            assert [1, 2] == whole(folder)
        else:
            assert at >= committed or deeds[at] == "link", f"the failure of {deeds[at]} was passed over"
            assert at < committed or written.notes or deeds[at] in ("unlink", "rmdir")
            assert 3 == whole(folder)[-1]
        assert storage.deeds.count("fsync") <= deeds.count("fsync")
        storage.at = -1
        run.write(4, captured(4))
        run.close()
        assert 4 == whole(folder)[-1]
        assert left_in(folder) <= MOST_LEFT


def test_a_failed_fsync_is_never_made_again_on_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = os.fsync, []

    def refuse(fd: int) -> None:
        seen.append(os.readlink(f"/proc/self/fd/{fd}"))
        if seen[-1].endswith("model.safetensors"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    with RunFolder(tmp_path / "run") as run:
        monkeypatch.setattr(os, "fsync", refuse)
        with pytest.raises(StateDictError, match="model.safetensors.*can't be"):  # noqa: RUF043
            run.write(1, captured(1))

    assert 1 == sum(path.endswith("model.safetensors") for path in seen)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_kill_at_any_point_leaves_whole_steps_only(tmp_path: Path) -> None:
    deeds = deeds_of_a_save(tmp_path / "sample")
    committed = deeds.index("rename_noreplace") + 1
    for at in range(len(deeds)):
        folder = tmp_path / f"run-{at}"
        prepared(folder).close()
        child = os.fork()
        if not child:
            run = RunFolder(folder, keep=Latest(2), storage=Faulty(at))
            run.verify(2)
            storage_of(run).deeds.clear()
            try:
                run.write(3, captured(3))
            finally:
                os._exit(1)

        assert -signal.SIGKILL == os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), deeds[at]
        assert (3 if at >= committed else 2) == whole(folder)[-1], deeds[at]
        with RunFolder(folder, keep=Latest(2)) as run:
            run.write(4, captured(4))
            assert [".lock"] == [name for name in sorted(os.listdir(folder)) if name.startswith(".")], deeds[at]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], check=False).returncode
    ):
        pytest.skip("a file system can't be mounted here")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_is_said_before_and_while_it_is_written(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = Captured({"model": of_memory({"w": numpy.ones(1 << 20, "uint8")})})
    with RunFolder(small / "run") as run:
        run.write(1, captured(1))
        with pytest.raises(StateDictError, match="isn't room.*expected 1.31 MB free") as early:  # noqa: RUF043
            run.write(2, large)
        monkeypatch.setattr(run.catalogue.storage, "free_nbytes", lambda path: None)
        for nbytes in range(64 * 1024, 1024 * 1024, 256 * 1024):
            with open(small / "ballast", "wb") as ballast:
                ballast.truncate(0)
                os.posix_fallocate(ballast.fileno(), 0, nbytes)
            with pytest.raises(StateDictError) as late:
                run.write(2, large)

            assert (errno.ENOSPC, errno.ENOSPC) == (early.value.errno, late.value.errno)  # type: ignore[attr-defined]
            assert left_in(small / "run") <= MOST_LEFT
        os.unlink(small / "ballast")

    assert [1] == whole(small / "run")


@pytest.mark.parametrize("number", [errno.EMLINK, errno.EPERM, errno.ENOTSUP, errno.EXDEV])
def test_where_there_are_no_links_the_file_is_written(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared(tmp_path / "run")

    def refuse(old: str, new: str) -> None:
        raise OSError(number, os.strerror(number), new)

    monkeypatch.setattr(os, "link", refuse)

    assert 0 == run.write(3, captured(3)).linked_nbytes
    run.close()
    assert [2, 3] == whole(tmp_path / "run")


def test_writes_that_the_system_cuts_short_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, offset: real(fd, [memoryview(buffers[0])[:777]], offset))
    with RunFolder(tmp_path / "run") as run:
        run.write(1, captured(1))

    assert [1] == whole(tmp_path / "run")


def test_a_save_can_wait_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([0, 0, 1 << 30])
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with RunFolder(tmp_path / "run", wait_for_space_s=60) as run:
        monkeypatch.setattr(run.catalogue.storage, "free_nbytes", lambda path: next(answers))

        assert run.write(1, captured(1)).durable

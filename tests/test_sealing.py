"""Folders that others have written: sealed where they lie, found out when they change, and deleted last."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from statedict.errors import CorruptFile, FileError, RunError, Uncommitted, Unsupported
from statedict.runs import Best, Latest
from statedict.runs.sealed_folders import SealedFolders, make_folders
from statedict.runs.sealing import SEAL_NAME, check_sealed, read_seal, seal

FILES = {"model.bin": b"weights" * 999, "trainer.json": b"{}", "shards/0/rank.pt": b"rank", "empty": b""}


def write(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_all(folder: Path, *numbers: int, keep: Any = None) -> SealedFolders:
    """Sealed checkpoints of these numbers."""
    found = SealedFolders(folder, "checkpoint-", keep=keep)
    for number in numbers:
        write(folder / f"checkpoint-{number}")
        found.seal(number, metrics={"eval_loss": 1 / number})
    return found


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# -------------------------------------------------------------------- one folder


def test_a_seal_lists_every_file_with_its_size_and_says_what_it_was_given(tmp_path: Path) -> None:
    made = seal(write(tmp_path / "c"), step=7, metrics={"loss": 0.5, "nan": float("inf")})
    found = read_seal(tmp_path / "c")

    assert ({name: len(data) for name, data in FILES.items()}, 7, {"loss": 0.5, "nan": float("inf")}) == (
        {name: file.nbytes for name, file in found.files.items()},
        found.step,
        found.metrics,
    )
    assert (made.files, made.durable) == (found.files, True)


def test_a_sealed_folder_is_as_it_was_sealed(tmp_path: Path) -> None:
    seal(write(tmp_path / "c"))
    check = check_sealed(tmp_path / "c")

    assert ((), ()) == (check.errors, check.findings)


def test_a_bit_that_changes_in_any_file_is_found(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", {"a": b"some bytes", "b/c": b"others"})
    seal(folder)
    missed = []
    for name in ("a", "b/c", SEAL_NAME):
        data = (folder / name).read_bytes()
        for bit in range(0, 8 * len(data), 9 if name == SEAL_NAME else 1):
            changed = bytearray(data)
            changed[bit // 8] ^= 1 << bit % 8
            (folder / name).write_bytes(changed)
            try:
                if not check_sealed(folder).errors:
                    missed.append((name, bit))
            except CorruptFile:
                pass
        (folder / name).write_bytes(data)

    assert [] == missed


def test_every_length_that_a_file_is_cut_to_is_found(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", {"a": b"some bytes"})
    seal(folder)
    missed = []
    for name in ("a", SEAL_NAME):
        data = (folder / name).read_bytes()
        for length in range(len(data)):
            (folder / name).write_bytes(data[:length])
            try:
                if not check_sealed(folder).errors:
                    missed.append((name, length))
            except CorruptFile:
                pass
        (folder / name).write_bytes(data)

    assert [] == missed


def remove(path: Path) -> None:
    path.unlink()


def replace_by_a_link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def replace_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("change", "what"), [(remove, "missing"), (replace_by_a_link, "something else"), (replace_by_a_folder, "missing")]
)
def test_a_file_that_is_gone_or_something_else_is_found(tmp_path: Path, change: Any, what: str) -> None:
    folder = write(tmp_path / "c")
    seal(folder)
    change(folder / "model.bin")

    assert [True] == [what in str(error) for error in check_sealed(folder).errors]


def test_what_nobody_sealed_is_said_and_no_damage(tmp_path: Path) -> None:
    folder = write(tmp_path / "c")
    seal(folder)
    (folder / "notes.txt").write_text("mine")
    check = check_sealed(folder)

    assert ((), ["not part of what was sealed: notes.txt"]) == (
        check.errors,
        [finding.message for finding in check.findings],
    )


def test_a_seal_can_be_made_anew(tmp_path: Path) -> None:
    folder = write(tmp_path / "c")
    seal(folder, step=1)
    (folder / "model.bin").write_bytes(b"other weights")
    seal(folder, step=2)

    assert ((), 2) == (check_sealed(folder).errors, read_seal(folder).step)


def test_a_folder_without_a_seal_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        Uncommitted, match=r"never sealed, and may be half written\. If you know that it is whole, seal it"
    ):
        check_sealed(write(tmp_path / "c"))


def test_a_link_is_not_sealed(tmp_path: Path) -> None:
    folder = write(tmp_path / "c")
    (folder / "shards" / "last").symlink_to("0")
    with pytest.raises(Unsupported, match="'shards/last' is neither a file nor a folder"):
        seal(folder)

    assert not (folder / SEAL_NAME).exists()


def test_a_folder_that_is_not_there_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="can't be sealed"):
        seal(tmp_path / "none")


def test_a_folder_that_changes_meanwhile_is_not_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "c")
    fsync = os.fsync

    def write_on(fd: int) -> None:
        fsync(fd)
        (folder / "late.bin").write_bytes(b"a writer that isn't done")

    monkeypatch.setattr(os, "fsync", write_on)
    with pytest.raises(RunError, match="changes while it is being sealed"):
        seal(folder)

    assert not (folder / SEAL_NAME).exists()


def test_all_is_on_the_disk_before_the_seal_has_its_name_and_that_is_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "c")
    before, after = set[str](), set[str]()
    fsync = os.fsync

    def noted(fd: int) -> None:
        where = after if (folder / SEAL_NAME).exists() else before
        where.add(os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), tmp_path))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", noted)
    seal(folder)
    written = {f"c/{name}" for name in FILES} | {"c/shards", "c/shards/0", "."}

    assert (set(), {"c"}) == (written - before, after)
    assert 1 == len(before - written), "the seal itself, before it has its name"


@pytest.mark.parametrize("number", range(1, 10))
def test_no_fsync_that_fails_leaves_a_seal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    folder = write(tmp_path / "c")
    fsync, count = os.fsync, [0]

    def failing(fd: int) -> None:
        count[0] += 1
        if count[0] == number:
            raise OSError(5, "Input/output error")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(FileError, match="Input/output error"):
        seal(folder)

    assert not (folder / SEAL_NAME).exists()


# -------------------------------------------------------------------- several of them


def test_the_newest_is_the_one_of_the_highest_number(tmp_path: Path) -> None:
    found = write_all(tmp_path, 9, 100, 20).newest()

    assert found is not None
    assert (100, str(tmp_path / "checkpoint-100")) == (found.step, found.path)


def test_where_nothing_was_ever_sealed_there_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "checkpoint-5")
    write(tmp_path / "checkpoint-05")
    write(tmp_path / "checkpoint-5-old")
    folders = SealedFolders(tmp_path, "checkpoint-")

    assert (None, [5]) == (folders.newest(), folders.numbers())
    assert "checkpoint-5 is passed over" in capsys.readouterr().err
    assert SealedFolders(tmp_path / "none", "checkpoint-").newest() is None


def test_a_damaged_one_is_set_aside_and_the_one_before_taken_loudly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = write_all(tmp_path, 1, 2, 3)
    (tmp_path / "checkpoint-3" / "trainer.json").write_bytes(b"[]")
    found = folders.newest()

    assert found is not None
    assert (2, [3], ["checkpoint-1", "checkpoint-2", "checkpoint-3.damaged"]) == (
        found.step,
        [fallen.step for fallen in folders.fell_back],
        names(tmp_path),
    )
    said = capsys.readouterr().err

    assert "checkpoint-3 is passed over, and is called checkpoint-3.damaged from now on" in said
    assert "trainer.json: the file isn't as it was sealed: its digest differs" in said


def test_a_half_written_one_is_passed_over_loudly_and_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = write_all(tmp_path, 1)
    write(tmp_path / "checkpoint-2", {"model.bin": b"half"})
    found = folders.newest()

    assert found is not None
    assert (1, ["checkpoint-1", "checkpoint-2"]) == (found.step, names(tmp_path))
    assert "checkpoint-2 is passed over" in capsys.readouterr().err


def test_where_all_are_damaged_it_raises_now_and_the_next_time(tmp_path: Path) -> None:
    folders = write_all(tmp_path, 1, 2)
    for number in (1, 2):
        (tmp_path / f"checkpoint-{number}" / "model.bin").unlink()
    for _ in range(2):
        with pytest.raises(RunError, match="none of them is whole"):
            folders.newest()


def test_what_the_system_refuses_is_no_damage(tmp_path: Path) -> None:
    folders = write_all(tmp_path, 1, 2)
    if os.geteuid() == 0:
        (tmp_path / "checkpoint-2" / SEAL_NAME).unlink()
        (tmp_path / "checkpoint-2" / SEAL_NAME).symlink_to(SEAL_NAME)  # a circle
    else:
        (tmp_path / "checkpoint-2" / SEAL_NAME).chmod(0)
    with pytest.raises(OSError, match="can't be opened"):
        folders.newest()

    assert ["checkpoint-1", "checkpoint-2"] == names(tmp_path)


@pytest.mark.parametrize(
    ("keep", "left"),
    [(None, [1, 2, 3, 4]), (2, [3, 4]), (Latest(1), [4]), (Latest(1) | Best("eval_loss", mode="max"), [1, 4])],
)
def test_what_is_not_kept_is_deleted(tmp_path: Path, keep: Any, left: list[int]) -> None:
    folders = write_all(tmp_path, 1, 2, 3, 4, keep=keep)
    folders.prune()

    assert [f"checkpoint-{number}" for number in left] == names(tmp_path)


def test_the_spared_and_those_without_a_seal_stay(tmp_path: Path) -> None:
    folders = write_all(tmp_path, 2, 3, 4, keep=1)
    write(tmp_path / "checkpoint-1")
    gone = folders.prune(spare=[str(tmp_path / "checkpoint-3")])

    assert ([2], ["checkpoint-1", "checkpoint-3", "checkpoint-4"]) == ([step.step for step in gone], names(tmp_path))


def test_the_last_whole_one_is_not_deleted(tmp_path: Path) -> None:
    write_all(tmp_path, 1, 2)
    (tmp_path / "checkpoint-2" / "model.bin").write_bytes(b"weights?")
    gone = SealedFolders(tmp_path, "checkpoint-", keep=1).prune()

    assert ([], ["checkpoint-1", "checkpoint-2"]) == (gone, names(tmp_path))


def test_what_a_killed_process_was_deleting_is_swept(tmp_path: Path) -> None:
    folders = write_all(tmp_path, 1, 2, keep=1)
    write(tmp_path / ".trash-checkpoint-0-0123456789abcdef")
    write(tmp_path / ".trash-of-somebody")
    folders.prune()

    assert [".trash-of-somebody", "checkpoint-2"] == names(tmp_path)


def test_its_name_is_off_the_disk_before_a_file_of_it_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = write_all(tmp_path, 1, 2, keep=1)
    seen: list[list[str]] = []
    fsync, rmtree = os.fsync, shutil.rmtree

    def noted(fd: int) -> None:
        fsync(fd)
        seen.append(["synced", *[name[:9] for name in names(tmp_path)]])

    def removed(*args: Any, **options: Any) -> None:
        seen.append(["removed"])
        rmtree(*args, **options)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(shutil, "rmtree", removed)
    folders.prune()

    assert [["synced", ".trash-ch", "checkpoin"], ["removed"]] == seen


def test_folders_are_made_with_those_above_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def noted(fd: int) -> None:
        synced.append(os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), tmp_path))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", noted)
    make_folders(str(tmp_path / "a" / "b"))
    make_folders(str(tmp_path / "a"))

    assert ([".", "a"], True) == (synced, (tmp_path / "a" / "b").is_dir())


def test_a_folder_that_cannot_be_made_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RunError, match="can't be made"):
        make_folders(str(tmp_path / "file" / "folder"))

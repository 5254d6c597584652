"""What a failure at any step of a write leaves behind: the old file as it was, and nothing else."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from statedict.errors import FileError, TargetExists
from statedict.io import temporaries
from statedict.io.durable import DurableFile, check_target, write_bytes

OLD = b"the old file"
NEW = b"the new file, which is longer"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "model.pth"
    path.write_bytes(OLD)
    return path


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def fail(monkeypatch: pytest.MonkeyPatch, name: str, number: int, at: int = 1) -> None:
    """Let the ``at``-th call of that function of ``os`` fail with the errno."""
    real = getattr(os, name)
    calls = 0

    def failing(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == at:
            raise OSError(number, os.strerror(number), "the temporary's name")
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, failing)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_bytes_arrive_and_nothing_else(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a.pth", NEW, overwrite=False)

    assert NEW == (tmp_path / "a.pth").read_bytes()
    assert ["a.pth"] == names(tmp_path)


def test_an_empty_file_can_be_written(tmp_path: Path) -> None:
    write_bytes(tmp_path / "empty", b"", overwrite=False)

    assert b"" == (tmp_path / "empty").read_bytes()


def test_a_file_that_is_there_is_not_replaced_unasked(target: Path) -> None:
    with pytest.raises(TargetExists) as caught:
        write_bytes(target, NEW, overwrite=False)

    assert errno.EEXIST == caught.value.errno
    assert str(target) == caught.value.path
    assert OLD == target.read_bytes()
    assert ["model.pth"] == names(target.parent)


def test_a_file_that_is_there_is_replaced_when_asked(target: Path) -> None:
    write_bytes(target, NEW, overwrite=True)

    assert NEW == target.read_bytes()
    assert ["model.pth"] == names(target.parent)


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_appears_meanwhile_is_never_clobbered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:
        fail(monkeypatch, "link", errno.EPERM)
    path = tmp_path / "model.pth"

    with pytest.raises(TargetExists), DurableFile(path, overwrite=False, nbytes=len(NEW)) as file:
        file.write_at(0, [NEW])
        path.write_bytes(OLD)

    assert OLD == path.read_bytes()
    assert ["model.pth"] == names(tmp_path)


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_file_system_without_hard_links_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    fail(monkeypatch, "link", errno.EPERM)
    if overwrite:
        (tmp_path / "model.pth").write_bytes(OLD)
    write_bytes(tmp_path / "model.pth", NEW, overwrite=overwrite)

    assert NEW == (tmp_path / "model.pth").read_bytes()
    assert ["model.pth"] == names(tmp_path)


def test_a_name_claimed_without_links_is_given_back_when_the_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, "link", errno.EPERM)
    fail(monkeypatch, "replace", errno.EIO)
    with pytest.raises(FileError):
        write_bytes(tmp_path / "model.pth", NEW, overwrite=False)

    assert [] == names(tmp_path)


@pytest.mark.parametrize("overwrite", [True, False])
def test_file_is_synced_before_the_rename_and_the_folder_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    calls: list[str] = []

    def record(name: str, describe: Callable[..., str]) -> None:
        real = getattr(os, name)

        def recording(*args: object, **kwargs: object) -> object:
            calls.append(describe(*args))
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, recording)

    def is_folder(fd: int) -> bool:
        return stat.S_ISDIR(os.fstat(fd).st_mode)

    record("pwritev", lambda *_: "write")
    record("fsync", lambda fd: "fsync folder" if is_folder(fd) else "fsync file")
    record("replace", lambda *_: "replace")
    record("link", lambda source, _: "keep old" if str(source).endswith("model.pth") else "link")
    record("unlink", lambda *_: "unlink")
    if overwrite:
        (tmp_path / "model.pth").write_bytes(OLD)
    write_bytes(tmp_path / "model.pth", NEW, overwrite=overwrite)
    expected = {
        True: ["write", "fsync file", "keep old", "replace", "fsync folder", "unlink"],
        False: ["write", "fsync file", "link", "unlink", "fsync folder"],
    }

    assert expected[overwrite] == calls


def test_without_durability_nothing_is_synced(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, "fsync", errno.EIO)
    with DurableFile(target, overwrite=True, durable=False) as file:
        file.write_at(0, [NEW])
        file.write_back()

    assert NEW == target.read_bytes()
    assert not file.durable


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize(
    ("call", "at"),
    # The first to be opened is the folder. Closing tells of late write errors on network file systems.
    [("open", 1), ("open", 2), ("posix_fallocate", 1), ("pwritev", 1), ("fsync", 1), ("fsync", 2), ("close", 1)],
)
def test_a_refusal_of_the_system_leaves_the_folder_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, at: int, number: int, overwrite: bool
) -> None:
    path = tmp_path / "model.pth"
    if overwrite:
        path.write_bytes(OLD)
    before = names(tmp_path)
    fail(monkeypatch, call, number, at)
    with pytest.raises(FileError) as caught:
        write_bytes(path, NEW, overwrite=overwrite)
    monkeypatch.undo()

    assert number == caught.value.errno
    assert str(path) == caught.value.path
    assert "statedict-tmp" not in str(caught.value)
    assert before == names(tmp_path)
    assert not overwrite or OLD == path.read_bytes()


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_a_rename_that_fails_leaves_the_old_file(target: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    fail(monkeypatch, "replace", number)
    with pytest.raises(FileError) as caught:
        write_bytes(target, NEW, overwrite=True)

    assert number == caught.value.errno
    assert OLD == target.read_bytes()
    assert ["model.pth"] == names(target.parent)


def test_a_failed_folder_sync_says_so_where_the_old_file_could_not_be_kept(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, "link", errno.EPERM)
    fail(monkeypatch, "fsync", errno.EIO, at=2)
    with pytest.raises(FileError, match="complete and in its place"):
        write_bytes(target, NEW, overwrite=True)

    assert NEW == target.read_bytes()
    assert ["model.pth"] == names(target.parent)


def test_a_failed_sync_is_not_tried_again(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def failing(fd: int) -> None:
        calls.append(fd)
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(FileError):
        write_bytes(target, NEW, overwrite=True)

    assert 1 == len(calls)


def test_a_folder_that_can_not_be_synced_is_no_error_but_is_said(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, "fsync", errno.EINVAL, at=2)
    with DurableFile(target, overwrite=True) as file:
        file.write_at(0, [NEW])

    assert not file.durable
    assert NEW == target.read_bytes()


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit, ValueError])
def test_an_exception_in_the_block_passes_and_leaves_nothing(target: Path, interrupt: type[BaseException]) -> None:
    with pytest.raises(interrupt), DurableFile(target, overwrite=True) as file:
        file.write_at(0, [NEW])
        raise interrupt

    assert OLD == target.read_bytes()
    assert ["model.pth"] == names(target.parent)


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize(("call", "at"), [("posix_fallocate", 1), ("fsync", 1), ("fsync", 2)])
def test_ctrl_c_at_any_step_leaves_the_folder_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool, call: str, at: int
) -> None:
    real = getattr(os, call)
    calls = 0

    def interrupted(*args: object) -> None:
        nonlocal calls
        calls += 1
        real(*args)
        if calls == at:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, call, interrupted)
    path = tmp_path / "model.pth"
    if overwrite:
        path.write_bytes(OLD)
    before = names(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(path, NEW, overwrite=overwrite)

    assert before == names(tmp_path)
    assert not overwrite or OLD == path.read_bytes()


def test_no_descriptor_stays_open(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    write_bytes(target, NEW, overwrite=True)
    fail(monkeypatch, "fsync", errno.EIO)
    with pytest.raises(FileError):
        write_bytes(target, NEW, overwrite=True)
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0

    assert before == after


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, parts, at: real(fd, [parts[0][: max(1, len(parts[0]) // 2)]], at))
    with DurableFile(tmp_path / "a", overwrite=False) as file:
        file.write_at(2, [b"cdefgh", memoryview(b""), b"ijk"])
        file.write_at(0, [b"ab"])

    assert b"abcdefghijk" == (tmp_path / "a").read_bytes()


def test_a_write_that_takes_nothing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwritev", lambda fd, parts, at: 0)
    with pytest.raises(FileError):
        write_bytes(tmp_path / "a", NEW, overwrite=False)

    assert [] == names(tmp_path)


def test_more_buffers_than_one_call_takes_are_all_written(tmp_path: Path) -> None:
    with DurableFile(tmp_path / "a", overwrite=False) as file:
        file.write_at(0, [b"%04d" % i for i in range(3000)])

    assert b"".join(b"%04d" % i for i in range(3000)) == (tmp_path / "a").read_bytes()


def test_the_mode_follows_the_umask(tmp_path: Path, umask: Callable[[int], int]) -> None:
    umask(0o027)
    write_bytes(tmp_path / "a", NEW, overwrite=False)

    assert 0o640 == mode_of(tmp_path / "a")


@pytest.mark.parametrize("mode", [0o600, 0o664, 0o444])
def test_a_file_replaced_keeps_its_mode(target: Path, mode: int, umask: Callable[[int], int]) -> None:
    target.chmod(mode)
    write_bytes(target, NEW, overwrite=True)

    assert mode == mode_of(target)
    assert NEW == target.read_bytes()


def test_a_link_stays_a_link_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    real = tmp_path / "store" / "blob"
    real.write_bytes(OLD)
    link = tmp_path / "model.pth"
    link.symlink_to("store/blob")
    write_bytes(link, NEW, overwrite=True)

    assert "store/blob" == os.readlink(link)
    assert NEW == real.read_bytes()
    assert ["blob"] == names(tmp_path / "store")


def test_a_link_to_nothing_makes_the_file_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("later")
    write_bytes(tmp_path / "link", NEW, overwrite=False)

    assert (tmp_path / "link").is_symlink()
    assert NEW == (tmp_path / "later").read_bytes()


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(FileError) as caught:
        check_target(tmp_path / "loop", overwrite=True)

    assert errno.ELOOP == caught.value.errno


def test_a_missing_folder_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="Make the folder first") as caught:
        write_bytes(tmp_path / "no" / "a.pth", NEW, overwrite=True)

    assert errno.ENOENT == caught.value.errno


@pytest.mark.parametrize("name", ["", "sub", "sub/", "sub/..", "file/a", "a\0b", "n" * 256, "pipe"])
def test_what_can_not_be_a_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "file").write_bytes(OLD)
    os.mkfifo(tmp_path / "pipe")
    before = names(tmp_path)
    with pytest.raises(FileError) as caught:
        write_bytes(f"{tmp_path}/{name}", NEW, overwrite=True)

    assert caught.value.errno
    assert before == names(tmp_path)


def test_a_device_is_not_replaced_by_a_file() -> None:
    with pytest.raises(FileError):
        check_target("/dev/null", overwrite=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_an_error_at_once(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(FileError) as caught:
        write_bytes(tmp_path / "a", NEW, overwrite=False)
    tmp_path.chmod(0o755)

    assert errno.EACCES == caught.value.errno


@pytest.mark.parametrize("name", ["n" * 255, "é" * 127, "a" + "é" * 127, "日" * 85])
def test_the_longest_names_can_be_written(tmp_path: Path, name: str) -> None:
    write_bytes(tmp_path / name, NEW, overwrite=False)

    assert [name] == names(tmp_path)
    assert 255 >= len(os.fsencode(temporaries.backup_name(temporaries.temporary_name(name))))


def leave_behind(folder: Path, name: str) -> Path:
    """A temporary of a process that was killed while it wrote."""
    script = (
        "import os, sys; from statedict.io.durable import DurableFile\n"
        "with DurableFile(sys.argv[1], overwrite=True) as f:\n"
        "    f.write_at(0, [b'x' * 100]); os.kill(os.getpid(), 9)"
    )
    before = set(names(folder))
    done = subprocess.run([sys.executable, "-c", script, str(folder / name)], check=False)
    assert -signal.SIGKILL == done.returncode
    (left,) = set(names(folder)) - before
    return folder / left


def test_a_killed_writer_leaves_one_temporary_which_the_next_one_removes(target: Path) -> None:
    leave_behind(target.parent, target.name)
    left = names(target.parent)
    write_bytes(target, NEW, overwrite=True)

    assert 2 == len(left)
    assert ["model.pth"] == names(target.parent)


@pytest.mark.parametrize("name", ["model", "model.pth.x", "pth", "n" * 255])
def test_the_temporaries_of_other_targets_are_left_alone(tmp_path: Path, name: str) -> None:
    left = leave_behind(tmp_path, name)
    write_bytes(tmp_path / "model.pth", NEW, overwrite=True)
    write_bytes(tmp_path / ("n" * 254 + "m"), NEW, overwrite=True)

    assert left.exists()


def test_the_temporary_of_a_living_writer_is_left_alone(target: Path) -> None:
    with DurableFile(target, overwrite=True) as first:
        first.write_at(0, [NEW])
        (temporary,) = set(names(target.parent)) - {"model.pth"}
        os.utime(target.parent / temporary, (0, 0))
        write_bytes(target, b"another", overwrite=True)

    assert NEW == target.read_bytes()
    assert ["model.pth"] == names(target.parent)


@pytest.mark.parametrize(("age", "expected"), [(0, True), (3600, False)])
def test_a_living_number_protects_an_unlocked_temporary_for_a_minute(target: Path, age: int, expected: bool) -> None:
    left = target.parent / temporaries.temporary_name(target.name)
    left.write_bytes(b"x")
    now = left.stat().st_mtime
    os.utime(left, (now - age, now - age))
    write_bytes(target, NEW, overwrite=True)

    assert expected == left.exists()


def test_a_link_or_folder_with_the_name_of_a_temporary_is_left_alone(target: Path) -> None:
    link = target.parent / ".model.pth.999999999-0123456789abcdef.statedict-tmp"
    link.symlink_to("model.pth")
    folder = target.parent / ".model.pth.999999999-fedcba9876543210.statedict-tmp"
    folder.mkdir()
    write_bytes(target, NEW, overwrite=True)

    assert link.is_symlink()
    assert folder.is_dir()


def test_memory_file_systems_will_do() -> None:
    if not os.path.isdir("/dev/shm"):
        pytest.skip("no /dev/shm")
    path = f"/dev/shm/statedict-test-{os.getpid()}"
    try:
        write_bytes(path, NEW, overwrite=False)

        assert NEW == Path(path).read_bytes()
    finally:
        os.unlink(path)


def test_a_full_disk_is_reported_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(mount)], check=False, capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("may not mount")
    monkeypatch.setattr(os, "pwritev", lambda *_: pytest.fail("written"))
    try:
        with pytest.raises(FileError, match="100000 bytes") as caught:
            write_bytes(mount / "a", bytes(100_000), overwrite=False)

        assert errno.ENOSPC == caught.value.errno
        assert [] == names(mount)
    finally:
        subprocess.run(["umount", str(mount)], check=True)

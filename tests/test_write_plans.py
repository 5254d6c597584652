"""A plan comes out as the very bytes that it names, whatever is in the way, or not at all."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import signal
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import xxhash

from statedict.errors import CorruptFile, FileError, TargetExists
from statedict.io import assembly, durable, engine, writers
from statedict.io.plans import FileSource, Later, Literal, MemorySource, Payload, Segment, Source, Sum, WritePlan
from statedict.io.ranges import File, LocalFile, MemoryFile
from statedict.io.writers import execute, execute_to_stream

MIB = 1024 * 1024


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield

    assert not [thread for thread in threading.enumerate() if thread.name == "statedict-writer"]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 1 KiB, so that a plan of a few KiB takes every turn that one of a few GiB does."""
    monkeypatch.setattr(assembly, "BLOCK_NBYTES", 1024)
    monkeypatch.setattr(assembly, "_SMALL", 64)
    monkeypatch.setattr(assembly, "_LARGE", 700)
    monkeypatch.setattr(assembly, "_WINDOW", 512)
    monkeypatch.setattr(writers, "BLOCK_NBYTES", 1024)
    monkeypatch.setattr(writers, "_COPY_NBYTES", 2048)
    monkeypatch.setattr(engine, "BLOCK_NBYTES", 1024)
    monkeypatch.setattr(engine, "_WRITE_BACK_NBYTES", 4096)


class Failing:
    """A source whose ``at``-th range can't be read."""

    def __init__(self, at: int, error: BaseException) -> None:
        self.left = at
        self.error = error

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.left -= 1
        if self.left <= 0:
            raise self.error
        buffer[:] = bytes(len(buffer))

    def extent(self) -> None:
        return None


class Computed:
    """A source of bytes that lie nowhere."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.data[offset : offset + len(buffer)]

    def extent(self) -> None:
        return None


def noise(nbytes: int, seed: int = 0) -> bytes:
    return hashlib.shake_128(b"%d" % seed).digest(nbytes)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def digests(nbytes: int) -> Later:
    """All digests, one after the other, filled up to the size."""
    return Later(nbytes, lambda sums: "".join(s.digest or "-" for s in sums.values()).encode().ljust(nbytes, b" "))


def local_header(key: str) -> Later:
    """What a zip has before its entry: the CRC of the bytes that follow."""
    return Later(4, lambda sums: (sums[key].crc or 0).to_bytes(4, "little"), (key,))


def expected_bytes(segments: list[Segment], sums: Mapping[str, Sum]) -> bytes:
    """The file as the plan says it, put together in the plainest way."""
    out = bytearray()
    for segment in segments:
        if isinstance(segment, Payload):
            part = bytearray(segment.nbytes)
            segment.source.read_into(0, memoryview(part))
            out += part
        else:
            out += segment.data if isinstance(segment, Literal) else segment.render(sums)
    return bytes(out)


def expected_sums(segments: list[Segment]) -> dict[str, Sum]:
    found: dict[str, Sum] = {}
    for segment in segments:
        if isinstance(segment, Payload):
            data = expected_bytes([segment], {})
            digest = f"xxh3-128:{xxhash.xxh3_128_hexdigest(data)}" if segment.digest else None
            found[segment.key] = Sum(digest, zlib.crc32(data) if segment.crc else None)
    return found


SIZES = [0, 1, 30, 63, 64, 65, 400, 699, 700, 1023, 1024, 1025, 5000, 20, 20, 20, 9000, 64]


def sources(tmp_path: Path, kind: str) -> Callable[[bytes], Source]:
    """How the bytes of a payload are had."""
    if kind == "memory":
        return MemorySource
    if kind == "computed":
        return Computed
    if kind == "memory file":
        return lambda data: FileSource(MemoryFile(b"?" * 7 + data), 7)
    path = tmp_path / "source"
    layout = [noise(size, seed) for seed, size in enumerate(SIZES)]
    # Two bytes between the entries: near enough to be read together.
    path.write_bytes(b"".join(b"??" + data for data in layout))
    file = LocalFile(str(path))
    places = {}
    position = 0
    for data in layout:
        places[data] = position + 2
        position += 2 + len(data)
    return lambda data: FileSource(file, places[data])


def make_segments(make: Callable[[bytes], Source], digest: bool, crc: bool) -> list[Segment]:
    """A header of digests, entries with their headers, large literals, and a directory at the end."""
    segments: list[Segment] = [Literal(b"magic"), digests(900)]
    for seed, size in enumerate(SIZES):
        payload = Payload(f"k{seed}", size, make(noise(size, seed)), digest, crc)
        segments += [local_header(payload.key), payload, Literal(b"\0" * (seed % 5))]
    return [*segments, Literal(noise(3000, 99)), digests(20), digests(1500)]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", ["memory", "computed", "memory file", "local file"])
@pytest.mark.parametrize("digest", [True, False])
@pytest.mark.parametrize("crc", [True, False])
def test_file_and_stream_hold_the_planned_bytes(tmp_path: Path, kind: str, digest: bool, crc: bool) -> None:
    segments = make_segments(sources(tmp_path, kind), digest, crc)
    # The fixed sizes hold fewer digests than there are.
    segments = [s._replace(render=cut(s)) if isinstance(s, Later) else s for s in segments]
    plan = WritePlan("test", segments)
    stream = io.BytesIO()
    written = execute(plan, tmp_path / "a", overwrite=False)
    again = execute(plan, tmp_path / "b", overwrite=False)
    streamed = execute_to_stream(plan, stream)
    sums = expected_sums(segments)
    expected = expected_bytes(segments, sums)

    assert expected == (tmp_path / "a").read_bytes()
    assert expected == (tmp_path / "b").read_bytes()
    assert expected == stream.getvalue()
    assert sums == written.sums == again.sums == streamed.sums
    assert (len(expected), True, True) == (written.nbytes, written.atomic, written.durable)
    assert (len(expected), False, False) == (streamed.nbytes, streamed.atomic, streamed.durable)
    assert len(expected) == sum(written.method.values())


def cut(later: Later) -> Callable[[Mapping[str, Sum]], bytes]:
    return lambda sums: later.render(sums)[: later.nbytes]


def test_blocks_of_the_real_size_hold_the_planned_bytes(tmp_path: Path) -> None:
    data = noise(9 * MIB)
    (tmp_path / "source").write_bytes(data)
    file = LocalFile(str(tmp_path / "source"))
    segments: list[Segment] = [
        digests(300),
        Payload("a", 5 * MIB, FileSource(file, 0), digest=True),
        Payload("b", 3 * MIB, FileSource(file, 5 * MIB + 1)),
        Payload("c", 6 * MIB, MemorySource(memoryview(data)[3 * MIB :]), crc=True),
    ]
    written = execute(WritePlan("test", segments), tmp_path / "a", overwrite=False)
    file.close()
    body = data[: 5 * MIB] + data[5 * MIB + 1 : 8 * MIB + 1] + data[3 * MIB :]

    assert body == (tmp_path / "a").read_bytes()[300:]
    assert zlib.crc32(data[3 * MIB :]) == written.sums["c"].crc


def test_an_empty_plan_makes_an_empty_file(tmp_path: Path) -> None:
    stream = io.BytesIO()
    execute(WritePlan("test", []), tmp_path / "a", overwrite=False)
    execute_to_stream(WritePlan("test", []), stream)

    assert b"" == (tmp_path / "a").read_bytes() == stream.getvalue()


def test_many_small_payloads_take_few_system_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count, size = 5000, 1024
    data = noise(count * (size + 64))
    (tmp_path / "source").write_bytes(data)
    file = LocalFile(str(tmp_path / "source"))
    segments: list[Segment] = []
    for i in range(count):
        payload = Payload(str(i), size, FileSource(file, i * (size + 64)), digest=True, crc=True)
        segments += [local_header(payload.key), payload]
    calls: list[object] = []

    def counted(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            calls.append(real)
            return real(*args)

        return call

    for name in ("pread", "preadv", "pwritev"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    execute(WritePlan("test", segments), tmp_path / "a", overwrite=False, durable=False)
    file.close()

    # 6 MiB in windows of 1 MiB and buffers of 4 MiB, and the entry that lies across two buffers.
    assert len(calls) <= 12
    assert zlib.crc32(data[:size]) == int.from_bytes((tmp_path / "a").read_bytes()[:4], "little")


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("number", [errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EIO])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_kernel_copy_that_is_refused_is_done_by_reading_and_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, after: int
) -> None:
    data = noise(9000)
    (tmp_path / "source").write_bytes(data)
    file = LocalFile(str(tmp_path / "source"))
    calls: list[int] = []

    def refusing(source: int, target: int, count: int, source_at: int, target_at: int) -> int:
        calls.append(count)
        if len(calls) > after:
            raise OSError(number, os.strerror(number))
        part = os.pread(source, min(count, 100), source_at)
        return os.pwrite(target, part, target_at)

    monkeypatch.setattr(os, "copy_file_range", refusing, raising=False)
    plan = WritePlan("test", [Literal(b"head"), Payload("a", 8000, FileSource(file, 500)), Literal(b"tail")])
    written = execute(plan, tmp_path / "a", overwrite=False)
    file.close()

    assert b"head" + data[500:8500] + b"tail" == (tmp_path / "a").read_bytes()
    assert {"kernel copy": 100 * after, "buffered": 8008 - 100 * after} == written.method


@pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="only Linux has it")
def test_payloads_without_sums_are_copied_by_the_kernel(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(noise(2 * MIB))
    file = LocalFile(str(tmp_path / "source"))
    plan = WritePlan("test", [Payload("a", 2 * MIB - 5, FileSource(file, 5))])
    written = execute(plan, tmp_path / "a", overwrite=False)
    file.close()

    assert noise(2 * MIB)[5:] == (tmp_path / "a").read_bytes()
    assert Sum(None, None) == written.sums["a"]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("digest", [True, False])
def test_a_source_cut_short_meanwhile_is_named(tmp_path: Path, digest: bool) -> None:
    (tmp_path / "source").write_bytes(noise(9000))
    file = LocalFile(str(tmp_path / "source"))
    os.truncate(tmp_path / "source", 5000)
    plan = WritePlan("test", [Payload("a", 9000, FileSource(file, 0), digest)])
    with pytest.raises(CorruptFile) as caught:
        execute(plan, tmp_path / "a", overwrite=False)
    file.close()

    assert str(tmp_path / "source") == caught.value.path
    assert ["source"] == names(tmp_path)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("at", range(1, 12))
@pytest.mark.parametrize("error", [CorruptFile("damaged"), KeyboardInterrupt(), OSError(5, "from a source")])
def test_a_source_that_raises_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, at: int, error: BaseException
) -> None:
    (tmp_path / "a").write_bytes(b"old")
    plan = WritePlan("test", [Literal(noise(2500)), Payload("a", 10_700, Failing(at, error), digest=True)])
    with pytest.raises(type(error)) as caught:
        execute(plan, tmp_path / "a", overwrite=True)

    assert error is caught.value
    assert ["a"] == names(tmp_path)
    assert b"old" == (tmp_path / "a").read_bytes()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize(
    ("call", "at"), [("pwritev", 1), ("pwritev", 2), ("pwritev", 9), ("pwritev", 64), ("fdatasync", 1)]
)
def test_a_write_that_fails_in_a_thread_names_the_final_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, number: int, call: str
) -> None:
    real = getattr(os, call)
    calls: list[object] = []

    def failing(*args: object) -> object:
        calls.append(args)
        if len(calls) == at:
            raise OSError(number, os.strerror(number))
        return real(*args)

    monkeypatch.setattr(os, call, failing)
    plan = WritePlan("test", [Payload("a", 64 * 1024, Computed(noise(64 * 1024)), digest=True)])
    with pytest.raises(FileError) as caught:
        execute(plan, tmp_path / "a", overwrite=False)

    assert number == caught.value.errno
    assert str(tmp_path / "a") == caught.value.path
    assert [] == names(tmp_path)


@pytest.mark.usefixtures("small_blocks")
def test_short_writes_in_every_thread_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, parts, at: real(fd, [parts[0][: max(1, len(parts[0]) // 2)]], at))
    data = noise(20_000)
    execute(WritePlan("test", [Payload("a", 20_000, Computed(data), crc=True)]), tmp_path / "a", overwrite=False)

    assert data == (tmp_path / "a").read_bytes()


def test_signals_that_are_handled_do_not_disturb_a_write(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        data = noise(9 * MIB)
        execute(WritePlan("test", [Payload("a", 9 * MIB, Computed(data), True)]), tmp_path / "a", overwrite=False)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

    assert data == (tmp_path / "a").read_bytes()


@pytest.mark.usefixtures("small_blocks")
def test_ctrl_c_while_waiting_for_the_threads_ends_them_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = threading.Thread.join
    interrupts = [KeyboardInterrupt(), KeyboardInterrupt()]

    def join(thread: threading.Thread, timeout: float | None = None) -> None:
        if thread.name == "statedict-writer" and interrupts:
            raise interrupts.pop()
        real(thread, timeout)

    monkeypatch.setattr(threading.Thread, "join", join)
    plan = WritePlan("test", [Payload("a", 64 * 1024, Computed(noise(64 * 1024)), digest=True)])
    with pytest.raises(KeyboardInterrupt):
        execute(plan, tmp_path / "a", overwrite=False)

    assert [] == interrupts
    assert [] == names(tmp_path)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("at", [0, 1, 2])
def test_threads_that_can_not_be_started_are_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    real = threading.Thread.start
    started: list[threading.Thread] = []

    def start(thread: threading.Thread) -> None:
        if len(started) == at:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    plan = WritePlan("test", [Payload("a", 5000, Computed(noise(5000)))])
    execute(plan, tmp_path / "a", overwrite=False)

    assert noise(5000) == (tmp_path / "a").read_bytes()


def test_a_target_that_exists_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    plan = WritePlan("test", [Payload("a", 10, Failing(1, AssertionError("read")))])
    with pytest.raises(TargetExists):
        execute(plan, tmp_path / "a", overwrite=False)

    assert b"old" == (tmp_path / "a").read_bytes()


@pytest.mark.parametrize("nbytes", [3, 5])
def test_a_segment_of_another_size_than_planned_leaves_nothing(tmp_path: Path, nbytes: int) -> None:
    plan = WritePlan("test", [Later(4, lambda sums: bytes(nbytes))])
    with pytest.raises(ValueError, match="planned with 4 bytes"):
        execute(plan, tmp_path / "a", overwrite=False)

    assert [] == names(tmp_path)


def test_bytes_in_memory_that_are_too_few_are_an_error(tmp_path: Path) -> None:
    plan = WritePlan("test", [Payload("a", 2 * MIB, MemorySource(b"few"))])
    with pytest.raises(CorruptFile):
        execute(plan, tmp_path / "a", overwrite=False)

    assert [] == names(tmp_path)


@pytest.mark.usefixtures("small_blocks")
def test_progress_ends_with_the_whole_size(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    plan = WritePlan("test", [Literal(b"abc"), Payload("a", 5000, Computed(noise(5000)))])
    execute(plan, tmp_path / "a", overwrite=False, on_progress=lambda done, total: told.append((done, total)))

    assert (5003, 5003) == told[-1]
    assert sorted(told) == told
    assert len(told) > 2


class Raw(io.RawIOBase):
    """A raw stream that takes a few bytes at a time."""

    def __init__(self, most: int | None) -> None:
        self.most = most
        self.data = b""

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int | None:
        if self.most is None:
            return None
        part = bytes(memoryview(data)[: self.most])  # type: ignore[arg-type]
        self.data += part
        return len(part)


def test_a_raw_stream_gets_everything(tmp_path: Path) -> None:
    stream = Raw(7)
    execute_to_stream(WritePlan("test", [Literal(b"0123456789" * 5)]), stream)  # type: ignore[arg-type]

    assert b"0123456789" * 5 == stream.data


def test_a_stream_that_takes_nothing_now_is_an_error() -> None:
    with pytest.raises(FileError) as caught:
        execute_to_stream(WritePlan("test", [Literal(b"x")]), Raw(None))  # type: ignore[arg-type]

    assert errno.EAGAIN == caught.value.errno


def test_a_closed_stream_is_an_error_of_ours(tmp_path: Path) -> None:
    with open(tmp_path / "a", "wb") as stream:
        pass
    with pytest.raises(FileError, match="closed") as caught:
        execute_to_stream(WritePlan("test", [Literal(b"x")]), stream)

    assert str(tmp_path / "a") == caught.value.path


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_stream_is_an_error_with_its_number() -> None:
    with pytest.raises(FileError) as caught, open("/dev/full", "wb", buffering=0) as stream:
        execute_to_stream(WritePlan("test", [Literal(b"x")]), stream)

    assert errno.ENOSPC == caught.value.errno


class Changing(Computed):
    """A source whose bytes are others every time."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.data = bytes(byte ^ 1 for byte in self.data)
        super().read_into(offset, buffer)


def test_bytes_that_change_between_two_passes_are_an_error() -> None:
    plan = WritePlan("test", [digests(41), Payload("a", 5, Changing(b"hello"), digest=True)])
    with pytest.raises(CorruptFile, match="changed"):
        execute_to_stream(plan, io.BytesIO())


def test_a_payload_is_read_once_where_nothing_looks_ahead() -> None:
    reads: list[int] = []

    class Counting(Computed):
        def read_into(self, offset: int, buffer: memoryview) -> None:
            reads.append(offset)
            super().read_into(offset, buffer)

    payload = Payload("a", 5, Counting(b"hello"), crc=True)
    execute_to_stream(WritePlan("test", [payload, local_header("a")]), io.BytesIO())
    once = len(reads)
    execute_to_stream(WritePlan("test", [local_header("a"), payload]), io.BytesIO())

    assert (1, 3) == (once, len(reads))


def test_files_that_are_no_local_files_are_read_by_their_own_means(tmp_path: Path) -> None:
    file: File = MemoryFile(noise(2 * MIB))
    plan = WritePlan("test", [Payload("a", 2 * MIB, FileSource(file, 0))])
    execute(plan, tmp_path / "a", overwrite=False)

    assert noise(2 * MIB) == (tmp_path / "a").read_bytes()


@pytest.mark.parametrize("sizes", [[4096 * 3], [100, 5000, 4096 * 2, 1, 70_000], [1_000_000], [4095, 4097]])
def test_writes_past_the_page_cache_give_the_same_file(sizes: list[int], tmp_path: Path) -> None:
    data = [bytes((at * 7 + place) % 251 for place in range(size)) for at, size in enumerate(sizes)]
    payloads = [Payload(str(at), len(each), MemorySource(each), True, True) for at, each in enumerate(data)]
    tail = Later(16 * len(sizes), lambda sums: "".join(f"{each.crc:016x}" for each in sums.values()).encode())
    plan = WritePlan("test", [Later(8, lambda sums: b"%08d" % len(sums)), *payloads, Literal(b"end"), tail])
    plain = execute(plan, tmp_path / "plain", overwrite=False, engine=engine.Engine(direct=False))
    direct = execute(
        plan, tmp_path / "direct", overwrite=False, engine=engine.Engine(direct=True, block_nbytes=8192, threads=3)
    )

    assert (tmp_path / "plain").read_bytes() == (tmp_path / "direct").read_bytes()
    assert plain.sums == direct.sums and direct.nbytes == sum(direct.method.values())


def test_a_file_system_without_direct_writes_is_written_to_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable.DurableFile, "open_direct", lambda self: False)
    plan = WritePlan("test", [Payload("a", 20_000, MemorySource(bytes(20_000)))])
    written = execute(plan, tmp_path / "x", overwrite=False, engine=engine.Engine(direct=True, block_nbytes=4096))

    assert (20_000, bytes(20_000)) == (written.method["buffered"], (tmp_path / "x").read_bytes())

"""Memory of devices read and written through a ring of two host buffers: on a device that is made up, and on CUDA."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from statedict import CorruptFile, StateDictError, Unsupported  # noqa: E402
from statedict.io.plans import FileSource, Payload, WritePlan  # noqa: E402
from statedict.io.writers import execute  # noqa: E402
from statedict.torch.backends import Streams, Synchronous  # noqa: E402
from statedict.torch.devices import DeviceFile, Ring, Upload, as_bytes, backend_of  # noqa: E402

BLOCK = 64
SIZES = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK + 7, 20 * BLOCK]

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


class FakeBackend:
    """A device whose memory is the host's, and which copies at the last moment: when a mark behind the copy is waited for.

    A buffer that is read before that has other bytes in it, and one that is filled anew before that spoils the copy.
    """

    def __init__(self) -> None:
        self.host_nbytes = 0  # ever allocated
        self.waiting: list[tuple[Any, Any]] = []  # (target, source) of copies that were begun
        self.log: list[str] = []
        self._done = 0
        self._lock = threading.Lock()

    def pinned(self, nbytes: int) -> Any:
        self.host_nbytes += nbytes
        return torch.full((nbytes,), 0xEE, dtype=torch.uint8)

    def to_host(self, host_buffer: Any, device_bytes: Any) -> None:
        self._begin("to host", host_buffer, device_bytes)

    def to_device(self, device_bytes: Any, host_buffer: Any) -> None:
        self._begin("to device", device_bytes, host_buffer)

    def _begin(self, what: str, target: Any, source: Any) -> None:
        assert target.dtype == source.dtype == torch.uint8 and target.shape == source.shape
        host = (target if what == "to host" else source).untyped_storage().data_ptr()
        with self._lock:
            busy = {each.untyped_storage().data_ptr() for pair in self.waiting for each in pair}
            assert host not in busy, "the buffer is still in use"
            self.log.append(f"{what} {len(source)}")
            self.waiting.append((target, source))

    def record(self) -> object:
        with self._lock:
            return self._done + len(self.waiting)

    def wait(self, mark: Any) -> None:
        with self._lock:
            self.log.append("wait")
            while self._done < mark:
                target, source = self.waiting.pop(0)
                target.copy_(source)
                self._done += 1


def random_bytes(nbytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def on_device(data: bytes) -> Any:
    """A storage of the made-up device with these bytes."""
    return torch.tensor(list(data), dtype=torch.uint8).untyped_storage()


def content(storage: Any) -> bytes:
    return bytes(as_bytes(storage).cpu().tolist())


def reader_of(data: bytes) -> Callable[[memoryview], None]:
    """Fills each memory that it is given with the next bytes."""
    position = 0

    def fill(memory: memoryview) -> None:
        nonlocal position
        memory[:] = data[position : position + len(memory)]
        position += len(memory)

    return fill


# -------------------------------------------------------------------- from the device


@pytest.mark.parametrize("step", [1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK])
@pytest.mark.parametrize("nbytes", SIZES)
@pytest.mark.parametrize("ahead", [True, False])
def test_a_storage_reads_in_order_as_it_is(nbytes: int, step: int, ahead: bool) -> None:
    data = random_bytes(nbytes)
    file = DeviceFile(on_device(data), Ring(FakeBackend(), BLOCK, ahead=ahead))
    found = b"".join([file.read(start, min(step, nbytes - start)) for start in range(0, nbytes, step)])

    assert (nbytes, "cpu memory") == (file.nbytes, file.path)
    assert data == found


@given(st.data())
def test_any_ranges_of_any_files_of_one_ring_read_as_they_are(data: st.DataObject) -> None:
    block = data.draw(st.integers(1, 40))
    contents = [random_bytes(size, size) for size in data.draw(st.lists(st.integers(0, 200), min_size=1, max_size=3))]
    backend = FakeBackend()
    ring = Ring(backend, block, ahead=data.draw(st.booleans()))
    files = [DeviceFile(on_device(each), ring) for each in contents]
    nexts = [0] * len(files)
    for _ in range(data.draw(st.integers(1, 12))):
        number = data.draw(st.integers(0, len(files) - 1))
        in_order = data.draw(st.booleans())
        start = nexts[number] if in_order else data.draw(st.integers(0, len(contents[number])))
        end = nexts[number] = data.draw(st.integers(start, len(contents[number])))

        assert contents[number][start:end] == files[number].read(start, end - start)

    assert backend.host_nbytes <= 2 * block


def test_the_next_block_is_on_its_way_before_this_one_is_waited_for() -> None:
    backend = FakeBackend()
    DeviceFile(on_device(random_bytes(3 * BLOCK)), Ring(backend, BLOCK)).read(0, BLOCK)

    assert [f"to host {BLOCK}", f"to host {BLOCK}", "wait"] == backend.log


def test_every_byte_is_copied_once_when_a_storage_is_read_in_order() -> None:
    backend = FakeBackend()
    file = DeviceFile(on_device(random_bytes(10 * BLOCK)), Ring(backend, BLOCK))
    for start in range(0, 10 * BLOCK, BLOCK // 2):
        file.read(start, BLOCK // 2)

    assert 10 * BLOCK == sum(int(line.split()[-1]) for line in backend.log if line != "wait")


def test_scattered_reads_copy_what_they_ask_for_and_no_more() -> None:
    backend = FakeBackend()
    file = DeviceFile(on_device(random_bytes(10 * BLOCK)), Ring(backend, BLOCK))
    for start in (500, 100, 300):
        file.read(start, 8)

    assert ["to host 8", "wait"] * 3 == backend.log


def test_two_files_that_take_turns_do_not_throw_away_what_the_other_read_ahead() -> None:
    backend = FakeBackend()
    ring = Ring(backend, BLOCK)
    contents = [random_bytes(6 * BLOCK, seed) for seed in (1, 2)]
    files = [DeviceFile(on_device(each), ring) for each in contents]
    found = [b"", b""]
    for start in range(0, 6 * BLOCK, BLOCK):
        for number, file in enumerate(files):
            found[number] += file.read(start, BLOCK)

    assert contents == found
    assert 12 == len([line for line in backend.log if line != "wait"])


def test_a_file_that_is_no_longer_read_does_not_keep_a_buffer() -> None:
    backend = FakeBackend()
    ring = Ring(backend, BLOCK)
    DeviceFile(on_device(random_bytes(4 * BLOCK)), ring).read(0, BLOCK)
    other = DeviceFile(on_device(random_bytes(9 * BLOCK)), ring)
    other.read(0, 4 * BLOCK)
    backend.log.clear()
    other.read(4 * BLOCK, BLOCK)

    assert f"to host {BLOCK}" == backend.log[0]
    assert 2 * BLOCK == backend.host_nbytes


def test_a_change_between_two_reads_is_seen_where_nothing_is_read_ahead() -> None:
    storage = on_device(bytes(3 * BLOCK))
    file = DeviceFile(storage, Ring(FakeBackend(), BLOCK, ahead=False))
    file.read(0, BLOCK)
    as_bytes(storage).fill_(7)

    assert bytes([7]) * 2 * BLOCK == file.read(BLOCK, 2 * BLOCK)


@pytest.mark.parametrize("nbytes", [8, BLOCK])
@pytest.mark.parametrize("offset", [0, BLOCK])
def test_bytes_that_were_read_once_are_copied_anew(offset: int, nbytes: int) -> None:
    storage = on_device(bytes(3 * BLOCK))
    file = DeviceFile(storage, Ring(FakeBackend(), BLOCK))
    file.read(0, offset)
    file.read(offset, nbytes)
    as_bytes(storage).fill_(7)

    assert bytes([7]) * nbytes == file.read(offset, nbytes)


def test_closing_a_file_forgets_what_was_read_ahead() -> None:
    storage = on_device(bytes(3 * BLOCK))
    file = DeviceFile(storage, Ring(FakeBackend(), BLOCK))
    file.read(0, BLOCK)
    file.close()
    as_bytes(storage).fill_(7)

    assert bytes([7]) * BLOCK == file.read(BLOCK, BLOCK)


@pytest.mark.parametrize("offset, nbytes", [(-1, 1), (0, 11), (10, 1), (3, -1)])
def test_a_range_outside_the_storage_is_refused(offset: int, nbytes: int) -> None:
    file = DeviceFile(on_device(bytes(10)), Ring(FakeBackend(), BLOCK))
    with pytest.raises(CorruptFile, match="cpu memory: the storage ends too early") as caught:
        file.read(offset, nbytes)

    assert offset == caught.value.offset


def test_bytes_that_must_not_change_are_not_written_to() -> None:
    with pytest.raises(TypeError, match="read-only"):
        DeviceFile(on_device(bytes(10)), Ring(FakeBackend(), BLOCK)).read_into(0, memoryview(b"0123456789"))


def test_several_threads_read_several_files_through_one_ring() -> None:
    backend = FakeBackend()
    ring = Ring(backend, BLOCK)
    contents = [random_bytes(30 * BLOCK + seed, seed) for seed in range(4)]
    files = [DeviceFile(on_device(each), ring) for each in contents]

    def matches(seed: int) -> bool:
        number, chosen = seed % 4, random.Random(seed)
        ranges = [(chosen.randrange(30 * BLOCK), chosen.randrange(3 * BLOCK)) for _ in range(40)]
        return all(
            contents[number][start : start + count]
            == files[number].read(start, min(count, files[number].nbytes - start))
            for start, count in ranges
        )

    with ThreadPoolExecutor(6) as pool:
        assert [True] * 24 == list(pool.map(matches, range(24)))
    assert 2 * BLOCK == backend.host_nbytes


def test_the_host_memory_does_not_grow_with_what_is_written_to_a_file(tmp_path: Path) -> None:
    backend = FakeBackend()
    ring = Ring(backend, 4096)
    contents = [random_bytes(size, size) for size in (3_000_000, 0, 1, 4096, 500_000)]
    files = [DeviceFile(on_device(each), ring) for each in contents]
    payloads = [Payload(str(n), file.nbytes, FileSource(file, 0), True, True) for n, file in enumerate(files)]
    execute(WritePlan("test", payloads), tmp_path / "file", overwrite=False)

    assert b"".join(contents) == (tmp_path / "file").read_bytes()
    assert 2 * 4096 == backend.host_nbytes


# -------------------------------------------------------------------- to the device


@pytest.mark.parametrize("nbytes", SIZES)
@pytest.mark.parametrize("offset", [0, 1, BLOCK])
def test_what_is_written_is_on_the_device_at_the_end(nbytes: int, offset: int) -> None:
    data = random_bytes(nbytes)
    backend = FakeBackend()
    target = on_device(bytes([9]) * (offset + nbytes + 3))
    with Upload(Ring(backend, BLOCK)) as upload:
        upload.write(target, offset, reader_of(data), nbytes)

    assert bytes([9]) * offset + data + bytes([9]) * 3 == content(target)
    assert [] == backend.waiting
    assert backend.host_nbytes <= 2 * BLOCK


@given(st.integers(1, 40), st.lists(st.tuples(st.integers(0, 200), st.integers(0, 50)), max_size=6))
def test_any_pieces_through_one_ring_arrive(block: int, pieces: list[tuple[int, int]]) -> None:
    backend = FakeBackend()
    targets = [on_device(bytes(offset + nbytes)) for nbytes, offset in pieces]
    with Upload(Ring(backend, block)) as upload:
        for target, (nbytes, offset) in zip(targets, pieces):
            upload.write(target, offset, reader_of(random_bytes(nbytes, offset)), nbytes)

    assert [bytes(o) + random_bytes(n, o) for n, o in pieces] == [content(target) for target in targets]
    assert backend.host_nbytes <= 2 * block


def test_a_block_is_filled_while_the_one_before_it_is_copied() -> None:
    backend = FakeBackend()
    in_flight: list[int] = []
    with Upload(Ring(backend, BLOCK)) as upload:
        upload.write(on_device(bytes(4 * BLOCK)), 0, lambda _: in_flight.append(len(backend.waiting)), 4 * BLOCK)

    assert [0, 1, 1, 1] == in_flight


def test_files_are_read_and_written_through_one_ring_by_turns() -> None:
    data = random_bytes(9 * BLOCK)
    ring = Ring(FakeBackend(), BLOCK)
    file = DeviceFile(on_device(data), ring)
    target = on_device(bytes(9 * BLOCK))
    found = b""
    with Upload(ring) as upload:
        for start in range(0, 9 * BLOCK, 3 * BLOCK):
            found += file.read(start, 3 * BLOCK)
            upload.write(target, start, reader_of(found[start:]), 3 * BLOCK)

    assert data == found == content(target)


def test_a_view_of_a_storage_is_a_target_too() -> None:
    target = on_device(bytes(10))
    with Upload(Ring(FakeBackend(), 2)) as upload:
        upload.write(as_bytes(target)[3:8], 1, reader_of(b"abcd"), 4)

    assert b"\0\0\0\0abcd\0\0" == content(target)


@pytest.mark.parametrize("fails_at", [0, 1, 2, 5])
def test_an_error_while_reading_leaves_nothing_in_flight_and_the_ring_usable(fails_at: int) -> None:
    data = random_bytes(6 * BLOCK)
    backend = FakeBackend()
    ring = Ring(backend, BLOCK)
    target = on_device(bytes(6 * BLOCK))
    calls = iter(range(10))
    fill = reader_of(data)

    def failing(memory: memoryview) -> None:
        if next(calls) == fails_at:
            memory[:] = b"\xaa" * len(memory)
            raise CorruptFile("the file ends too early")
        fill(memory)

    upload = Upload(ring)
    with pytest.raises(CorruptFile, match="ends too early"):
        upload.write(target, 0, failing, 6 * BLOCK)

    assert [] == backend.waiting
    assert data[: fails_at * BLOCK] + bytes((6 - fails_at) * BLOCK) == content(target)
    upload.write(target, 0, reader_of(data), 6 * BLOCK)
    upload.finish()

    assert data == content(target)
    assert 2 * BLOCK == backend.host_nbytes or fails_at == 0


def test_an_error_between_two_writes_leaves_nothing_in_flight() -> None:
    backend = FakeBackend()
    with pytest.raises(CorruptFile), Upload(Ring(backend, BLOCK)) as upload:
        upload.write(on_device(bytes(BLOCK)), 0, reader_of(bytes(BLOCK)), BLOCK)
        raise CorruptFile("a digest differs")

    assert [] == backend.waiting


class Interrupted(FakeBackend):
    """A device whose user presses Ctrl-C right after the copy of that number has begun."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def _begin(self, what: str, target: Any, source: Any) -> None:
        super()._begin(what, target, source)
        self.number -= 1
        if self.number == 0:
            raise KeyboardInterrupt


def test_an_interrupt_right_after_a_copy_has_begun_leaves_nothing_in_flight() -> None:
    backend = Interrupted(1)
    ring = Ring(backend, BLOCK)
    data = random_bytes(3 * BLOCK)
    target = on_device(bytes(3 * BLOCK))
    with pytest.raises(KeyboardInterrupt), Upload(ring) as upload:
        upload.write(target, 0, reader_of(data), 3 * BLOCK)

    assert ([], data[:BLOCK]) == (backend.waiting, content(target)[:BLOCK])


@pytest.mark.parametrize("number", [1, 2, 3])
def test_an_interrupted_read_leaves_nothing_to_be_read_later(number: int) -> None:
    storage = on_device(bytes(3 * BLOCK))
    backend = Interrupted(number)
    file = DeviceFile(storage, Ring(backend, BLOCK))
    with pytest.raises(KeyboardInterrupt):
        file.read(0, 3 * BLOCK)
    backend.wait(backend.record())
    as_bytes(storage).fill_(7)

    assert bytes([7]) * 3 * BLOCK == file.read(0, 3 * BLOCK)


@pytest.mark.parametrize("offset, nbytes", [(-1, 1), (0, 11), (10, 1), (3, -1)])
def test_a_range_outside_the_target_is_refused_before_anything_is_read(offset: int, nbytes: int) -> None:
    read: list[memoryview] = []
    with pytest.raises(ValueError, match="target of 10"), Upload(Ring(FakeBackend(), BLOCK)) as upload:
        upload.write(on_device(bytes(10)), offset, read.append, nbytes)

    assert [] == read


@pytest.mark.parametrize("shape, dtype", [((4,), "int8"), ((2, 2), "uint8"), ((), "uint8")])
def test_a_target_that_is_no_row_of_bytes_is_refused(shape: tuple[int, ...], dtype: str) -> None:
    with pytest.raises(ValueError, match="bytes in one piece"):
        Upload(Ring(FakeBackend(), BLOCK)).write(torch.zeros(shape, dtype=getattr(torch, dtype)), 0, reader_of(b""), 0)


def test_a_device_is_filled_from_the_memory_of_another() -> None:
    data = random_bytes(7 * BLOCK + 3)
    source = DeviceFile(on_device(data), Ring(FakeBackend(), BLOCK))
    target = on_device(bytes(len(data)))
    position = 0

    def fill(memory: memoryview) -> None:
        nonlocal position
        source.read_into(position, memory)
        position += len(memory)

    with Upload(Ring(FakeBackend(), 50)) as upload:
        upload.write(target, 0, fill, len(data))

    assert data == content(target)


# -------------------------------------------------------------------- memory


class Meagre(FakeBackend):
    """A device beside a host that has little memory."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def pinned(self, nbytes: int) -> Any:
        if self.host_nbytes + nbytes > self._most:
            raise RuntimeError("not enough memory")
        return super().pinned(nbytes)


def test_one_buffer_will_do_where_there_is_no_memory_for_two() -> None:
    data = random_bytes(5 * BLOCK)
    ring = Ring(Meagre(BLOCK), BLOCK)
    target = on_device(bytes(5 * BLOCK))
    with Upload(ring) as upload:
        upload.write(target, 0, reader_of(data), 5 * BLOCK)

    assert data == content(target) == DeviceFile(on_device(data), ring).read(0, 5 * BLOCK)


def test_no_memory_for_any_buffer_is_one_error() -> None:
    with pytest.raises(StateDictError, match="no memory for a buffer of 64 bytes"):
        DeviceFile(on_device(bytes(3)), Ring(Meagre(1), BLOCK)).read(0, 3)


@contextmanager
def default_device(name: str) -> Iterator[None]:
    with torch.device(name):
        yield


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, lambda: default_device("meta")])
def test_the_mode_that_torch_is_in_makes_no_difference(mode: Callable[[], Any]) -> None:
    data = random_bytes(3 * BLOCK)
    storage, target = on_device(data), on_device(bytes(3 * BLOCK))
    ring = Ring(Synchronous(), BLOCK)
    with mode():
        view = as_bytes(target)
        file = DeviceFile(storage, ring)
        first = file.read(0, BLOCK)
        with Upload(ring) as upload:
            upload.write(target, 0, reader_of(data), BLOCK)
    with Upload(ring) as upload:
        upload.write(view, BLOCK, reader_of(data[BLOCK:]), 2 * BLOCK)

    assert data == first + file.read(BLOCK, 2 * BLOCK)
    assert data == content(target)


@pytest.mark.parametrize("dtype", ["float32", "bool", "complex128", "bfloat16"])
def test_the_bytes_of_a_storage_are_a_view_of_it(dtype: str) -> None:
    tensor = torch.ones(3, 4, dtype=getattr(torch, dtype))
    as_bytes(tensor.untyped_storage()).zero_()

    assert (False, tensor.nbytes) == (bool(tensor.any()), len(as_bytes(tensor.untyped_storage())))


# -------------------------------------------------------------------- which copies


def test_a_device_without_streams_copies_at_once() -> None:
    data = random_bytes(5 * BLOCK)
    backend = backend_of(torch.device("cpu"))
    ring = Ring(backend, BLOCK)
    target = on_device(bytes(5 * BLOCK))
    with Upload(ring) as upload:
        upload.write(target, 0, reader_of(data), 5 * BLOCK)

    assert isinstance(backend, Synchronous)
    assert data == content(target) == DeviceFile(target, ring).read(0, 5 * BLOCK)


def test_the_meta_device_has_no_bytes() -> None:
    with pytest.raises(Unsupported, match="no bytes"):
        backend_of(torch.device("meta"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_one_error() -> None:
    with pytest.raises(Unsupported, match="the device 'cuda:3' can't be used: "):
        backend_of(torch.device("cuda:3"))


class FakeStream:
    """A stream that writes down what it is told."""

    current: FakeStream
    log: list[str] = []  # noqa: RUF012

    def __init__(self, name: object = "side") -> None:
        self.name = name

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self.log.append("host waits for the event")

    def record(self, stream: FakeStream) -> None:
        self.log.append(f"event behind {stream.name}")


@contextmanager
def on_stream(stream: FakeStream) -> Iterator[None]:
    FakeStream.log.append(f"on {stream.name}")
    yield
    FakeStream.log.append("off")


@contextmanager
def on_fake_device(device: object) -> Iterator[None]:
    yield


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_a_copy_waits_for_the_streams_of_its_thread_and_of_its_caller(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeStream.log, FakeStream.current = [], FakeStream("caller")
    module = getattr(torch, kind)
    for name, made in {
        "Stream": lambda device: FakeStream(),
        "Event": FakeStream,
        "current_device": lambda: 0,
        "current_stream": lambda device: FakeStream.current,
        "stream": on_stream,
        "device": on_fake_device,
    }.items():
        monkeypatch.setattr(module, name, made)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda self, stream: FakeStream.log.append(f"memory in use on {stream.name}")
    )
    backend = backend_of(torch.device(kind))
    source, target = backend.pinned(3), torch.zeros(3, dtype=torch.uint8)
    source.copy_(torch.tensor([1, 2, 3], dtype=torch.uint8))
    backend.to_device(target, source)
    one = list(FakeStream.log)
    FakeStream.log.clear()
    FakeStream.current = FakeStream("thread")
    backend.to_host(source.zero_(), target)
    backend.wait(backend.record())
    begun = ["on side", "off", "memory in use on side"]

    assert ["side waits for caller", *begun] == one
    assert ["side waits for caller", "side waits for thread"] == sorted(FakeStream.log[:2])
    assert [*begun, "event behind side", "host waits for the event"] == FakeStream.log[2:]
    assert [1, 2, 3] == source.tolist()


# -------------------------------------------------------------------- CUDA


@needs_cuda
@pytest.mark.parametrize("nbytes", [0, 1, (8 << 20) - 1, 8 << 20, (8 << 20) + 1, 50_000_003])
def test_bytes_go_to_cuda_and_come_back(nbytes: int) -> None:
    device = torch.device("cuda:0")
    data = random_bytes(nbytes)
    target = torch.UntypedStorage(nbytes, device=device)
    with Upload(Ring(backend_of(device))) as upload:
        upload.write(target, 0, reader_of(data), nbytes)
    file = DeviceFile(target, Ring(backend_of(device)))

    assert "cuda:0 memory" == file.path
    assert data == file.read(0, nbytes)
    assert data == as_bytes(target).cpu().numpy().tobytes()


@needs_cuda
def test_a_file_of_a_cuda_tensor_is_written_as_it_is(tmp_path: Path) -> None:
    tensor = torch.randn(9_000_000, device="cuda")
    file = DeviceFile(tensor.untyped_storage(), Ring(backend_of(tensor.device)))
    execute(WritePlan("test", [Payload("x", file.nbytes, FileSource(file, 0), True)]), tmp_path / "f", overwrite=False)

    assert tensor.cpu().numpy().tobytes() == (tmp_path / "f").read_bytes()


@needs_cuda
@pytest.mark.parametrize("is_other_thread", [False, True])
@pytest.mark.parametrize("is_own_stream", [False, True])
def test_what_was_enqueued_just_before_is_read(is_own_stream: bool, is_other_thread: bool) -> None:
    stream = torch.cuda.Stream() if is_own_stream else torch.cuda.current_stream()
    with torch.cuda.stream(stream):
        tensor = torch.zeros(6000, 6000, device="cuda")
        file = DeviceFile(tensor.untyped_storage(), Ring(backend_of(tensor.device)))
        stream.synchronize()
        product = torch.ones(6000, 6000, device="cuda")
        for _ in range(5):
            product = product @ torch.eye(6000, device="cuda")
        tensor.copy_(product)
        with ThreadPoolExecutor(1) as pool:
            read = (
                pool.submit(file.read, 0, file.nbytes).result if is_other_thread else lambda: file.read(0, file.nbytes)
            )
            found = torch.frombuffer(bytearray(read()), dtype=torch.float32)

    assert torch.equal(torch.ones(36_000_000), found)


@needs_cuda
def test_what_was_enqueued_just_before_does_not_spoil_an_upload() -> None:
    data = random_bytes(20_000_000)
    large = torch.ones(6000, 6000, device="cuda")
    target = torch.zeros(20_000_000, dtype=torch.uint8, device="cuda")
    for _ in range(5):
        large = large @ large
    target.fill_(1)
    with Upload(Ring(backend_of(target.device))) as upload:
        upload.write(target, 0, reader_of(data), len(data))

    assert data == target.cpu().numpy().tobytes()


@needs_cuda
def test_the_buffers_of_cuda_are_pinned() -> None:
    assert backend_of(torch.device("cuda")).pinned(10).is_pinned()


@needs_cuda
def test_memory_that_is_let_go_of_during_a_copy_is_not_given_to_others() -> None:
    backend = Streams(torch.device("cuda"))
    host = backend.pinned(64 << 20)
    tensor = torch.full((64 << 20,), 5, dtype=torch.uint8, device="cuda")
    backend.to_host(host, tensor)
    del tensor
    torch.full((64 << 20,), 6, dtype=torch.uint8, device="cuda")
    backend.wait(backend.record())

    assert bool((host == 5).all())


@needs_two
def test_bytes_go_from_one_cuda_device_to_another() -> None:
    data = random_bytes(20_000_000)
    first = torch.frombuffer(bytearray(data), dtype=torch.uint8).to("cuda:0")
    second = first.to("cuda:1")

    assert data == DeviceFile(second.untyped_storage(), Ring(backend_of(second.device))).read(0, len(data))

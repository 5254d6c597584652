"""Whatever tree torch saves: reading it equals ``torch.load`` bit by bit, and so does torch's reading of what we write."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

import statedict

torch = pytest.importorskip("torch")

from saved_trees import memory_overlaps, trees, walk  # noqa: E402
from saved_values import facts, found_facts, found_sharing, saved, sharing  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*(TypedStorage is deprecated|ComplexHalf support).*")


@settings(max_examples=150)
@given(trees())
def test_reading_a_zip_equals_torch_load(value: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _compare(saved(value, Path(folder, "m.pth")))


@settings(max_examples=150)
@given(trees(new_dtypes=False))
def test_reading_a_legacy_stream_equals_torch_load(value: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _compare(saved(value, Path(folder, "m.pth"), zipped=False))


def _compare(path: Path) -> None:
    expected = torch.load(path, weights_only=True)
    with statedict.open(path) as checkpoint:
        tree = checkpoint.tree()

        assert facts(expected) == found_facts(tree)
        assert sharing(expected) == found_sharing(tree)


@settings(max_examples=150)
@given(trees())
def test_torch_reads_what_was_converted_from_and_through_both_formats(value: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = saved(value, folder / "source.pth")
        statedict.convert(source, folder / "direct.pth")
        statedict.convert(source, folder / "between.safetensors")
        statedict.convert(folder / "between.safetensors", folder / "through.pth")
        expected = torch.load(source, weights_only=True)
        kept = _gapless(expected)
        for target in ("direct.pth", "through.pth"):
            found = torch.load(folder / target, weights_only=True)

            assert _plain(facts(expected)) == _plain(facts(found))
            assert {path: _strides(expected)[path] for path in kept} == {path: _strides(found)[path] for path in kept}
            assert memory_overlaps(expected) == memory_overlaps(found)
        statedict.convert(folder / "through.pth", folder / "again.safetensors")
        assert (folder / "between.safetensors").read_bytes() == (folder / "again.safetensors").read_bytes()


def _strides(value: Any) -> dict[tuple[object, ...], tuple[int, ...]]:
    """The strides of the tensors of a tree."""
    return {path: leaf.stride() for path, leaf in walk(value) if isinstance(leaf, torch.Tensor)}


def _gapless(value: Any) -> set[tuple[object, ...]]:
    """The tensors without gaps between their elements: those with gaps may be written without."""
    found = set()
    for path, tensor in walk(value):
        if isinstance(tensor, torch.Tensor):
            step = 1
            for jump, size in sorted(
                (step, size) for step, size in zip(tensor.stride(), tensor.shape) if step and size > 1
            ):
                step = step * size if jump == step else 0
            if step or not tensor.numel():
                found.add(path)
    return found


def _plain(value: Any) -> Any:
    """The facts of tensors without their strides."""
    if isinstance(value, tuple) and len(value) == 7 and value[0] == "tensor":
        return value[:3] + value[4:]
    if isinstance(value, (tuple, list)):
        return type(value)(_plain(item) for item in value) if type(value) in (tuple, list) else value
    return value

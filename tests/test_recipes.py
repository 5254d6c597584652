"""Derived tensors: joined and folded ones, against the same thing done in torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statedict.checkpoint import Checkpoint, of_memory
from statedict.checkpoint import open as open_checkpoint
from statedict.dtypes import BY_CODE, BY_TORCH
from statedict.errors import CorruptFile, RuleError, Unsupported
from statedict.io.ranges import MemoryFile
from statedict.lazy_tensor import LazyTensor
from statedict.manifest import Extent, FileFact, Manifest, Storage, StorageView, TensorEntry
from statedict.recipes.casting import Cast
from statedict.recipes.derived import DerivedFile, Packed, Recipe
from statedict.recipes.folding import FoldedBatchNormBias, FoldedBatchNormWeight, FoldedWeightNorm, MergedLora
from statedict.recipes.joining import Concat, Interleave, Pad
from statedict.views import packed_stride

torch = pytest.importorskip("torch")

FLOATS = ["float64", "float32", "float16", "bfloat16"]
DTYPES = [*FLOATS, "int64", "uint8", "bool", "complex64", "float8_e5m2"]


def lazy(*tensors: Any) -> list[LazyTensor]:
    """The tensors as lazy ones, over their own memory."""
    checkpoint = of_memory({f"t{at}": tensor.detach() for at, tensor in enumerate(tensors)})
    return list(checkpoint.values())


def computed(recipe: Recipe) -> Any:
    """What a recipe makes, as a tensor of torch's, read from a file behind another recipe."""
    file = DerivedFile([Packed(lazy(torch.ones(3))[0]), recipe], "derived")
    start = file.offsets(1)
    data = bytearray(file.read(start, file.nbytes - start))
    dtype = getattr(torch, str(recipe.dtype))
    return (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).reshape(recipe.shape)


def as_checkpoint(recipes: Sequence[Recipe]) -> Checkpoint:
    """Derived tensors as a checkpoint of their own, so that others can be derived from them."""
    file = DerivedFile(recipes, "derived")
    storages, tensors = [], {}
    for at, recipe in enumerate(recipes):
        nbytes = recipe.dtype.nbytes(torch.Size(recipe.shape).numel())
        storages.append(Storage(at, nbytes, Extent(0, file.offsets(at), nbytes)))
        view = StorageView(storages[-1], 0, packed_stride(recipe.shape))
        tensors[(f"d{at}",)] = TensorEntry((f"d{at}",), recipe.dtype, recipe.shape, view)
    root = next(iter(tensors.values()))
    manifest = Manifest("derived", (FileFact(file.path, file.nbytes),), tuple(storages), tensors, {}, root)
    return Checkpoint(manifest.validate(), [file], source=file.path)


@st.composite
def values(draw: Any, shape: Sequence[int], dtype: str) -> Any:
    """A tensor of that shape and dtype with random values, packed or with any strides."""
    order = draw(st.permutations(range(len(shape))))
    step = draw(st.sampled_from([1, 1, 2]))
    made = torch.randint(0, 100, [shape[dim] * step for dim in order])
    made = made[tuple([slice(None, None, step)] * len(shape))]
    made = (made > 50 if dtype == "bool" else made / 8).to(getattr(torch, dtype))
    back = [order.index(dim) for dim in range(len(shape))]
    return made.permute(back) if shape else made


shapes = st.lists(st.integers(0, 5), min_size=1, max_size=4)


@st.composite
def alike(draw: Any) -> tuple[list[Any], int]:
    """Tensors that differ in their size along one dimension, and that dimension."""
    shape = draw(shapes)
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    dtype = draw(st.sampled_from(DTYPES))
    sizes = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    made = []
    for size in sizes:
        one = list(shape)
        one[dim] = size
        made.append(draw(values(one, dtype)))
    return made, dim


@given(alike())
def test_concat_is_what_torch_concatenates(case: tuple[list[Any], int]) -> None:
    tensors, dim = case
    expected = torch.cat(tensors, dim)

    assert same(expected, computed(Concat(lazy(*tensors), dim)))


@given(st.data(), shapes, st.sampled_from(DTYPES), st.integers(1, 4))
def test_interleave_takes_turns(data: st.DataObject, shape: list[int], dtype: str, count: int) -> None:
    dim = data.draw(st.integers(0, len(shape) - 1))
    tensors = [data.draw(values(shape, dtype)) for _ in range(count)]
    expected = torch.stack(tensors, dim + 1).flatten(dim, dim + 1)

    assert same(expected, computed(Interleave(lazy(*tensors), dim)))


@given(st.data(), shapes, st.sampled_from(["float32", "bfloat16", "int64", "bool"]))
def test_pad_is_what_torch_pads(data: st.DataObject, shape: list[int], dtype: str) -> None:
    dim = data.draw(st.integers(0, len(shape) - 1))
    before, after, value = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 3), st.sampled_from([0, 1])))
    tensor = data.draw(values(shape, dtype))
    rows = [tensor.new_full([*shape[:dim], count, *shape[dim + 1 :]], value) for count in (before, after)]
    expected = torch.cat([rows[0], tensor, rows[1]], dim)

    assert same(expected, computed(Pad(lazy(tensor)[0], dim, before, after, value)))


def same(expected: Any, found: Any) -> bool:
    """Whether two tensors have one dtype, one shape and the same bytes."""
    facts = (expected.dtype, expected.shape) == (found.dtype, found.shape)
    return facts and bytes_of(expected) == bytes_of(found)


def bytes_of(tensor: Any) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


LORA = (torch.randn(6, 8, dtype=torch.float16), torch.randn(2, 8), torch.randn(6, 2))
RECIPES: dict[str, Callable[[], Recipe]] = {
    "packed": lambda: Packed(lazy(torch.randn(7, 6, 5).permute(2, 0, 1))[0]),
    "concat": lambda: Concat(lazy(torch.randn(4, 3).T, torch.randn(3, 9)), 1),
    "interleave": lambda: Interleave(lazy(torch.randn(5, 4), torch.randn(5, 4)), 0),
    "pad": lambda: Pad(lazy(torch.randn(5, 4))[0], 1, 3, 2, 0.5),
    "cast": lambda: Cast(lazy(torch.randn(7, 6).T)[0], BY_TORCH["bfloat16"]),
    "weight norm": lambda: FoldedWeightNorm(*lazy(torch.rand(1, 5, 1), torch.randn(4, 5, 3)), 1),
    "batch norm": lambda: FoldedBatchNormWeight(*lazy(torch.randn(4, 5), torch.rand(4), torch.rand(4))),
    "bias": lambda: FoldedBatchNormBias(*lazy(*torch.rand(5, 6))),
    "adapter": lambda: MergedLora(*lazy(*LORA), 0.5),
}


@pytest.mark.parametrize("name", RECIPES)
@given(data=st.data())
def test_any_range_is_that_range_of_the_whole(name: str, data: st.DataObject) -> None:
    recipe = RECIPES[name]()
    nbytes = recipe.dtype.nbytes(torch.Size(recipe.shape).numel())
    whole, part = bytearray(nbytes), bytearray(data.draw(st.integers(0, nbytes)))
    offset = data.draw(st.integers(0, nbytes - len(part)))
    recipe.read_into(0, memoryview(whole))
    recipe.read_into(offset, memoryview(part))

    assert whole[offset : offset + len(part)] == part


@pytest.mark.parametrize("name", RECIPES)
def test_several_threads_read_at_once(name: str) -> None:
    recipe = RECIPES[name]()
    file = DerivedFile([recipe], "derived")
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda at: file.read(at, 1), range(file.nbytes)))

    assert file.read(0, file.nbytes) == b"".join(parts)


def test_large_tensors_are_made_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("statedict.recipes.derived._BLOCK_NBYTES", 1024)
    monkeypatch.setattr("statedict.recipes.derived._SCATTERED_NBYTES", 2048)
    monkeypatch.setattr("statedict.recipes.folding._BLOCK_ELEMENTS", 256)
    base, a, b = torch.randn(60, 300), torch.randn(4, 300), torch.randn(60, 4)
    g, v = torch.rand(60, 1), torch.randn(60, 300)
    expected = [base.T.bfloat16(), torch._weight_norm(v, g, 0), base + 0.5 * (b @ a)]
    found = [
        computed(Cast(lazy(base.T)[0], BY_TORCH["bfloat16"])),
        computed(FoldedWeightNorm(*lazy(g, v))),
        computed(MergedLora(*lazy(base, a, b), 0.5)),
    ]

    for one, other in zip(expected, found):
        torch.testing.assert_close(other, one)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, None])
@pytest.mark.parametrize("dtype", FLOATS)
def test_weight_norm_is_folded_as_the_old_hook_computes_it(dim: int | None, dtype: str) -> None:
    module = torch.nn.Conv1d(4, 6, 3).to(getattr(torch, dtype))
    with pytest.warns(FutureWarning, match="weight_norm"):
        module = torch.nn.utils.weight_norm(module, dim=dim)
    state = module.state_dict()
    module(torch.randn(1, 4, 5, dtype=getattr(torch, dtype)))
    made = computed(FoldedWeightNorm(*lazy(state["weight_g"], state["weight_v"]), dim))

    torch.testing.assert_close(made, module.weight.detach())


@pytest.mark.parametrize("dim", [0, 1, None])
def test_weight_norm_is_folded_as_the_parametrization_computes_it(dim: int | None) -> None:
    module = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(5, 7), dim=dim)
    state = module.state_dict()
    parts = lazy(state["parametrizations.weight.original0"], state["parametrizations.weight.original1"])

    torch.testing.assert_close(computed(FoldedWeightNorm(*parts, dim)), module.weight.detach())


def norm_of(channels: int, dtype: str) -> Any:
    """A batch norm that has seen something."""
    norm = torch.nn.BatchNorm2d(channels, eps=1e-3).to(getattr(torch, dtype))
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.uniform_(0.5, 2)
    return norm.eval()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_batch_norm_is_folded_as_torch_fuses_it(transposed: bool, bias: bool, dtype: str) -> None:
    kind = torch.nn.ConvTranspose2d if transposed else torch.nn.Conv2d
    module, norm = kind(4, 6, 3, bias=bias).to(getattr(torch, dtype)), norm_of(6, dtype)
    parts = (module.weight, module.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    # In bfloat16 torch would round after every step, so it computes in float64 too.
    of = [None if part is None else torch.nn.Parameter(part.double()) for part in parts]
    expected = torch.nn.utils.fusion.fuse_conv_bn_weights(*of[:4], norm.eps, *of[4:], transposed)
    weight, gamma, beta, mean, var = lazy(module.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    old_bias = lazy(module.bias)[0] if bias else None
    made = computed(FoldedBatchNormWeight(weight, gamma, var, norm.eps, 1 if transposed else 0))
    made_bias = computed(FoldedBatchNormBias(old_bias, gamma, beta, mean, var, norm.eps))

    torch.testing.assert_close(made, expected[0].detach().to(made.dtype))
    torch.testing.assert_close(made_bias, expected[1].detach().to(made.dtype))


def test_a_batch_norm_without_affine_parameters_is_folded() -> None:
    module, mean, var = torch.nn.Linear(3, 5), torch.randn(5), torch.rand(5)
    x = torch.randn(2, 3)
    weight, bias, *norm = lazy(module.weight, module.bias, mean, var)
    made = (
        computed(FoldedBatchNormWeight(weight, None, norm[1])),
        computed(FoldedBatchNormBias(bias, None, None, *norm)),
    )
    expected = torch.nn.functional.batch_norm(module(x), mean, var).detach()

    torch.testing.assert_close(torch.nn.functional.linear(x, *made), expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("transposed", [False, True])
def test_an_adapter_is_merged(dtype: str, transposed: bool) -> None:
    a, b = torch.randn(3, 8).to(getattr(torch, dtype)), torch.randn(6, 3).to(getattr(torch, dtype))
    base = torch.randn((8, 6) if transposed else (6, 8)).to(getattr(torch, dtype))
    delta = 0.25 * (b.double() @ a.double())
    expected = (base.double() + (delta.T if transposed else delta)).to(base.dtype)

    torch.testing.assert_close(computed(MergedLora(*lazy(base, a, b), 0.25, transposed)), expected)


def test_an_adapter_of_a_convolution_is_merged() -> None:
    base, a, b = torch.randn(6, 4, 3, 3), torch.randn(2, 4, 3, 3), torch.randn(6, 2, 1, 1)
    expected = base + 2 * torch.nn.functional.conv2d(a.transpose(0, 1), b).transpose(0, 1)

    torch.testing.assert_close(computed(MergedLora(*lazy(base, a, b), 2)), expected)


def test_derived_tensors_can_be_derived_from_again() -> None:
    a, b = torch.randn(4, 6), torch.randn(4, 6)
    first = as_checkpoint([Cast(one, BY_TORCH["float16"]) for one in lazy(a, b)])
    second = as_checkpoint([Concat([first["d0"][:, ::2], first["d1"]], 1)])
    found = second["d0"].torch()

    assert same(torch.cat([a.half()[:, ::2], b.half()], 1), found)


def test_compressed_and_big_endian_sources_are_read(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    array = numpy.arange(3000, dtype=">f4").reshape(50, 60)
    numpy.savez_compressed(tmp_path / "a.npz", a=array)
    with open_checkpoint(tmp_path / "a.npz") as checkpoint:
        found = computed(Concat([checkpoint["a"], checkpoint["a"][:, :7]], 1))

    assert same(torch.from_numpy(numpy.concatenate([array, array[:, :7]], 1).astype("<f4")), found)


def test_ranges_between_recipes_are_zeros() -> None:
    file = DerivedFile(
        [Packed(one) for one in lazy(torch.ones(3, dtype=torch.uint8), torch.ones(0), torch.ones(1))], "d"
    )

    assert [0, 64, 64] == [file.offsets(at) for at in range(3)]
    assert bytes([1] * 3 + [0] * 61) + bytes_of(torch.ones(1)) == file.read(0, file.nbytes)


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 13), (12, 1), (-1, 2), (sys.maxsize, 1)])
def test_a_read_past_the_end_is_an_error(offset: int, nbytes: int) -> None:
    file = DerivedFile([Packed(lazy(torch.ones(3))[0])], "derived")

    with pytest.raises(CorruptFile, match="derived: the derived tensors end too early"):
        file.read(offset, nbytes)


ONE, TWO, WHOLE = torch.ones(2, 3), torch.ones(3, 3), torch.ones(2, 3, dtype=torch.int64)
WRONG: dict[str, tuple[Callable[[], Recipe], str]] = {
    "nothing": (lambda: Concat([], 0), "nothing to join"),
    "concat shape": (lambda: Concat(lazy(ONE, TWO), 1), "tensor 't1'.*expected the shape of 't0' but for dimension 1"),
    "concat dtype": (lambda: Concat(lazy(ONE, WHOLE), 0), "dtypes differ .tensor 't1'.: expected float32"),
    "concat dim": (lambda: Concat(lazy(ONE, ONE), 2), "no dimension 2.*found dimensions 0 to 1"),
    "concat rank": (lambda: Concat(lazy(ONE, ONE[0]), 0), "expected 2 dimensions"),
    "interleave": (lambda: Interleave(lazy(ONE, TWO), 0), "tensor 't1'.*expected the shape of 't0', .2, 3."),
    "pad": (lambda: Pad(lazy(ONE)[0], 0, -1, 0), "fewer than none .tensor 't0'.: found -1 before"),
    "pad value": (lambda: Pad(lazy(WHOLE)[0], 0, 1, 0, 0.5), "0.5 is no value of int64"),
    "scalar": (lambda: Pad(lazy(torch.tensor(1.0))[0], 0, 1, 0), "without dimensions"),
    "cast": (lambda: Cast(lazy(WHOLE)[0], BY_TORCH["float32"]), "int64 can't be cast to float32"),
    "to whole": (lambda: Cast(lazy(ONE)[0], BY_TORCH["int64"]), "float32 can't be cast to int64"),
    "complex": (lambda: Cast(lazy(ONE + 1j)[0], BY_TORCH["float32"]), "complex64 can't be cast to float32"),
    "weight norm": (lambda: FoldedWeightNorm(*lazy(ONE[0], ONE)), "tensor 't0'.: expected 2 elements, found 3"),
    "batch norm": (lambda: FoldedBatchNormWeight(*lazy(ONE, ONE[0], ONE[0])), "tensor 't1'.: expected 2 elements"),
    "bias": (lambda: FoldedBatchNormBias(None, None, None, *lazy(ONE, ONE)), "no mean of channels"),
    "integers": (lambda: FoldedBatchNormWeight(lazy(WHOLE)[0], None, lazy(ONE)[0]), "no tensor of floats"),
    "adapter": (lambda: MergedLora(*lazy(ONE, ONE, ONE), 1), "the shapes don't fit .tensor 't0'"),
    "scaling": (lambda: MergedLora(*lazy(*LORA), float("nan")), "scaling is no number"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_said_with_its_keys(name: str) -> None:
    make, match = WRONG[name]

    with pytest.raises(RuleError, match=match):
        make()


def four_bits(shape: tuple[int, ...], stride: tuple[int, ...], data: bytes) -> LazyTensor:
    """A tensor of half bytes, as a safetensors file may hold it."""
    storage = Storage(0, len(data), Extent(0, 0, len(data)))
    entry = TensorEntry(("q",), BY_CODE["F4"], shape, StorageView(storage, 0, stride))
    manifest = Manifest("test", (FileFact("q", len(data)),), (storage,), {("q",): entry}, {}, entry)
    return Checkpoint(manifest, [MemoryFile(data)], source="q")["q"]


def test_half_bytes_are_joined_where_they_fill_bytes() -> None:
    source = four_bits((2, 4), (4, 1), b"\x12\x34\x56\x78")
    file = DerivedFile([Concat([source, source], 1), Pad(source, 0, 1, 0)], "derived")

    assert b"\x12\x34\x12\x34\x56\x78\x56\x78" == file.read(0, 8)
    assert b"\x00\x00\x12\x34\x56\x78" == file.read(64, 6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Concat([four_bits((2, 3), (3, 1), b"\x12\x34\x56")] * 2, 1),
        lambda: Packed(four_bits((2, 2), (1, 2), b"\x12\x34")),
        lambda: Pad(four_bits((4,), (1,), b"\x12\x34"), 0, 2, 0, 1),
        lambda: Packed(lazy(torch.ones(2, 2).to_sparse())[0]),
    ],
)
def test_what_has_no_whole_bytes_is_refused(make: Callable[[], Recipe]) -> None:
    with pytest.raises(Unsupported):
        make()

"""Rules that multiply out weights which are kept as a product, against what torch's own modules come to."""

from __future__ import annotations

from typing import Any

import pytest

import statedict
from statedict import RuleError, rules
from statedict.recipes.products import blocks_of

torch = pytest.importorskip("torch")
prune = pytest.importorskip("torch.nn.utils.prune")
nn = torch.nn
OLD, NEW = nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm


def made(state: Any, *steps: Any) -> dict[str, Any]:
    with statedict.remap(state, list(steps)) as found:
        return {key: tensor.torch().clone() for key, tensor in found.items()}


LAYERS = [
    (lambda: nn.Linear(5, 7), torch.rand(2, 5)),
    (lambda: nn.Conv2d(3, 4, 3), torch.rand(2, 3, 6, 6)),
    (lambda: nn.ConvTranspose2d(3, 4, 2), torch.rand(2, 3, 6, 6)),
    (lambda: nn.ConvTranspose1d(4, 4, 2), torch.rand(2, 4, 6)),
]


@pytest.mark.parametrize("wrap", [OLD, NEW])
@pytest.mark.parametrize("case", range(len(LAYERS)))
def test_a_spectral_norm_is_what_its_layer_uses_in_evaluation(wrap: Any, case: int) -> None:
    make, x = LAYERS[case]
    layer = wrap(make())
    for _ in range(3):
        layer(x)
    layer.eval()
    dim = 1 if "Transpose" in type(layer).__name__ or case > 1 else 0
    found = made({f"m.{key}": value for key, value in layer.state_dict().items()}, rules.fold_spectral_norm(dim=dim))
    plain = make()
    plain.load_state_dict({key.removeprefix("m."): value for key, value in found.items()})

    assert {"m.weight", "m.bias"} == set(found)
    torch.testing.assert_close(layer(x), plain(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_spectral_norm_of_several_blocks(dtype: Any) -> None:
    torch.manual_seed(0)
    w, u, v = torch.randn(700, 800, dtype=dtype), torch.randn(700, dtype=dtype), torch.randn(800, dtype=dtype)
    found = made({"weight_orig": w, "weight_u": u, "weight_v": v}, rules.fold_spectral_norm())
    sigma = u.double() @ w.double() @ v.double()

    assert dtype == found["weight"].dtype
    torch.testing.assert_close((w.double() / sigma).to(dtype), found["weight"])


def test_vectors_of_another_size_are_no_spectral_norm() -> None:
    state = {"a.weight_orig": torch.rand(3, 4), "a.weight_u": torch.rand(3), "a.weight_v": torch.rand(3)}
    with pytest.raises(RuleError, match=r"the sizes don't fit.*expected 4 elements, found 3"):
        made(state, rules.fold_spectral_norm())


@pytest.mark.parametrize("glob", ["*", "0"])
def test_pruned_weights_are_what_their_layer_uses(glob: str) -> None:
    net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    prune.l1_unstructured(net[0], "weight", 0.4)
    prune.random_unstructured(net[0], "bias", 0.4)
    if glob == "*":
        prune.ln_structured(net[1], "weight", 0.5, n=2, dim=0)
    found = made(net.state_dict(), rules.fold_pruning(glob))

    assert set(nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).state_dict()) == set(found)
    assert torch.equal(net[0].weight, found["0.weight"]) and torch.equal(net[0].bias, found["0.bias"])
    assert torch.equal(net[1].weight, found["1.weight"])


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float16])
def test_masks_of_other_dtypes(dtype: Any) -> None:
    orig, mask = torch.randn(4, 3), torch.tensor([[1, 0, 1]] * 4).to(dtype)

    assert torch.equal(orig * mask.float(), made({"w_orig": orig, "w_mask": mask}, rules.fold_pruning())["w"])
    with pytest.raises(RuleError, match="another shape"):
        made({"w_orig": orig, "w_mask": mask[:2]}, rules.fold_pruning())


def test_integers_by_rows() -> None:
    weight = torch.randn(6, 4)
    scale = weight.abs().amax(1)
    state = {"m.weight": (weight / scale[:, None] * 127).round().to(torch.int8), "m.SCB": scale, "m.bias": weight[0]}
    found = made(state, rules.fold_scale("{m...}.weight", "{m...}.SCB", 1 / 127))

    assert {"m.weight", "m.bias"} == set(found)
    torch.testing.assert_close(state["m.weight"].float() * scale[:, None] / 127, found["m.weight"])
    torch.testing.assert_close(weight, found["m.weight"], atol=float(scale.max()) / 127, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
@pytest.mark.parametrize("shape", [(64, 32), (40, 70), (3, 33, 48)])
@pytest.mark.parametrize("result", [None, "bfloat16", "float64"])
def test_scales_by_blocks(dtype: Any, shape: tuple[int, ...], result: str | None) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(shape) * 20).to(dtype)
    counts = [*shape[:-2], *[-(-size // 16) for size in shape[-2:]]]
    scale = torch.rand(counts) + 0.5
    block = (*[1] * (len(shape) - 2), 16, 16)
    rule = rules.fold_scale("{m...}.weight", "{m...}.weight_scale_inv", block=block, dtype=result)
    found = made({"m.weight": weight, "m.weight_scale_inv": scale}, rule)["m.weight"]
    wide = scale.repeat_interleave(16, -1).repeat_interleave(16, -2)[..., : shape[-2], : shape[-1]]
    after = getattr(torch, result or "float32")

    assert after == found.dtype
    torch.testing.assert_close((weight.to(torch.float64) * wide).to(after), found)


def test_one_scale_for_all() -> None:
    weight = torch.randn(5, 3).to(torch.float8_e4m3fn)
    for scale in (torch.tensor(0.5), torch.tensor([0.5])):
        found = made({"w": weight, "s": scale}, rules.fold_scale("w", "s"))

        assert torch.equal(weight.float() * 0.5, found["w"])


@pytest.mark.parametrize(
    ("shape", "scales", "sizes"),
    [
        ((512, 576), (4, 5), [{128}, {128}]),
        ((6, 4), (6,), [{1}, {4}]),
        ((6, 4), (), [{6}, {4}]),
        ((100, 8), (4, 1), [{25, 32}, {8}]),
        ((6, 4), (6, 4, 2), [set(), set()]),
        ((6, 4), (0, 1), [set(), {4}]),
        ((100, 8), (70, 1), [set(), {8}]),
    ],
)
def test_what_shapes_say_of_blocks(shape: Any, scales: Any, sizes: Any) -> None:
    assert sizes == blocks_of(shape, scales)


def test_blocks_that_shapes_do_not_say_are_asked_for() -> None:
    state = {"w": torch.zeros(100, 8, dtype=torch.int8), "s": torch.ones(4, 1)}
    with pytest.raises(RuleError, match=r"how large a block is.*block=\(128, 128\)"):
        made(state, rules.fold_scale("w", "s"))
    with pytest.raises(RuleError, match="the shapes don't fit"):
        made(state, rules.fold_scale("w", "s", block=(50, 8)))
    assert (100, 8) == made(state, rules.fold_scale("w", "s", block=(32, 8)))["w"].shape


def test_what_is_missing_or_wrong_is_said() -> None:
    with pytest.raises(RuleError, match=r"parts are missing: 'm\.weight'"):
        made({"m.SCB": torch.ones(3)}, rules.fold_scale("{m}.weight", "{m}.SCB"))
    with pytest.raises(RuleError, match="makes floats"):
        rules.fold_scale("w", "s", dtype="complex64")
    with pytest.raises(RuleError, match="at least 1"):
        rules.fold_scale("w", "s", block=(0, 4))
    for rule in (rules.fold_pruning(), rules.fold_spectral_norm(), rules.fold_scale("w", "s")):
        with pytest.raises(RuleError, match="matches nothing"):
            made({"x": torch.ones(3)}, rule)

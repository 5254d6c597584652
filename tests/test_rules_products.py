"""Weights that are kept as a product (a mask, a spectral norm, scales) become what torch makes of them."""

from __future__ import annotations

import pytest

import statedict
from statedict import rules
from statedict.errors import RuleError

torch = pytest.importorskip("torch")

from torch.nn.utils import parametrizations, prune, spectral_norm  # noqa: E402


def test_a_pruned_weight_is_the_one_that_the_module_computes_with() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Conv2d(3, 5, 3))
    for module in model:
        prune.random_unstructured(module, "weight", 0.5)
    with statedict.remap(model.state_dict(), [rules.fold_pruning()]) as made:
        assert ["0.bias", "0.weight", "1.bias", "1.weight"] == sorted(made)
        assert torch.equal(model[0].weight, made["0.weight"].torch())
        assert torch.equal(model[1].weight, made["1.weight"].torch())


@pytest.mark.parametrize("norm", [spectral_norm, parametrizations.spectral_norm])
@pytest.mark.parametrize(("module", "dim"), [(torch.nn.Linear(6, 4), 0), (torch.nn.ConvTranspose2d(3, 5, 2), 1)])
def test_a_spectral_norm_is_multiplied_out_as_in_evaluation(norm: object, module: torch.nn.Module, dim: int) -> None:
    torch.manual_seed(0)
    copy = type(module)(3, 5, 2) if dim else type(module)(6, 4)
    normed = norm(copy)  # type: ignore[operator]
    inputs = torch.randn(2, 3, 4, 4) if dim else torch.randn(2, 6)
    normed(inputs)
    normed.eval()
    normed(inputs)
    with statedict.remap(normed.state_dict(), [rules.fold_spectral_norm(dim=dim)]) as made:
        torch.testing.assert_close(made["weight"].torch(), normed.weight.detach(), rtol=1e-6, atol=1e-6)
        assert ["bias", "weight"] == sorted(made)


def test_integers_are_multiplied_with_the_scales_of_their_rows() -> None:
    torch.manual_seed(0)
    weight, scale = torch.randint(-127, 128, (6, 8), dtype=torch.int8), torch.rand(6)
    source = {"a.weight": weight, "a.SCB": scale}
    with statedict.remap(source, [rules.fold_scale("{m}.weight", "{m}.SCB", 1 / 127)]) as made:
        torch.testing.assert_close(made["a.weight"].torch(), weight.float() * scale[:, None] / 127)
        assert ["a.weight"] == list(made)


@pytest.mark.parametrize("shape", [(256, 128), (200, 130), (1, 1)])
def test_float8_is_multiplied_with_the_scale_of_each_block(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128))
    whole = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]
    rule = rules.fold_scale("{m}.weight", "{m}.weight_scale_inv", block=(128, 128))
    with statedict.remap({"a.weight": weight, "a.weight_scale_inv": scale}, [rule]) as made:
        torch.testing.assert_close(made["a.weight"].torch(), weight.float() * whole)


def test_a_scale_without_its_weight_is_refused_by_name() -> None:
    with pytest.raises(RuleError, match=r"parts are missing: .*a\.weight"):
        statedict.remap({"a.SCB": torch.rand(6)}, [rules.fold_scale("{m}.weight", "{m}.SCB")])

"""A plan that is tried: which tensors matter, whether the output is right, where it goes wrong, and what that decides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from doctor_models import GPT, Llama, Mixture, Vit, nn, torch, trained

import statedict
from statedict import StateDictError
from statedict.ops.diagnosing.probes import Probe


class Net(nn.Module):
    """Three blocks with attention, a norm with statistics, and a layer that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.norm = nn.BatchNorm1d(8)
        self.idle = nn.Linear(3, 3)

    def forward(self, ids: Any) -> Any:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.norm(x.transpose(1, 2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Any) -> Any:
        x = x + self.out((self.q(x) @ self.k(x).transpose(-1, -2)).softmax(-1) @ self.v(x))
        return x + self.down(self.up(x).relu())


IDS = torch.arange(10).reshape(2, 5)


def wrapped(state: Mapping[str, Any]) -> dict[str, Any]:
    return {f"module.{key}": value for key, value in state.items()}


def codes(diagnosis: Any) -> dict[str, Any]:
    return {finding.code: finding for finding in diagnosis.findings}


def test_tensors_that_nothing_uses_are_named_and_the_proof_is_said_to_be_of_use() -> None:
    found = codes(statedict.diagnose(wrapped(trained(Net()).state_dict()), Net(), probe=IDS))

    assert ("idle.weight", "idle.bias") == found["probe-no-effect"].keys
    assert "41 of 43" in found["probe-use"].message and "doesn't show that they are right" in found["probe-use"].message


@pytest.mark.parametrize("probe", [(IDS,), {"ids": IDS}, lambda model: model(IDS), Probe(IDS)])
def test_inputs_are_a_tensor_a_tuple_a_dict_or_a_function(probe: Any) -> None:
    found = statedict.diagnose(wrapped(trained(Net()).state_dict()), Net(), probe=probe)

    assert {"probe-use", "probe-no-effect"} <= set(codes(found))


def test_the_model_and_the_inputs_are_as_before() -> None:
    module, ids, source = trained(Net(), 5).train(), IDS.clone(), wrapped(trained(Net()).state_dict())
    before = {key: value.clone() for key, value in module.state_dict().items()}
    state = torch.random.get_rng_state()
    statedict.diagnose(source, module, probe=Probe(ids, reference=module))

    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    assert module.training and all(value.requires_grad and value.grad is None for value in module.parameters())
    assert torch.equal(IDS, ids) and torch.equal(state, torch.random.get_rng_state())
    assert not any(each._forward_hooks for each in module.modules())


@pytest.mark.parametrize("how", ["expected", "reference"])
def test_the_right_output_proves_what_matters(how: str) -> None:
    right = trained(Net())
    known = {"expected": right(IDS).detach()} if how == "expected" else {"reference": right}
    found = statedict.diagnose(wrapped(right.state_dict()), Net(), probe=Probe(IDS, **known))
    tiers = {mapped.target: mapped.tier for mapped in found.plan}

    assert "probe-agrees" in codes(found)
    assert "proven" == tiers["blocks.1.q.weight"] and "corroborated" == tiers["idle.weight"]


@pytest.mark.parametrize("place", ["blocks.0.down", "blocks.1.q", "blocks.2.up"])
def test_the_first_module_that_differs_from_the_reference_is_named(place: str) -> None:
    right = trained(Net())
    state = wrapped(right.state_dict())
    state[f"module.{place}.bias"] = state[f"module.{place}.bias"] + 3
    found = codes(statedict.diagnose(state, Net(), probe=Probe(IDS, reference=right)))

    assert f"The first module whose output is another is '{place}'" in found["probe-differs"].message


def test_a_reference_of_other_names_tells_where_it_begins_too() -> None:
    image = torch.rand(1, 3, 16, 16)
    state = trained(Vit(fused=True)).state_dict()
    state["blocks.1.mlp.fc2.weight"] = state["blocks.1.mlp.fc2.weight"] * 1.5
    right = trained(Vit(fused=True))
    found = codes(statedict.diagnose(state, Vit(fused=False), probe=Probe(image, reference=right)))

    assert "is 'vit.encoder.layer.1.output.dense'" in found["probe-differs"].message


def test_tensors_that_the_plan_leaves_open_are_named_where_the_output_differs() -> None:
    ids = torch.arange(6)[None]
    right = trained(Llama(meta=True))
    probe = Probe(ids, expected=right(ids) + 9)
    found = codes(statedict.diagnose(right.state_dict(), Llama(meta=False), probe=probe))

    assert "6 tensors of the model are not filled by the plan" in found["probe-differs"].message


def test_an_expected_output_alone_says_how_to_learn_more() -> None:
    right = trained(Net())
    found = codes(statedict.diagnose(wrapped(right.state_dict()), Net(), probe=Probe(IDS, expected=right(IDS) + 1)))

    assert "error" == found["probe-differs"].level and "reference=" in found["probe-differs"].message


def test_nan_is_said_with_the_module_that_it_comes_from() -> None:
    state = wrapped(trained(Net()).state_dict())
    state["module.blocks.2.up.weight"] = state["module.blocks.2.up.weight"] * float("nan")
    found = codes(statedict.diagnose(state, Net(), probe=IDS))

    assert "'blocks.2.up'" in found["probe-not-finite"].message


def test_an_output_that_varies_is_no_measure() -> None:
    class Noisy(Net):
        def forward(self, ids: Any) -> Any:
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(ids) + self.calls

    found = codes(statedict.diagnose(wrapped(trained(Net()).state_dict()), Noisy(), probe=IDS))

    assert "probe-varies" in found and "probe-no-effect" not in found


def test_a_model_on_the_meta_device_is_filled_and_run() -> None:
    with torch.device("meta"):
        module = Net()
    found = statedict.diagnose(wrapped(trained(Net()).state_dict()), module, probe=Probe(IDS, reference=trained(Net())))

    assert "probe-agrees" in codes(found) and all(value.is_meta for value in module.parameters())


def test_a_buffer_without_values_keeps_the_model_from_being_run() -> None:
    class Rotary(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("angles", torch.ones(3), persistent=False)

    with torch.device("meta"):
        module = Rotary()
    found = codes(statedict.diagnose(wrapped(trained(Net()).state_dict()), module, probe=IDS))

    assert "angles" in found["probe-not-run"].message


# -------------------------------------------------------------------- questions


def test_a_square_matrix_among_transposed_ones_is_decided() -> None:
    ids = torch.arange(6)[None]
    right = trained(GPT(conv1d=True))
    open_ = statedict.diagnose(right.state_dict(), GPT(conv1d=False))
    found = statedict.diagnose(right.state_dict(), GPT(conv1d=False), probe=Probe(ids, reference=right))
    turned = [mapped.target for mapped in found.plan if mapped.op == "transpose"]

    assert {"corroborated"} == {mapped.tier for mapped in open_.plan if "attn.c_proj.weight" in mapped.target}
    assert 12 == len(turned) and {"proven"} == {mapped.tier for mapped in found.plan}


def test_rows_of_rotary_embeddings_are_decided_for_all_heads() -> None:
    ids = torch.arange(6)[None]
    right, module = trained(Llama(meta=True)), Llama(meta=False)
    found = statedict.diagnose(right.state_dict(), module, probe=Probe(ids, reference=right))
    turned = {mapped.target: mapped.args["view"] for mapped in found.plan if mapped.op == "permute"}
    statedict.load_into(module, right.state_dict(), rules=found.rules)

    assert 6 == len(turned) and [4, 4, 2] == turned["model.layers.0.self_attn.q_proj.weight"]
    assert [2, 4, 2] == turned["model.layers.2.self_attn.k_proj.weight"]
    assert torch.allclose(module(ids), right(ids), atol=1e-4)


def test_of_a_model_and_its_average_the_right_one_is_found() -> None:
    right = trained(Net())
    both = {"model": trained(Net(), 3).state_dict(), "ema": right.state_dict()}
    found = statedict.diagnose(both, Net(), probe=Probe(IDS, reference=right))

    assert {("ema.embed.weight",)} == {mapped.sources for mapped in found.plan if mapped.target == "embed.weight"}
    assert "probe-decides" in codes(found)


def test_without_a_right_answer_nothing_is_decided() -> None:
    found = statedict.diagnose(trained(Llama(meta=True)).state_dict(), Llama(meta=False), probe=torch.arange(6)[None])

    assert {"undecidable"} == {mapped.tier for mapped in found.plan if "q_proj.weight" in mapped.target}


# -------------------------------------------------------------------- what can't be done


def raising(model: Any) -> Any:
    raise ZeroDivisionError("a\nb")


@pytest.mark.parametrize(
    ("probe", "words"),
    [
        (torch.ones(3), "the model can't be run on the probe"),
        (raising, "ZeroDivisionError: a"),
        (lambda model: 3, "no tensor"),
        (Probe(IDS, expected="nothing"), "no tensor in the expected output"),
    ],
)
def test_what_the_model_raises_is_one_line(probe: Any, words: str) -> None:
    with pytest.raises(StateDictError, match=words) as caught:
        statedict.diagnose(wrapped(trained(Net()).state_dict()), Net(), probe=probe)

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("target", [None, {"embed.weight": torch.ones(3)}])
def test_a_probe_needs_a_module(target: Any) -> None:
    with pytest.raises(StateDictError, match="model that can be run"):
        statedict.diagnose({"embed.weight": torch.ones(3)}, target, probe=IDS)


def test_experts_that_the_input_does_not_reach_are_said_to_have_no_effect() -> None:
    class One(Mixture):
        def forward(self, ids: Any) -> Any:
            x = self.model.embed_tokens(ids)
            for layer in self.model.layers:
                x = x + layer.mlp.experts.get_submodule("3").down_proj(layer.mlp.experts.get_submodule("3").up_proj(x))
            return self.lm_head(x)

    module = One(stacked=False, count=4)
    found = codes(statedict.diagnose(wrapped(trained(One(stacked=False, count=4)).state_dict()), module, probe=IDS))

    assert "model.layers.0.mlp.experts.2.up_proj.weight" in found["probe-no-effect"].keys
    assert "model.layers.0.mlp.experts.3.up_proj.weight" not in found["probe-no-effect"].keys


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_parametrised_models_are_run(wrap: Callable[[Any], Any]) -> None:
    def make() -> Any:
        return nn.Sequential(wrap(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))

    right = trained(make())
    found = codes(
        statedict.diagnose(wrapped(right.state_dict()), make(), probe=Probe(torch.ones(2, 3), reference=right))
    )

    assert "probe-agrees" in found

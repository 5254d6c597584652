"""Faults as people have them, one at a time and stacked: what a model and a file come to, and that the mapping is the right one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from doctor_models import GPT, Bert, BertClassifier, Llama, Mixture, ResNet, Vit, nn, torch, trained

import statedict
from statedict import KeyMismatch, StateDictError
from statedict.ops.diagnosing.probes import Probe

IMAGE = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(12).reshape(2, 6)


def named(state: Any, change: Callable[[str], str]) -> dict[str, Any]:
    return {change(key): value for key, value in state.items()}


def ops_of(diagnosis: Any) -> Counter[str]:
    return Counter(mapped.op for mapped in diagnosis.plan if mapped.is_claim)


def loaded(target: Any, source: Any) -> Any:
    """The model after ``rules="auto"``, set to evaluation."""
    statedict.load_into(target, source, rules="auto")
    return target.eval()


# -------------------------------------------------------------------- wrappers, nesting and parts: names alone


class Fault(NamedTuple):
    """What happened to a state dict on its way, and the words that the doctor says of it."""

    name: str
    change: Callable[[dict[str, Any]], dict[str, Any]]
    words: str = ""


def prefixed(prefix: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: named(state, lambda key: prefix + key)


def old_norms(state: dict[str, Any]) -> dict[str, Any]:
    """As files of TensorFlow's time name the parameters of a norm (C5)."""
    return named(
        state,
        lambda key: key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"),
    )


WRAPPERS = [
    Fault("R1 DataParallel", prefixed("module."), "DataParallel"),
    Fault("A2 compiled", prefixed("_orig_mod."), "torch.compile"),
    Fault(
        "A3 FSDP inside",
        lambda state: named(state, lambda key: re.sub(r"layer\.(\d)\.", r"layer.\1._fsdp_wrapped_module.", key)),
    ),
    Fault(
        "A5 checkpointed",
        lambda state: named(state, lambda key: key.replace("layer.", "layer._checkpoint_wrapped_module.")),
    ),
    Fault("A6 Lightning's", prefixed("_forward_module.")),
    Fault("A7 stacked", prefixed("module._orig_mod.")),
    Fault("B3 attribute", prefixed("model.")),
]
CONTENTS = [
    Fault("C5 gamma and beta", old_norms),
    Fault("C2 position_ids", lambda state: {**state, "bert.embeddings.position_ids": torch.arange(12)[None]}),
    Fault(
        "C9 litter",
        lambda state: {**state, **{f"bert.encoder.layer.{at}.total_ops": torch.zeros(1) for at in range(3)}},
    ),
]
NESTINGS = [
    Fault("flat", lambda state: state),
    Fault("R4 training", lambda state: {"epoch": 3, "model_state_dict": state, "best": 0.5}, "'model_state_dict'"),
    Fault(
        "R5 Lightning",
        lambda state: {"state_dict": state, "global_step": 5, "hyper_parameters": {"lr": 0.1}},
        "'state_dict'",
    ),
]


def stacks() -> Iterator[tuple[Fault, ...]]:
    """Each fault alone, and two and three at once."""
    nothing = Fault("", lambda state: state)
    for content in (nothing, *CONTENTS):
        for wrapper in (nothing, *WRAPPERS):
            for nesting in NESTINGS:
                yield content, wrapper, nesting


@pytest.mark.parametrize(
    "faults", list(stacks()), ids=lambda faults: " + ".join(fault.name for fault in faults if fault.name)
)
def test_faults_of_names_stacked(faults: tuple[Fault, ...]) -> None:
    right = trained(BertClassifier())
    state: Any = dict(right.state_dict())
    for fault in faults:
        state = fault.change(state)
    found = statedict.diagnose(state, BertClassifier())
    truth = {id(value): key for key, value in right.state_dict().items()}
    flat = statedict.open(state)
    wrong = [
        each for each in found.plan if not torch.equal(flat[each.sources[0]].torch(), right.state_dict()[each.target])
    ]

    assert [] == wrong and Counter(copy=len(truth)) == ops_of(found)
    if not faults[0].name:
        assert all(fault.words in found.sentence for fault in faults)
    assert torch.equal(right(IDS), loaded(BertClassifier(), state)(IDS))


def test_r3_a_child_that_is_really_called_module_is_left_alone() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.other = nn.Linear(3, 3), nn.Linear(3, 2)

    found = statedict.diagnose(trained(Own()).state_dict(), Own())

    assert found and () == tuple(found.rules)


def test_r5_what_lightning_saved_beside_the_model_is_listed_and_not_used() -> None:
    state = {"state_dict": {**named(trained(ResNet()).state_dict(), "model.{}".format), "loss.weight": torch.ones(10)}}
    found = statedict.diagnose(state, ResNet())

    assert Counter(copy=92) == ops_of(found)
    assert ["state_dict.loss.weight"] == [left.key for left in found.dropped]


def test_r6_of_two_trees_that_both_fit_a_person_must_choose() -> None:
    state = {"model": trained(ResNet()).state_dict(), "ema": trained(ResNet(), 1).state_dict()}
    found = statedict.diagnose(state, ResNet())

    assert Counter() == ops_of(found)
    assert "'model'" in found.question and "'ema'" in found.question


def test_r8_an_averaged_model() -> None:
    right = trained(ResNet())
    averaged = torch.optim.swa_utils.AveragedModel(right)
    found = statedict.diagnose(averaged.state_dict(), ResNet())

    assert Counter(copy=92) == ops_of(found) and ["n_averaged"] == [left.key for left in found.dropped]
    assert torch.equal(right(IMAGE), loaded(ResNet(), averaged.state_dict())(IMAGE))


def test_r9_a_base_model_and_one_with_a_head() -> None:
    there = statedict.diagnose(trained(Bert()).state_dict(), BertClassifier())
    back = statedict.diagnose(trained(BertClassifier()).state_dict(), Bert())

    assert Counter(copy=54) == ops_of(there) == ops_of(back)
    assert ["classifier.weight", "classifier.bias"] == [left.key for left in there.unfilled]
    assert ["classifier.weight", "classifier.bias"] == [left.key for left in back.dropped]


@pytest.mark.parametrize("with_metadata", [True, False])
def test_r10_counters_of_batch_norms_are_not_missed(with_metadata: bool) -> None:
    right = trained(ResNet())
    state = right.state_dict()
    for key in [key for key in state if key.endswith("num_batches_tracked")]:
        del state[key]
    if not with_metadata:
        state = dict(state)
    found = statedict.diagnose(state, ResNet())

    assert found and Counter(copy=77) == ops_of(found)
    assert torch.equal(right(IMAGE), loaded(ResNet(), state)(IMAGE))


# -------------------------------------------------------------------- reparametrised


def chain(wrap: Callable[[Any], Any] = lambda layer: layer) -> Any:
    return nn.Sequential(wrap(nn.Linear(4, 6)), nn.Tanh(), wrap(nn.Linear(6, 3)))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
@pytest.mark.parametrize("old_first", [True, False])
def test_r11_r12_old_and_new_forms_of_a_reparametrisation(kind: str, old_first: bool) -> None:
    forms = [getattr(nn.utils, kind), getattr(nn.utils.parametrizations, kind)]
    source, target = forms if old_first else forms[::-1]
    right = chain(source).eval()
    right(torch.ones(2, 4))
    module = loaded(chain(target), right.state_dict())

    assert torch.allclose(right(torch.ones(2, 4)), module(torch.ones(2, 4)), atol=1e-5)


def test_r14_counters_of_a_profiler_are_left_out() -> None:
    right = trained(ResNet())
    state = {**right.state_dict(), "conv1.total_ops": torch.zeros(1), "fc.total_params": torch.zeros(1)}

    assert statedict.diagnose(state, ResNet())
    assert torch.equal(right(IMAGE), loaded(ResNet(), state)(IMAGE))


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)), nn.Sequential(nn.Conv2d(3, 4, 3))),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))),
        (chain(nn.utils.parametrizations.weight_norm), chain()),
    ],
)
def test_r13_r15_what_would_have_to_be_computed_is_not_loaded_by_itself(source: Any, target: Any) -> None:
    with pytest.raises(KeyMismatch):
        statedict.load_into(target, source.state_dict(), rules="auto")


# -------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("source", "target", "keys"),
    [
        (lambda: ResNet(), lambda: ResNet(5), {"fc.weight", "fc.bias"}),
        (
            lambda: GPT(conv1d=True),
            lambda: GPT(conv1d=True, vocabulary=64),
            {"transformer.wte.weight", "lm_head.weight"},
        ),
        (
            lambda: GPT(conv1d=True, vocabulary=64),
            lambda: GPT(conv1d=True),
            {"transformer.wte.weight", "lm_head.weight"},
        ),
        (lambda: ResNet(), lambda: ResNet(channels=1), {"conv1.weight"}),
        (lambda: ResNet(), lambda: ResNet(channels=4), {"conv1.weight"}),
        (lambda: Vit(fused=True), lambda: Vit(fused=True, tokens=37), {"pos_embed"}),
        (lambda: GPT(conv1d=True), lambda: GPT(conv1d=True, positions=48), {"transformer.wpe.weight"}),
    ],
)
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_r16_to_r21_a_tensor_of_another_size_is_said_and_never_filled(
    source: Any, target: Any, keys: set[str], prefix: str
) -> None:
    state = named(trained(source()).state_dict(), lambda key: prefix + key)
    found = statedict.diagnose(state, target())
    unfilled = {left.key for left in found.unfilled}

    assert keys == unfilled and len(target().state_dict()) - len(keys) == sum(ops_of(found).values())
    with pytest.raises(StateDictError):
        statedict.load_into(target(), state, rules="auto")


# -------------------------------------------------------------------- layouts


@pytest.mark.parametrize("prefix", ["", "model."])
def test_r22_transposed_layers_and_the_square_one_among_them(prefix: str) -> None:
    right = trained(GPT(conv1d=True))
    state = named(right.state_dict(), lambda key: prefix + key)
    found = statedict.diagnose(state, GPT(conv1d=False))
    asked = {mapped.target for mapped in found.plan if mapped.question}

    square = {f"transformer.h.{at}.attn.c_proj.weight" for at in range(3)}

    # Shipped rules know the names of the first, and say that the square ones are transposed as well.
    assert ((9, square) if prefix else (12, set())) == (ops_of(found)["transpose"], asked)
    decided = statedict.diagnose(state, GPT(conv1d=False), probe=Probe(IDS, reference=right))
    module = GPT(conv1d=False).eval()
    statedict.load_into(module, state, rules=decided.rules)
    assert torch.allclose(right(IDS), module(IDS), atol=1e-5)


def test_r23_a_linear_layer_and_a_convolution_of_one_by_one() -> None:
    right = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1))
    module = loaded(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), right.state_dict())
    x = torch.rand(1, 8)

    assert torch.allclose(right(x[..., None, None])[..., 0, 0], module(x), atol=1e-6)
    assert torch.equal(
        right[0].weight, loaded(nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)), module.state_dict())[0].weight
    )


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("nesting", NESTINGS, ids=lambda fault: fault.name)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_r24_attention_split_and_fused(fused: bool, nesting: Fault, prefix: str) -> None:
    right = trained(Vit(fused=fused))
    state = nesting.change(named(right.state_dict(), lambda key: prefix + key))
    found = statedict.diagnose(state, Vit(fused=not fused))

    assert (Counter(copy=38, split=18) if fused else Counter(copy=38, concat=6)) == ops_of(found)
    assert torch.allclose(right(IMAGE), loaded(Vit(fused=not fused), state)(IMAGE), atol=1e-5)


def test_r25_parts_that_go_head_by_head_are_refused_by_a_probe() -> None:
    right = trained(Vit(fused=True))
    state = right.state_dict()
    for key in [key for key in state if "attn.qkv" in key]:  # three parts of 16 rows, as four heads of three parts
        value = state[key]
        state[key] = value.view(3, 4, 4, *value.shape[1:]).transpose(0, 1).reshape(value.shape)
    found = statedict.diagnose(state, Vit(fused=False), probe=Probe(IMAGE, reference=right))

    assert "vit.encoder.layer.0.attention.attention" in next(
        each.message for each in found.findings if each.code == "probe-differs"
    )


def test_r26_rows_of_rotary_embeddings_are_a_question_without_a_probe() -> None:
    right = trained(Llama(meta=True))
    found = statedict.diagnose(right.state_dict(), Llama(meta=False))
    asked = {mapped.target.rpartition("self_attn.")[2] for mapped in found.plan if not mapped.is_claim}

    assert {"q_proj.weight", "k_proj.weight"} == asked and Counter(copy=24) == ops_of(found)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_r27_experts_in_a_list_and_stacked(prefix: str) -> None:
    right = trained(Mixture(stacked=False))
    found = statedict.diagnose(named(right.state_dict(), lambda key: prefix + key), Mixture(stacked=True))
    stack = next(each for each in found.plan if each.target == "model.layers.2.mlp.experts.down_proj")

    assert Counter(copy=31, stack=6) == ops_of(found)
    assert [f"{prefix}model.layers.2.mlp.experts.{at}.down_proj.weight" for at in range(12)] == list(stack.sources)


def test_a_missing_expert_is_no_stack() -> None:
    state = trained(Mixture(stacked=False)).state_dict()
    del state["model.layers.1.mlp.experts.5.down_proj.weight"]
    found = statedict.diagnose(state, Mixture(stacked=True))

    assert "model.layers.1.mlp.experts.down_proj" in {left.key for left in found.unfilled}


# -------------------------------------------------------------------- dtype, devices, ties, networks


def test_r30_integer_weights_are_never_loaded_as_floats() -> None:
    state = trained(BertClassifier()).state_dict()
    for key in [key for key in state if key.endswith("dense.weight")]:
        state[key.replace("weight", "SCB")] = torch.ones(len(state[key]))
        state[key] = state[key].to(torch.int8)
    found = statedict.diagnose(state, BertClassifier())

    assert 10 == len([key for each in found.findings if each.code == "not-numbers" for key in each.keys])
    with pytest.raises(StateDictError, match="quantised"):
        statedict.load_into(BertClassifier(), state, rules="auto")


def test_r31_a_model_on_the_meta_device(tmp_path: Path) -> None:
    right = trained(ResNet())
    torch.save(named(right.state_dict(), "module.{}".format), tmp_path / "x.pth")
    with torch.device("meta"):
        module = ResNet()

    assert torch.equal(right(IMAGE), loaded(module, tmp_path / "x.pth")(IMAGE))


@pytest.mark.parametrize("gone", ["lm_head.weight", "transformer.wte.weight"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_r32_half_of_a_tied_pair_is_enough(gone: str, prefix: str) -> None:
    right = trained(GPT(conv1d=True))
    state = named({key: value for key, value in right.state_dict().items() if key != gone}, lambda key: prefix + key)
    found = statedict.diagnose(state, GPT(conv1d=True))

    assert 41 == sum(ops_of(found).values())
    assert torch.equal(right(IDS), loaded(GPT(conv1d=True), state)(IDS))


@pytest.mark.parametrize("nesting", NESTINGS, ids=lambda fault: fault.name)
@pytest.mark.parametrize(
    ("source", "target"),
    [
        (lambda: BertClassifier(), lambda: ResNet()),
        (lambda: Bert(layers=3), lambda: Bert(layers=5)),
        (lambda: Bert(layers=5), lambda: Bert(layers=3)),
        (lambda: Bert(width=16), lambda: Bert(width=24)),
        (lambda: Vit(fused=True), lambda: Llama(meta=False)),
    ],
)
def test_r38_another_network_is_said_and_nothing_is_mapped(source: Any, target: Any, nesting: Fault) -> None:
    found = statedict.diagnose(nesting.change(trained(source()).state_dict()), target())

    assert Counter() == ops_of(found) and "networks" in found.refusal

"""What the doctor says about one checkpoint: where it was saved from, what is missing, and what looks wrong in its values."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from statedict.manifest import Finding
from statedict.ops.diagnosing.contents import examine
from statedict.ops.diagnosing.examination import Examination

torch = pytest.importorskip("torch")

State = dict[str, Any]


def trained() -> State:
    """A state dict whose values look as after a training: nothing is as it was made."""
    generator = torch.Generator().manual_seed(7)
    model = torch.nn.Sequential(
        OrderedDict(
            conv1=torch.nn.Conv2d(3, 8, 3),
            bn1=torch.nn.BatchNorm2d(8),
            conv2=torch.nn.Conv2d(8, 16, 3),
            bn2=torch.nn.BatchNorm2d(16),
            fc=torch.nn.Linear(16, 10),
        )
    )
    state = model.state_dict()
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            tensor.fill_(100)
        elif name.endswith("running_var"):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        else:
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return dict(state)


def blocks(count: int, experts: int = 0) -> State:
    """Blocks of a transformer, values random."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"attn.q.weight": (8, 8), "attn.k.weight": (8, 8), "mlp.weight": (16, 8), "norm.weight": (8,)}
    shapes |= {f"experts.{number}.w1.weight": (16, 8) for number in range(experts)}
    names = {f"layers.{at}.{name}": shape for at in range(count) for name, shape in shapes.items()}
    return {name: torch.randn(shape, generator=generator) + 0.2 for name, shape in names.items()}


def found(examination: Examination, code: str) -> Finding:
    """The one finding with that code."""
    (finding,) = [finding for finding in examination.findings if finding.code == code]
    return finding


def codes(examination: Examination) -> set[str]:
    """The codes of what looks wrong."""
    return {finding.code for finding in examination.wrong}


def without(state: State, *words: str) -> State:
    return {name: tensor for name, tensor in state.items() if not any(word in name for word in words)}


# -------------------------------------------------------------------- one fault each


def data_parallel(state: State) -> State:
    return {f"module.{name}": tensor for name, tensor in state.items()}


def compiled(state: State) -> State:
    return {f"_orig_mod.{name}": tensor for name, tensor in state.items()}


def fsdp(state: State) -> State:
    return {name.replace(".", "._fsdp_wrapped_module."): tensor for name, tensor in state.items()}


def checkpoint_wrapped(state: State) -> State:
    return {name.replace(".", "._checkpoint_wrapped_module."): tensor for name, tensor in state.items()}


def averaged(state: State) -> State:
    return {"n_averaged": torch.tensor(5), **data_parallel(state)}


def half_prefixed(state: State) -> State:
    return {f"module.{name}" if at % 2 else name: tensor for at, (name, tensor) in enumerate(state.items())}


def two_copies(state: State) -> State:
    return {**state, "module.fc.weight": torch.randn(21, 16), "module.fc.bias": torch.randn(21)}


def profiled(state: State) -> State:
    return {**state, "total_ops": torch.tensor([1.0]), "conv1.total_params": torch.tensor([2.0])}


def with_nan(state: State) -> State:
    weight = state["fc.weight"].clone()
    weight[3, 2] = weight[7, 0] = float("nan")
    return {**state, "fc.weight": weight}


def with_bad_statistics(state: State) -> State:
    return {**state, "bn2.running_var": torch.full((16,), float("nan"))}


def negative_variance(state: State) -> State:
    return {**state, "bn2.running_var": state["bn2.running_var"] - 1.4}


def zeroed(state: State) -> State:
    return {**state, "conv2.weight": torch.zeros_like(state["conv2.weight"])}


def fresh_statistics(state: State) -> State:
    made = torch.nn.BatchNorm2d(16).state_dict()
    return {**state, **{f"bn2.{name}": tensor for name, tensor in made.items()}}


def uninitialised(state: State) -> State:
    weight = state["conv2.weight"].clone()
    weight.view(-1)[:8] = torch.tensor([1e37, -3e33, 5e-41, 2e31, 0.0, 1e-44, 7e35, -9e37])
    return {**state, "conv2.weight": weight}


def denormal(state: State) -> State:
    return {**state, "fc.weight": torch.rand(10, 16) * 1e-38}


def empty_shells(state: State) -> State:
    return {name: torch.empty(0) if name.endswith("weight") else tensor for name, tensor in state.items()}


def bare_integers(state: State) -> State:
    return {**state, "fc.weight": torch.randint(-127, 127, (10, 16), dtype=torch.int8)}


def bare_float8(state: State) -> State:
    return {**state, "fc.weight": state["fc.weight"].to(torch.float8_e4m3fn)}


def on_meta(state: State) -> State:
    return {**state, "fc.weight": torch.empty(10, 16, device="meta")}


def flat_parameters(state: State) -> State:
    return {**state, "head._flat_param": torch.randn(1000)}


FAULTS: dict[str, Callable[[State], State]] = {
    "data-parallel": data_parallel,
    "compiled": compiled,
    "fsdp": fsdp,
    "checkpoint-wrapper": checkpoint_wrapped,
    "averaged-model": averaged,
    "mixed-prefix": half_prefixed,
    "duplicate-copies": two_copies,
    "profiler-litter": profiled,
    "non-finite": with_nan,
    "negative-variance": negative_variance,
    "constant-weights": zeroed,
    "fresh-statistics": fresh_statistics,
    "uninitialised": uninitialised,
    "empty-weights": empty_shells,
    "scale-missing": bare_integers,
    "float8-without-scale": bare_float8,
    "meta-tensors": on_meta,
    "flat-parameters": flat_parameters,
}


def test_a_trained_state_dict_has_no_findings() -> None:
    assert [] == [finding.code for finding in examine(trained()).findings]


@pytest.mark.parametrize("code", FAULTS)
def test_each_fault_is_found_and_nothing_else(code: str) -> None:
    examination = examine(FAULTS[code](trained()))

    assert {code} == codes(examination)


STACKS = [
    ("profiler-litter", "data-parallel"),
    ("non-finite", "compiled", "data-parallel"),
    ("scale-missing", "averaged-model"),
    ("constant-weights", "fresh-statistics", "data-parallel"),
    ("uninitialised", "negative-variance", "compiled"),
    ("empty-weights", "fsdp"),
    ("float8-without-scale", "profiler-litter", "checkpoint-wrapper"),
    ("flat-parameters", "compiled"),
    ("non-finite", "profiler-litter", "mixed-prefix"),
    ("fresh-statistics", "compiled", "averaged-model"),
]


@pytest.mark.parametrize("stack", STACKS, ids="+".join)
def test_faults_on_top_of_each_other_are_all_found(stack: tuple[str, ...]) -> None:
    state = trained()
    for code in stack:
        state = FAULTS[code](state)

    assert set(stack) == codes(examine(state))


@pytest.mark.parametrize("stack", STACKS, ids="+".join)
def test_faults_are_found_inside_a_training_checkpoint(stack: tuple[str, ...], tmp_path: Path) -> None:
    state = trained()
    for code in stack:
        state = FAULTS[code](state)
    torch.save({"epoch": 3, "model_state_dict": state}, tmp_path / "run.pth")
    examination = examine(tmp_path / "run.pth")

    assert set(stack) == codes(examination)
    assert "model_state_dict" == examination.facts["weights"][0]["key"]


# -------------------------------------------------------------------- what is said


def test_a_prefix_is_named_with_what_takes_it_away(tmp_path: Path) -> None:
    torch.save(data_parallel(trained()), tmp_path / "ddp.pth")
    finding = found(examine(tmp_path / "ddp.pth"), "data-parallel")

    assert "all 16 names begin with 'module.'" in finding.message
    assert "--weights-only`" in finding.message
    assert 16 == len(finding.keys)


def test_rows_with_nan_are_named() -> None:
    finding = found(examine(with_nan(trained())), "non-finite")

    assert "(2 values in rows {3,7} of 10)" in finding.message
    assert ("fc.weight",) == finding.keys


def test_a_tensor_of_nan_alone_is_said_so() -> None:
    state = trained() | {"fc.bias": torch.full((10,), float("inf"))}

    assert "'fc.bias' (every value)" in found(examine(state), "non-finite").message


def test_nan_in_statistics_alone_can_be_repaired() -> None:
    assert "update_bn" in found(examine(with_bad_statistics(trained())), "non-finite").message


def test_nan_in_the_state_of_an_optimizer_is_told_from_that_in_weights(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(3, 4))
    adam = torch.optim.Adam([weight])
    weight.grad = torch.full((3, 4), float("nan"))
    adam.step()
    torch.save({"model": trained(), "optimizer": adam.state_dict()}, tmp_path / "run.pth")
    finding = found(examine(tmp_path / "run.pth"), "non-finite")

    assert "beside the weights" in finding.message
    assert {"optimizer.state.0.exp_avg", "optimizer.state.0.exp_avg_sq"} == set(finding.keys)


def test_a_mask_of_minus_infinity_is_no_fault() -> None:
    mask = torch.full((8, 8), float("-inf")).triu(1)

    assert not examine(trained() | {"attn_mask": mask}).wrong


def test_a_mask_of_the_smallest_number_is_no_fault() -> None:
    mask = torch.full((8, 8), torch.finfo(torch.float32).min).triu(1)

    assert not examine(trained() | {"buffer": mask}).wrong


def test_values_like_denormal_noise_are_found() -> None:
    assert "uninitialised" in codes(examine(denormal(trained())))


def test_copies_that_differ_in_shape_are_an_error() -> None:
    finding = found(examine(two_copies(trained())), "duplicate-copies")

    assert "error" == finding.level
    assert "2 pairs of them differ in shape" in finding.message


def test_a_module_that_is_really_called_module_is_left_alone() -> None:
    class Named(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = torch.nn.Linear(4, 4)
            self.head = torch.nn.Linear(4, 2)

    assert not examine(Named().state_dict()).wrong


def test_an_empty_shell_points_to_zero_to_fp32() -> None:
    finding = found(examine(empty_shells(trained())), "empty-weights")

    assert "zero_to_fp32.py" in finding.message
    assert "5 of 14 weights have no elements" in finding.message


# -------------------------------------------------------------------- gaps


def test_a_block_that_is_missing_is_named() -> None:
    finding = found(examine(without(blocks(12), "layers.5.")), "missing-blocks")

    assert "there are blocks {0…4,6…11}, but not block 5" in finding.message


def test_an_expert_that_other_layers_have_is_an_error() -> None:
    finding = found(examine(without(blocks(3, experts=8), "layers.1.experts.5.")), "missing-experts")

    assert "error" == finding.level
    assert "but not expert 5" in finding.message


def test_the_last_expert_is_missed_too() -> None:
    examination = examine(without(blocks(3, experts=4), "layers.2.experts.3."))

    assert "but not expert 3" in found(examination, "missing-experts").message


def test_a_block_that_lacks_a_tensor_is_named() -> None:
    finding = found(examine(without(blocks(8), "layers.4.attn.k")), "incomplete-block")

    assert "'attn.k.weight'" in finding.message


def test_blocks_that_begin_late_are_a_part_of_a_network() -> None:
    state = {name: tensor for name, tensor in blocks(24).items() if int(name.split(".")[1]) >= 12}

    assert {"late-blocks"} == codes(examine(state))


def test_layers_between_which_others_have_no_tensors_are_no_gap() -> None:
    layers = [torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)), torch.nn.ReLU()] * 6
    model = torch.nn.Sequential(*copy.deepcopy(layers))

    assert not examine(model.state_dict()).wrong


def test_an_output_layer_without_its_embedding_is_half_a_pair() -> None:
    state = {**blocks(2), "lm_head.weight": torch.randn(300, 8)}

    assert {"half-tied"} == codes(examine(state))


def test_an_embedding_whose_output_layer_is_tied_is_worth_a_note() -> None:
    state = {f"model.{name}": tensor for name, tensor in blocks(2).items()}
    finding = found(examine({**state, "model.embed_tokens.weight": torch.randn(300, 8)}), "half-tied")

    assert "info" == finding.level


# -------------------------------------------------------------------- several state dicts in one file


def test_weights_and_averages_are_a_question_with_their_distance() -> None:
    state = trained()
    average = {name: tensor * 1.01 if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    examination = examine({"model": state, "ema": average})

    assert "differ by 1 %" in found(examination, "two-candidates").message
    assert "Which weights are meant, those under 'model' or those under 'ema'?" == examination.question


def test_a_best_state_that_equals_the_last_is_found() -> None:
    state = trained()
    examination = examine({"model": state, "best": copy.deepcopy(state)})

    assert "without a copy" in found(examination, "equal-copies").message


def test_averages_that_equal_the_weights_were_never_updated() -> None:
    state = trained()
    examination = examine({"model": state, "ema": copy.deepcopy(state)})

    assert "the averages were never updated" in found(examination, "equal-copies").message


def test_two_names_for_one_memory_are_found(tmp_path: Path) -> None:
    state = trained()
    torch.save({"model": state, "best": dict(state)}, tmp_path / "run.pth")

    assert {"aliased-copies"} == codes(examine(tmp_path / "run.pth"))


def test_averages_with_dots_taken_out_are_named() -> None:
    state = trained()
    floats = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    mangled = {f"model_ema.{name.replace('.', '')}": tensor * 0.9 for name, tensor in floats.items()}
    finding = found(examine({**state, **mangled}), "inner-averages")

    assert "with their dots taken out" in finding.message


def test_names_that_could_mean_two_tensors_are_not_matched() -> None:
    state = {"a.b1.weight": torch.randn(3, 3), "a.b.1.weight": torch.randn(3, 3), "c.weight": torch.randn(3, 3)}
    mangled = {f"ema_{name.replace('.', '_')}": tensor for name, tensor in state.items()}
    mangled["ema_ab1weight"] = torch.randn(3, 3)
    finding = found(examine({**state, **mangled}), "mangled-averages")

    assert "warning" == finding.level
    assert "could mean several tensors" in finding.message


def test_a_best_file_that_equals_the_last_is_said(tmp_path: Path) -> None:
    for name in ("best.pth", "last.pth"):
        torch.save(trained(), tmp_path / name)
    (tmp_path / "last.pth").write_bytes((tmp_path / "best.pth").read_bytes())

    assert "'last.pth' beside it" in found(examine(tmp_path / "best.pth"), "same-as-sibling").message


# -------------------------------------------------------------------- forms of weights


def test_weight_norm_is_named_in_both_spellings() -> None:
    old = torch.nn.utils.weight_norm
    new = torch.nn.utils.parametrizations.weight_norm
    with pytest.warns(FutureWarning):
        states = [old(torch.nn.Linear(4, 4)).state_dict()]
    states.append(new(torch.nn.Linear(4, 4)).state_dict())

    assert ["weight_norm"] * 2 == [examine(state).facts["saved_from"][0] for state in states]


def test_spectral_norm_is_named_in_both_spellings() -> None:
    old = torch.nn.utils.spectral_norm(torch.nn.Linear(4, 4)).state_dict()
    new = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(4, 4)).state_dict()

    assert [["spectral_norm"]] * 2 == [examine(state).facts["saved_from"] for state in (old, new)]


def test_pruning_is_named() -> None:
    from torch.nn.utils import prune

    layer = torch.nn.Linear(8, 8)
    prune.l1_unstructured(layer, "weight", amount=0.5)

    assert "pruning masks" in examine(layer.state_dict()).facts["saved_from"]


def test_an_adapter_of_which_b_is_zero_changes_nothing() -> None:
    state = {f"base_model.model.q.{at}.lora_A.weight": torch.randn(4, 16) for at in range(3)}
    state |= {f"base_model.model.q.{at}.lora_B.weight": torch.zeros(16, 4) for at in range(3)}
    examination = examine(state)

    assert {"adapter-unchanged"} == codes(examination)
    assert "LoRA of rank 4" in found(examination, "lora-adapter").message


def test_a_model_with_an_adapter_is_told_from_an_adapter() -> None:
    state = {
        "base_model.model.q.base_layer.weight": torch.randn(16, 16),
        "base_model.model.q.lora_A.default.weight": torch.randn(4, 16),
        "base_model.model.q.lora_B.default.weight": torch.randn(16, 4),
    }

    assert "a model that peft has wrapped" in found(examine(state), "lora-model").message.replace("\n", " ")


INT8 = torch.zeros(8, 8, dtype=torch.int8).random_(-127, 127)
BYTES = torch.zeros(32, 1, dtype=torch.uint8).random_(0, 255)
INT32 = torch.zeros(2, 16, dtype=torch.int32).random_(0, 1000)
QUANTISED = {
    "bitsandbytes, 8 bits": {"q.weight": INT8, "q.SCB": torch.rand(8)},
    "bitsandbytes, 4 bits": {
        "q.weight": BYTES,
        "q.weight.absmax": torch.rand(2),
        "q.weight.quant_map": torch.rand(16),
        "q.weight.quant_state.bitsandbytes__nf4": torch.zeros(80, dtype=torch.uint8),
    },
    "GPTQ": {"q.qweight": INT32, "q.qzeros": INT32[:1], "q.scales": torch.rand(1, 16), "q.g_idx": torch.arange(16)},
    "AWQ": {"q.qweight": INT32, "q.qzeros": INT32[:1], "q.scales": torch.rand(1, 16)},
    "float8 in blocks": {"q.weight": torch.randn(8, 8).to(torch.float8_e4m3fn), "q.weight_scale_inv": torch.rand(1, 1)},
}


@pytest.mark.parametrize("scheme", QUANTISED)
def test_quantised_weights_with_their_scales_are_named_and_no_fault(scheme: str) -> None:
    examination = examine(QUANTISED[scheme])

    assert f"quantised: {scheme}" in examination.facts["saved_from"]
    assert not examination.wrong


@pytest.mark.parametrize("scheme", ["bitsandbytes, 8 bits", "GPTQ", "AWQ"])
def test_quantised_weights_without_their_scales_are_an_error(scheme: str) -> None:
    state = {name: tensor for name, tensor in QUANTISED[scheme].items() if name.endswith("weight")}

    assert "error" == found(examine(state), "scale-missing").level


def test_float8_that_lost_its_scale_beside_others_that_have_one_is_an_error() -> None:
    eight = torch.randn(8, 8).to(torch.float8_e4m3fn)
    state = {"q.weight": eight, "q.weight_scale_inv": torch.rand(1, 1), "k.weight": eight}

    assert ("k.weight",) == found(examine(state), "scale-missing").keys


# -------------------------------------------------------------------- instead of weights


def test_an_optimizer_alone_is_said(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(3, 4))
    adam = torch.optim.Adam([weight])
    weight.grad = torch.randn(3, 4)
    adam.step()
    torch.save(adam.state_dict(), tmp_path / "optimizer.pt")
    examination = examine(tmp_path / "optimizer.pt")

    assert "Adam or AdamW" in found(examination, "optimizer-only").message
    assert not examination.wrong


def test_a_scheduler_alone_is_said(tmp_path: Path) -> None:
    adam = torch.optim.Adam([torch.nn.Parameter(torch.randn(3))])
    torch.save(torch.optim.lr_scheduler.StepLR(adam, 3).state_dict(), tmp_path / "scheduler.pt")

    assert found(examine(tmp_path / "scheduler.pt"), "scheduler-only")


def test_a_checkpoint_of_lightning_names_the_attribute_and_what_stands_beside_it() -> None:
    state = {f"net.{name}": tensor for name, tensor in trained().items()}
    checkpoint = {
        "epoch": 3,
        "global_step": 100,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": {**state, "loss.weight": torch.rand(10)},
        "optimizer_states": [],
    }
    examination = examine(checkpoint)
    finding = found(examination, "lightning")

    assert "16 of 17 names under 'state_dict' begin with 'net.'" in finding.message
    assert ("state_dict.loss.weight",) == finding.keys
    assert "Lightning 2.6.0" in examination.facts["saved_from"]


def test_values_that_torch_refuses_are_named_without_advice_to_run_them(tmp_path: Path) -> None:
    from argparse import Namespace

    torch.save({"model": trained(), "args": Namespace(lr=0.1)}, tmp_path / "run.pth")
    finding = found(examine(tmp_path / "run.pth"), "needs-pickle")

    assert "argparse.Namespace" in finding.message
    assert "Don't pass weights_only=False" in finding.message


def test_a_model_that_was_saved_whole_is_said(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(3, 3), tmp_path / "whole.pth")

    assert {"saved-as-object"} == codes(examine(tmp_path / "whole.pth"))


def test_a_view_of_a_larger_storage_is_found(tmp_path: Path) -> None:
    torch.save({"rows": torch.randn(1000, 100)[:2], "w": torch.randn(4, 4)}, tmp_path / "view.pth")

    assert {"view-bloat"} == codes(examine(tmp_path / "view.pth"))


# -------------------------------------------------------------------- the network


def test_what_follows_from_the_shapes_of_a_transformer_is_said() -> None:
    state = {f"model.{name}": tensor for name, tensor in without(blocks(4), "attn").items()}
    for at in range(4):
        state[f"model.layers.{at}.attn.q_proj.weight"] = torch.randn(64, 8)
        state[f"model.layers.{at}.attn.k_proj.weight"] = torch.randn(32, 8)
        state[f"model.layers.{at}.attn.q_norm.weight"] = torch.rand(16)
    state["model.embed_tokens.weight"] = torch.randn(300, 8)
    network = examine(state).facts["network"]

    assert {
        "kind": "transformer",
        "blocks": 4,
        "width": 8,
        "vocabulary": 300,
        "heads": 4,
        "head_width": 16,
        "key_value_heads": 2,
    } == network


def test_heads_that_do_not_follow_from_shapes_are_not_said() -> None:
    assert "heads" not in examine(blocks(4)).facts["network"]


def test_the_header_alone_is_read_on_demand() -> None:
    examination = examine(with_nan(trained()), quick=True)

    assert "header" == examination.facts["read"]
    assert "Nothing looks wrong in its header; the values weren't read." == examination.sentence


def test_one_share_of_zero_is_said_to_be_one(tmp_path: Path) -> None:
    # As deepspeed's stage 3 writes a rank's optimizer states.
    state = {
        "optimizer_state_dict": {"zero_stage": 3, "partition_count": 2, "fp32_flat_groups": [torch.randn(100)]},
        "ds_version": "0.15.0",
    }
    torch.save(state, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    examination = examine(tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")

    assert {"zero-partition"} == codes(examination)
    assert ["DeepSpeed"] == examination.facts["saved_from"]


def test_a_new_model_is_the_first_thing_to_know_of_one_that_is_not_wrong() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))

    assert examine(model.state_dict()).sentence.startswith("Nothing looks wrong. This model was never trained")


def test_layers_without_outputs_are_no_shells() -> None:
    state = trained() | {"none.weight": torch.empty(0, 16), "none.bias": torch.empty(0)}

    assert not examine(state).wrong


def test_a_best_loss_that_is_still_infinite_is_no_fault(tmp_path: Path) -> None:
    checkpoint = {"state_dict": trained(), "callbacks": {"EarlyStopping": {"best_score": torch.tensor(float("inf"))}}}
    torch.save(checkpoint, tmp_path / "run.ckpt")

    assert not examine(tmp_path / "run.ckpt").wrong

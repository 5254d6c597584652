"""``load_into(rules="auto")`` beyond prefixes: what is sure and loses nothing is carried out, and one doubt loads nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from doctor_models import GPT, Bert, BertClassifier, Llama, Mixture, ResNet, Vit, nn, torch, trained

import statedict
from statedict import KeyMismatch, SpecMismatch, StateDictError

IMAGE = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(12).reshape(2, 6)


def wrapped(state: Any, prefix: str) -> dict[str, Any]:
    return {f"{prefix}{key}": value for key, value in state.items()}


@contextmanager
def unchanged(module: Any) -> Iterator[None]:
    """Nothing of the module may be another afterwards."""
    before = {key: (value, value.detach().clone()) for key, value in module.state_dict(keep_vars=True).items()}
    yield
    after = module.state_dict(keep_vars=True)
    assert all(value is after[key] and torch.equal(copied, value) for key, (value, copied) in before.items())


def saved(state: Any, folder: Path, kind: str) -> Any:
    """A state dict as a source: in memory, in torch's file, sorted in one of safetensors."""
    if kind == "pth":
        torch.save(state, folder / "x.pth")
        return folder / "x.pth"
    if kind == "safetensors":
        from safetensors.torch import save_file

        save_file({key: value.clone().contiguous() for key, value in state.items()}, folder / "x.safetensors")
        return folder / "x.safetensors"
    return state


@pytest.mark.parametrize("kind", ["memory", "pth", "safetensors"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_split_or_fused_attention_gives_the_same_outputs(kind: str, fused: bool, tmp_path: Path) -> None:
    right, module = trained(Vit(fused=fused)), Vit(fused=not fused).eval()
    report = statedict.load_into(module, saved(right.state_dict(), tmp_path, kind), rules="auto")

    assert torch.allclose(right(IMAGE), module(IMAGE), atol=1e-6)
    assert () == report.untouched == report.unexpected and 1.0 == report.coverage.keys
    assert {"realigned"} == {finding.code for finding in report.findings}
    again = Vit(fused=not fused).eval()
    statedict.load_into(again, right.state_dict(), rules=report.rules)
    assert torch.equal(module(IMAGE), again(IMAGE))


def test_experts_are_stacked_in_the_order_of_their_numbers_and_taken_apart_again() -> None:
    listed, stacked, back = trained(Mixture(stacked=False)), Mixture(stacked=True), Mixture(stacked=False)
    statedict.load_into(stacked, listed.state_dict(), rules="auto")
    statedict.load_into(back, stacked.state_dict(), rules="auto")
    layer = listed.model.layers[1].mlp.experts
    halves = [
        torch.cat([layer.get_submodule(str(at)).gate_proj.weight, layer.get_submodule(str(at)).up_proj.weight])
        for at in range(12)
    ]

    assert torch.equal(torch.stack(halves), stacked.model.layers[1].mlp.experts.gate_up_proj)
    assert all(torch.equal(value, back.state_dict()[key]) for key, value in listed.state_dict().items())


@pytest.mark.parametrize("prefix", ["module.", "module._orig_mod.model.", "model._orig_mod."])
def test_names_of_another_library_behind_wrappers_in_a_training_checkpoint(prefix: str, tmp_path: Path) -> None:
    right, module = trained(Vit(fused=True)), Vit(fused=False).eval()
    optimizer = torch.optim.Adam(right.parameters())
    right(IMAGE).sum().backward()
    optimizer.step()
    state = {"epoch": 3, "model_state_dict": wrapped(right.state_dict(), prefix), "optimizer": optimizer.state_dict()}
    torch.save(state, tmp_path / "run.pth")
    report = statedict.load_into(module, tmp_path / "run.pth", rules="auto")

    assert torch.allclose(right(IMAGE), module(IMAGE), atol=1e-5)
    assert "select('model_state_dict')" == str(report.rules[0])


def test_a_model_on_the_meta_device_is_made_of_a_file_of_other_names(tmp_path: Path) -> None:
    right = trained(Vit(fused=True))
    torch.save(right.state_dict(), tmp_path / "x.pth")
    with torch.device("meta"):
        module = Vit(fused=False).eval()
    statedict.load_into(module, tmp_path / "x.pth", rules="auto")

    assert torch.allclose(right(IMAGE), module(IMAGE), atol=1e-6)


def test_a_wrapped_model_takes_a_file_of_other_names() -> None:
    right, module = trained(Vit(fused=True)), nn.DataParallel(Vit(fused=False)).eval()
    statedict.load_into(module, right.state_dict(), rules="auto")

    assert torch.allclose(right(IMAGE), module.module(IMAGE), atol=1e-6)


# -------------------------------------------------------------------- what is left out


def test_what_stands_beside_the_model_is_left_out_and_said() -> None:
    module = ResNet()
    state = {
        "state_dict": {**wrapped(trained(ResNet()).state_dict(), "model."), "loss.weight": torch.ones(10)},
        "epoch": 3,
    }
    report = statedict.load_into(module, state, rules="auto")

    assert ("loss.weight",) == report.unexpected and () == report.untouched
    assert ["loss.weight"] == [key for finding in report.findings if finding.code == "left-out" for key in finding.keys]


def test_a_part_of_a_larger_model_is_taken() -> None:
    right, module = trained(BertClassifier()), Bert().eval()
    report = statedict.load_into(module, right.state_dict(), rules="auto")

    assert torch.equal(right.bert(IDS), module(IDS))
    assert {"classifier.weight", "classifier.bias"} == set(report.unexpected)


def test_counters_and_indices_that_a_model_makes_itself_may_be_missing_or_too_many() -> None:
    class Indexed(BertClassifier):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("position_ids", torch.arange(12)[None])

    right = trained(BertClassifier())
    more = {**right.state_dict(), "bert.embeddings.position_ids": torch.arange(12)[None]}
    module, indexed = BertClassifier().eval(), Indexed().eval()
    reports = [
        statedict.load_into(module, more, rules="auto"),
        statedict.load_into(indexed, right.state_dict(), rules="auto"),
    ]

    assert torch.equal(right(IDS), module(IDS)) and torch.equal(right(IDS), indexed(IDS))
    assert ("bert.embeddings.position_ids",) == reports[0].unexpected
    assert ("position_ids",) == reports[1].missing == reports[1].untouched
    assert torch.equal(torch.arange(12)[None], indexed.position_ids)


# -------------------------------------------------------------------- what isn't done


def undecided(make: str) -> tuple[Any, Any, str]:
    """A state dict, a module, and words of the error."""
    if make == "transposed":
        return trained(GPT(conv1d=True)).state_dict(), GPT(conv1d=False), "stored transposed"
    if make == "rotary":
        return trained(Llama(meta=True)).state_dict(), Llama(meta=False), "rotary"
    if make == "head":
        return trained(ResNet()).state_dict(), ResNet(5), "90 of 92"
    if make == "deeper":
        return trained(Bert(layers=5)).state_dict(), Bert(layers=3), "5 blocks"
    if make == "shallower":
        return trained(Bert(layers=3)).state_dict(), Bert(layers=5), "3 blocks"
    if make == "another":
        return trained(BertClassifier()).state_dict(), ResNet(), "different networks"
    return wrapped(trained(Bert()).state_dict(), "bert."), BertClassifier(), "54 of 56"


@pytest.mark.parametrize("make", ["transposed", "rotary", "head", "deeper", "shallower", "another", "no head"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_one_doubt_loads_nothing_and_the_error_has_the_doctors_sentence(make: str, prefix: str) -> None:
    state, module, words = undecided(make)
    with unchanged(module), pytest.raises((KeyMismatch, SpecMismatch), match=words) as caught:
        statedict.load_into(module, wrapped(state, prefix), rules="auto")

    assert "\n" not in str(caught.value)


def test_without_auto_the_error_says_that_it_would_fit() -> None:
    module = Vit(fused=False)
    with unchanged(module), pytest.raises(KeyMismatch, match=r'18 cut out of fused ones\. Pass rules="auto"'):
        statedict.load_into(module, trained(Vit(fused=True)).state_dict())


def test_quantised_weights_are_not_loaded_as_numbers() -> None:
    state = trained(BertClassifier()).state_dict()
    for key in [key for key in state if key.endswith("dense.weight")]:
        state[key] = state[key].to(torch.int8)
    module = BertClassifier()
    with unchanged(module), pytest.raises(StateDictError, match="quantised"):
        statedict.load_into(module, wrapped(state, "model."), rules="auto")


def test_two_copies_of_one_weight_behind_different_names_are_refused() -> None:
    state = trained(ResNet()).state_dict()
    both = {**state, **wrapped(trained(ResNet(), 1).state_dict(), "module."), "module.fc.weight": torch.ones(21, 32)}
    module = ResNet()
    with unchanged(module), pytest.raises(StateDictError):
        statedict.load_into(module, both, rules="auto")


def test_leaving_things_out_loads_what_is_sure_of_another_library() -> None:
    state = trained(Vit(fused=True)).state_dict()
    state["head.weight"], state["head.bias"] = torch.ones(9, 16), torch.ones(9)
    module = Vit(fused=False)
    report = statedict.load_into(module, state, rules="auto", strict=False)

    assert {"classifier.weight", "classifier.bias"} == set(report.untouched)
    assert {"head.weight", "head.bias"} == set(report.unexpected)
    assert torch.equal(
        state["blocks.1.attn.qkv.weight"][16:32], module.vit.encoder.layer[1].attention.attention.key.weight
    )


def test_aligning_is_not_even_imported_where_names_fit() -> None:
    code = (
        "import sys, torch, statedict\n"
        "net = torch.nn.Linear(2, 2)\n"
        "statedict.load_into(net, {f'module.{k}': v for k, v in net.state_dict().items()}, rules='auto')\n"
        "print([name for name in sys.modules if name.startswith(('statedict.aligning', 'statedict.knowledge'))])"
    )

    assert b"[]" == subprocess.run([sys.executable, "-c", code], capture_output=True).stdout.strip()

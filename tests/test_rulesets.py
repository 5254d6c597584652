"""The shipped rule sets: each is held against models of both layouts that must give the same output, and against pairs with a known truth.

The models of the first layouts are written here, as small as they go: what their libraries compute, under the names of their files. Those
of the second are transformers' own.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import statedict
from statedict.aligning.alignment import Mapped
from statedict.errors import RuleError
from statedict.knowledge.rulesets import candidates, rule_sets
from statedict.ops.diagnosing.evidence import evidence_of
from statedict.ops.diagnosing.ruling import ruled
from statedict.ops.diagnosing.settling import settled
from statedict.ops.diagnosing.weights import weights_of
from statedict.ops.hypotheses import answered
from statedict.rules import Rules
from statedict.rules.named import shipped, typed

# Rule sets that need a number, with one that fits the models of these tests.
NUMBERS = {"meta-llama-to-hf-llama": {"head_dim": 8}, "hf-llama-to-meta-llama": {"head_dim": 8}}


def of(*names: str) -> Rules:
    """The rules of several sets, one behind the other."""
    return Rules([rule for name in names for rule in shipped(name, **NUMBERS.get(name, {}))])


# ---- what can be had by name


def test_every_rule_set_can_be_made() -> None:
    assert dict.fromkeys(rule_sets(), True) == {name: bool(of(name)) for name in rule_sets()}


def test_a_rule_set_is_a_file_of_rules() -> None:
    folder = Path(statedict.__file__).parent / "knowledge" / "rulesets"

    assert of("timm-vit-to-hf-vit") == Rules.from_file(folder / "timm-vit.toml")
    assert of("timm-vit-to-hf-vit") == typed("timm-vit-to-hf-vit")


def test_rules_survive_a_file_of_their_own(tmp_path: Path) -> None:
    for name in rule_sets():
        of(name).to_file(tmp_path / f"{name}.toml")

        assert of(name) == Rules.from_file(tmp_path / f"{name}.toml")


def test_an_unknown_name_is_said_with_what_was_meant() -> None:
    with pytest.raises(RuleError, match=r"no rules of this name are shipped.*timm-vit-to-hf-vit"):
        shipped("timm-vit-to-hf")


def test_a_number_that_is_needed_is_asked_for() -> None:
    with pytest.raises(RuleError, match=r"need head_dim.*dim / n_heads in params\.json"):
        shipped("meta-llama-to-hf-llama")


@pytest.mark.parametrize("value", [7, 0, -8, True, 2.0])
def test_a_number_that_cannot_be_is_refused(value: Any) -> None:
    with pytest.raises(RuleError, match="a multiple of 2"):
        shipped("meta-llama-to-hf-llama", head_dim=value)


def test_a_number_that_nothing_asks_for_is_refused() -> None:
    with pytest.raises(RuleError, match="take no such number"):
        shipped("timm-vit-to-hf-vit", heads=4)


def test_numbers_are_typed_behind_the_name() -> None:
    assert of("meta-llama-to-hf-llama") == typed("meta-llama-to-hf-llama:head_dim=8")
    with pytest.raises(RuleError, match="NAME:word=number"):
        typed("meta-llama-to-hf-llama:head_dim=eight")


def test_a_file_goes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    of("hf-vit-to-hf5-vit").to_file("rules.toml")
    os.rename("rules.toml", "timm-vit-to-hf-vit")

    with pytest.raises(RuleError, match=r"ending in \.toml or \.json"):
        typed("timm-vit-to-hf-vit")


def test_a_parameter_is_read_off_a_tensor_that_tells_it() -> None:
    found = rule_sets()["meta-llama-to-hf-llama"]

    assert {"head_dim": 128} == found.values({"rope.freqs": (64,)})
    assert None is found.values({"norm.weight": (4096,)})
    assert {} == rule_sets()["timm-vit-to-hf-vit"].values({})


def test_convert_takes_a_name_for_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from statedict.cli import main

    source = str(written(drawn(LLAMA, 1), tmp_path / "meta.safetensors"))
    target = tmp_path / "hf.safetensors"

    assert 2 == main(["convert", source, str(target), "--rules", "meta-llama-to-hf-llama"])
    assert "need head_dim" in capsys.readouterr().err
    assert 0 == main(["convert", source, str(target), "--rules", "meta-llama-to-hf-llama:head_dim=8"])
    wanted, made = remapped(Path(source), of("meta-llama-to-hf-llama")), remapped(target, Rules())
    assert set(wanted) == set(made)
    assert [] == [key for key in wanted if (wanted[key] != made[key]).any()]


# ---- pairs with a truth


PAIRS = {
    "p1-resnet18.torchvision-hf": ["torchvision-resnet-to-hf-resnet"],
    "p1-resnet18.hf-torchvision": ["hf-resnet-to-torchvision-resnet"],
    "p2-vit.torchvision-timm": ["torchvision-vit-to-timm-vit"],
    "p2-vit.timm-torchvision": ["timm-vit-to-torchvision-vit"],
    "p3-vit.timm-hf": ["timm-vit-to-hf-vit", "hf-vit-to-hf5-vit"],
    "p3-vit.hf-timm": ["hf5-vit-to-hf-vit", "hf-vit-to-timm-vit"],
    "p7-gpt2.conv1d-linear": ["gpt2-conv1d-to-gpt2-linear"],
    "p7-gpt2.linear-conv1d": ["gpt2-linear-to-gpt2-conv1d"],
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("order", ["registered", "sorted"])
def test_a_pair_gets_just_what_its_truth_says(shared: Path, tmp_path: Path, pair: str, order: str) -> None:
    np = pytest.importorskip("numpy")
    torch = pytest.importorskip("torch")
    case = json.loads((shared / "data" / "pairs" / f"{pair}.{order}.json").read_text(encoding="utf-8"))
    state = numbered(np, case)
    torch.save({key: torch.from_numpy(value) for key, value in state.items()}, tmp_path / "source.pth")
    truth = {entry["target"]: carried_out(np, entry, state) for entry in case["truth"]}

    made = remapped(tmp_path / "source.pth", of(*PAIRS[pair]))

    assert {key for key, _, _ in case["target"]} == set(made)
    assert [] == [key for key, value in truth.items() if not np.array_equal(value, made[key])]
    assert PAIRS[pair][0] in [found.name for found in candidates(list(state))]


def numbered(np: Any, case: Any) -> dict[str, Any]:
    """A state dict of the case's names and shapes, in which every element is another number."""
    made, start = {}, 0
    for key, shape, _ in case["source"]:
        stop = start + math.prod(shape)
        made[key] = np.arange(start, stop).reshape(shape)
        start = stop
    return made


def carried_out(np: Any, entry: Any, state: Mapping[str, Any]) -> Any:
    """The tensor that an entry of a truth is."""
    (source,), args = entry["sources"] if entry["op"] != "concat" else [None], entry["args"]
    if entry["op"] == "concat":
        return np.concatenate([state[key] for key in entry["sources"]], args["dim"])
    value = state[source]
    if entry["op"] == "transpose":
        return value.transpose(args["dims"])
    if entry["op"] == "split":
        return value.take(range(args["start"], args["stop"]), args["dim"])
    assert entry["op"] == "copy"
    return value


def remapped(path: Path, rules: Rules) -> dict[str, Any]:
    """What the rules make of a file, as arrays."""
    with statedict.remap(path, rules) as found:
        return {key: found[key].numpy().copy() for key in found}


# ---- what they answer where names and shapes leave a question


LLAMA = {
    "tok_embeddings.weight": (50, 32),
    "layers.0.attention.wq.weight": (32, 32),
    "layers.0.attention.wk.weight": (16, 32),
    "layers.0.attention.wv.weight": (16, 32),
    "layers.0.attention.wo.weight": (32, 32),
    "layers.0.feed_forward.w1.weight": (48, 32),
    "layers.0.feed_forward.w2.weight": (32, 48),
    "layers.0.feed_forward.w3.weight": (48, 32),
    "layers.0.attention_norm.weight": (32,),
    "layers.0.ffn_norm.weight": (32,),
    "norm.weight": (32,),
    "output.weight": (50, 32),
}
QUERY, KEY = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk")


def drawn(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Any]:
    """A state dict of these shapes whose values are related to no other's."""
    np = pytest.importorskip("numpy")
    generator = np.random.default_rng(seed)
    return {key: generator.standard_normal(shape).astype("float32") for key, shape in shapes.items()}


def written(state: Mapping[str, Any], path: Path) -> Path:
    pytest.importorskip("safetensors.numpy").save_file({key: value.copy() for key, value in state.items()}, path)
    return path


def planned(source: Path, target: Path) -> tuple[dict[str, Mapped], Rules]:
    """What the plan for two files says of each tensor of the target, and the rules that carry it out."""
    with statedict.open(source) as given, statedict.open(target) as wanted:
        one, other = weights_of(given), weights_of(wanted, wanted=True)
        plan = answered(settled(one.side, other.side, evidence_of(one, other)), one, other.side)
        claims = [mapped for mapped in plan.alignment.mapped if mapped.is_claim]
        shapes = [{key: spec.shape for key, spec in side.tensors.items()} for side in (one.side, other.side)]
        return {mapped.target: mapped for mapped in plan.alignment.mapped}, ruled(claims, *shapes).rules


def plan_of(source: Path, target: Path) -> dict[str, Mapped]:
    return planned(source, target)[0]


@pytest.fixture
def llamas(tmp_path: Path) -> tuple[Path, Path, dict[str, Any]]:
    """Meta's file with the frequencies that tell its heads, one of transformers' names and shapes, and what the latter holds."""
    source = written(drawn({**LLAMA, "rope.freqs": (4,)}, 1), tmp_path / "meta.safetensors")
    shapes = {key: value.shape for key, value in remapped(source, of("meta-llama-to-hf-llama")).items()}
    state = drawn(shapes, 2)
    return source, written(state, tmp_path / "hf.safetensors"), state


def test_rules_that_explain_everything_answer_what_is_open(llamas: Any) -> None:
    source, target, _ = llamas
    plan = plan_of(source, target)

    assert ("permute", "corroborated") == (plan[QUERY].op, plan[QUERY].tier)
    assert {"dim": 0, "view": [4, 4, 2], "order": [0, 2, 1]} == plan[QUERY].args
    assert {"dim": 0, "view": [2, 4, 2], "order": [0, 2, 1]} == plan[KEY].args
    assert ("the shipped rules 'meta-llama-to-hf-llama' make exactly these names and shapes",) == plan[KEY].reasons


def test_what_they_answer_is_carried_out_as_the_rules_do_it(llamas: Any) -> None:
    source, target, _ = llamas
    made = remapped(source, planned(source, target)[1])

    wanted = remapped(source, of("meta-llama-to-hf-llama"))
    assert set(wanted) == set(made)
    assert [] == [key for key in wanted if (wanted[key] != made[key]).any()]


def test_without_its_number_a_rule_set_answers_nothing(llamas: Any, tmp_path: Path) -> None:
    source = written(drawn(LLAMA, 1), tmp_path / "untold.safetensors")

    assert {"undecidable"} == {plan_of(source, llamas[1])[key].tier for key in (QUERY, KEY)}


@pytest.mark.parametrize("change", ["a name more", "a name less", "another shape"])
def test_rules_that_leave_something_unexplained_answer_nothing(llamas: Any, tmp_path: Path, change: str) -> None:
    source, _, state = llamas
    if change == "a name more":
        state["model.layers.0.self_attn.q_norm.weight"] = state["model.norm.weight"][:8] + 1
    elif change == "a name less":
        del state["lm_head.weight"]
    else:
        state["lm_head.weight"] = state["lm_head.weight"][:48]
    target = written(state, tmp_path / "other.safetensors")

    assert {"undecidable"} == {plan_of(source, target)[key].tier for key in (QUERY, KEY)}


def test_what_values_prove_is_not_overruled(llamas: Any, tmp_path: Path) -> None:
    source, _, state = llamas
    state[QUERY] = remapped(source, Rules())["layers.0.attention.wq.weight"]
    plan = plan_of(source, written(state, tmp_path / "copied.safetensors"))

    assert ("copy", "proven") == (plan[QUERY].op, plan[QUERY].tier)
    assert plan[KEY].tier not in ("proven", "corroborated")


def test_the_square_matrix_among_transposed_ones_is_answered(tmp_path: Path) -> None:
    shapes = {
        "wte.weight": (50, 32),
        "h.0.attn.c_attn.weight": (32, 96),
        "h.0.attn.c_proj.weight": (32, 32),
        "h.0.mlp.c_fc.weight": (32, 128),
        "h.0.mlp.c_proj.weight": (128, 32),
        "h.0.ln_1.weight": (32,),
        "h.0.ln_2.weight": (32,),
    }
    turned = {key: shape[::-1] if ".c_" in key else shape for key, shape in shapes.items()}
    source = written(drawn(shapes, 1), tmp_path / "conv1d.safetensors")
    plan = plan_of(source, written(drawn(turned, 2), tmp_path / "linear.safetensors"))

    square = plan["h.0.attn.c_proj.weight"]
    assert ("transpose", "corroborated") == (square.op, square.tier)


# ---- models of both layouts


@pytest.fixture(scope="module")
def torch() -> Any:
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def transformers(torch: Any) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("TRANSFORMERS_VERBOSITY", "error")
        yield pytest.importorskip("transformers")


def randomised(model: Any) -> Any:
    """The model with values everywhere that make a difference: none is zero or one, statistics are none of a fresh model."""
    import torch

    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if not value.is_floating_point():
                continue
            noise = torch.randn(value.shape, generator=generator)
            if key.endswith("running_var"):
                value.copy_(0.5 + noise.abs())
            elif value.ndim < 2:
                value.copy_(0.2 * noise + (1.0 if "bias" not in key else 0.0))
            else:
                value.copy_(noise * 0.7 / math.sqrt(math.prod(value.shape[1:])) if "embed" not in key else noise * 0.5)
    return model.eval()


def carried_over(source: Any, target: Any, folder: Path, *names: str, extra: Mapping[str, Any] | None = None) -> Any:
    """The target with all of the source's weights, by the rules; the way there and back gives the same bytes where there is one."""
    import torch

    state = {**source.state_dict(), **(extra or {})}
    torch.save(state, folder / "source.pth")
    rules = of(*names)
    statedict.load_into(randomised(target), folder / "source.pth", rules=rules)
    if not extra and not any(rule.name in ("tie", "pad") for rule in rules):
        back = [f"{b}-to-{a}" for a, b in [name.split("-to-") for name in reversed(names)]]
        again = remapped(folder / "source.pth", Rules([*rules, *of(*back)]))
        assert set(state) == set(again)
        assert [] == [key for key, value in state.items() if not torch.equal(value, torch.from_numpy(again[key]))]
    return target.eval()


def difference(one: Any, other: Any) -> float:
    """The largest difference of two outputs, in shares of the largest number in them."""
    return float((one - other).abs().max() / one.abs().max())


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_resnets_of_torchvision_and_transformers_agree(
    torch: Any, transformers: Any, tmp_path: Path, kind: str
) -> None:
    from rule_set_models import ResNet

    sizes = [16, 32] if kind == "basic" else [64, 128]
    source = randomised(ResNet(kind, depths=[2, 2], width=16, outputs=5))
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=sizes, depths=[2, 2], layer_type=kind, num_labels=5, hidden_act="relu"
    )
    target = carried_over(
        source, transformers.ResNetForImageClassification(config), tmp_path, "torchvision-resnet-to-hf-resnet"
    )
    pixels = torch.randn(2, 3, 32, 32)

    with torch.no_grad():
        assert difference(source(pixels), target(pixels).logits) < 1e-5


def vit_of(transformers: Any) -> Any:
    config = transformers.ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        num_labels=5,
        layer_norm_eps=1e-6,
    )
    return transformers.ViTForImageClassification(config)


def test_vits_of_torchvision_timm_and_transformers_agree(torch: Any, transformers: Any, tmp_path: Path) -> None:
    from rule_set_models import TimmViT, TorchvisionViT

    source = randomised(TorchvisionViT(width=32, heads=4, depth=3, outputs=5))
    timm = carried_over(source, TimmViT(width=32, heads=4, depth=3, outputs=5), tmp_path, "torchvision-vit-to-timm-vit")
    target = carried_over(timm, vit_of(transformers), tmp_path, "timm-vit-to-hf-vit", "hf-vit-to-hf5-vit")
    pixels = torch.randn(2, 3, 32, 32)

    with torch.no_grad():
        assert difference(source(pixels), timm(pixels)) < 1e-5
        assert difference(source(pixels), target(pixels).logits) < 1e-5


def test_first_files_of_torchvision_have_other_names_for_two_layers(torch: Any, tmp_path: Path) -> None:
    from rule_set_models import TimmViT, TorchvisionViT

    state = randomised(TorchvisionViT(width=32, heads=4, depth=1, outputs=5)).state_dict()
    older = {key.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): each for key, each in state.items()}
    torch.save(older, tmp_path / "older.pth")

    made = remapped(tmp_path / "older.pth", of("torchvision-vit-to-timm-vit"))

    assert set(TimmViT(width=32, heads=4, depth=1, outputs=5).state_dict()) == set(made)
    assert (made["blocks.0.mlp.fc2.weight"] == state["encoder.layers.encoder_layer_0.mlp.3.weight"].numpy()).all()


def test_what_transformers_writes_of_a_vit_becomes_what_it_has_in_memory(transformers: Any, tmp_path: Path) -> None:
    model = randomised(vit_of(transformers))
    model.save_pretrained(tmp_path)

    made = remapped(tmp_path / "model.safetensors", of("hf-vit-to-hf5-vit"))

    state = {key: value.numpy() for key, value in model.state_dict().items()}
    assert set(state) == set(made)
    assert [] == [key for key in state if (state[key] != made[key]).any()]


def test_gpt2_with_linear_layers_agrees_with_transformers(torch: Any, transformers: Any, tmp_path: Path) -> None:
    from rule_set_models import with_linear_layers

    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    source = randomised(transformers.GPT2LMHeadModel(config))
    target = carried_over(
        source, with_linear_layers(transformers.GPT2LMHeadModel(config)), tmp_path, "gpt2-conv1d-to-gpt2-linear"
    )
    tokens = torch.randint(0, 50, (2, 12))

    with torch.no_grad():
        assert difference(source(tokens).logits, target(tokens).logits) < 1e-5
        square = target.transformer.h[0].attn.c_proj.weight
        square.copy_(square.T.clone())
        assert difference(source(tokens).logits, target(tokens).logits) > 1e-2


def llama_of(transformers: Any) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        rms_norm_eps=1e-5,
    )
    return transformers.LlamaForCausalLM(config)


def test_llamas_of_meta_and_transformers_agree(torch: Any, transformers: Any, tmp_path: Path) -> None:
    from rule_set_models import MetaLlama

    source = randomised(MetaLlama(width=32, inner=48, heads=4, kv_heads=2, depth=2, vocabulary=50))
    target = carried_over(source, llama_of(transformers), tmp_path, "meta-llama-to-hf-llama")
    tokens = torch.randint(0, 50, (2, 12))

    with torch.no_grad():
        assert difference(source(tokens), target(tokens).logits) < 1e-5


@pytest.mark.parametrize("head_dim", [None, 4, 16])
def test_llamas_without_the_right_order_of_rows_do_not_agree(
    torch: Any, transformers: Any, tmp_path: Path, head_dim: int | None
) -> None:
    from rule_set_models import MetaLlama

    source = randomised(MetaLlama(width=32, inner=48, heads=4, kv_heads=2, depth=2, vocabulary=50))
    torch.save(source.state_dict(), tmp_path / "source.pth")
    rules = Rules(
        [
            rule
            for rule in shipped("meta-llama-to-hf-llama", head_dim=head_dim or 8)
            if head_dim is not None or rule.name != "reorder"
        ]
    )
    target = randomised(llama_of(transformers))
    statedict.load_into(target, tmp_path / "source.pth", rules=rules)
    tokens = torch.randint(0, 50, (2, 12))

    with torch.no_grad():
        assert difference(source(tokens), target(tokens).logits) > 1e-2


def test_the_frequencies_of_a_llama_tell_its_heads_and_are_left_out(
    torch: Any, transformers: Any, tmp_path: Path
) -> None:
    from rule_set_models import MetaLlama

    source = MetaLlama(width=32, inner=48, heads=4, kv_heads=2, depth=2, vocabulary=50)
    extra = {"rope.freqs": torch.ones(4)}
    carried_over(source, llama_of(transformers), tmp_path, "meta-llama-to-hf-llama", extra=extra)
    found = rule_sets()["meta-llama-to-hf-llama"]

    with statedict.open(tmp_path / "source.pth") as opened:
        assert NUMBERS[found.name] == found.values({key: opened[key].shape for key in opened})


def test_clips_of_openai_and_transformers_agree(torch: Any, transformers: Any, tmp_path: Path) -> None:
    from rule_set_models import OpenAIClip

    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    words = {"vocab_size": 50, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 49, "pad_token_id": 1}
    config = transformers.CLIPConfig(
        text_config={**sizes, **words},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    source = randomised(OpenAIClip(width=32, heads=4, depth=2, outputs=24, vocabulary=50, context=16))
    target = carried_over(source, transformers.CLIPModel(config), tmp_path, "openai-clip-to-hf-clip")
    pixels, tokens = torch.randn(2, 3, 32, 32), torch.randint(2, 49, (2, 12))
    tokens[:, -1] = 49

    with torch.no_grad():
        found = target(input_ids=tokens, pixel_values=pixels).logits_per_image
        assert difference(source(pixels, tokens), found) < 1e-5


@pytest.mark.parametrize("age", ["new", "old", "oldest"])
def test_robertas_of_fairseq_and_transformers_agree(torch: Any, transformers: Any, tmp_path: Path, age: str) -> None:
    from rule_set_models import FairseqRoberta

    config = transformers.RobertaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=50,
        max_position_embeddings=18,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        pad_token_id=1,
    )
    source = randomised(FairseqRoberta(width=32, inner=64, heads=4, depth=2, vocabulary=50, positions=18, age=age))
    target = carried_over(source, transformers.RobertaForMaskedLM(config), tmp_path, "fairseq-roberta-to-hf-roberta")
    tokens = torch.randint(4, 50, (2, 12))

    with torch.no_grad():
        assert difference(source(tokens), target(tokens).logits) < 1e-5
